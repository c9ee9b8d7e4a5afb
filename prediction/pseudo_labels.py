"""Pseudo-labels: a trained network (the teacher) labels scans, on which a student trains beside manual labels.

    python3 -m prediction.pseudo_labels --load_ckpt_path TEACHER --data_dir D --results_dir D2 \\
        --threshold 0.9 --max_share 0.5 [--unlabelled SCANS]

D2 holds D's cases and additional training cases `pseudo_…`. Without --unlabelled these are D's training cases again
(self-distillation): the teacher's label replaces the manual one where its probability reaches the threshold. With
--unlabelled they are those scans (NIfTI files or DICOM series) whose mean foreground probability reaches it; one that
cannot be labelled is named, the others are added, and the exit status is 2. D's other subsets do not change: none of
their scans is labelled. `dataset.json` records the teacher's SHA-256, its training cases and the threshold; training
limits pseudo-labelled samples to the share --max_share of a batch.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from common.cli import Parser, number
from common.errors import UserError, failure_of, run_program
from common.files import replacing
from common.messages import counted, logger, note
from data_loading.dataset import case_file, case_files, read_case
from data_loading.index import (
    INDEX_NAME,
    CaseRecord,
    DatasetIndex,
    PseudoLabels,
    is_safe_case_id,
    read_index,
    write_json,
)
from data_loading.integrity import check_files, file_md5, file_stamp, verify_changed
from data_loading.io.orientation import common_orientation
from data_loading.io.scan_discovery import Source, find_sources
from data_loading.preprocessing import foreground_boxes
from data_loading.scan_checks import preprocess_scan
from data_loading.spec import DatasetSpec
from prediction.ensemble import mean_probabilities
from prediction.memory import MemoryPlan
from prediction.predict import load_ensemble
from runtime.arguments import parse_arguments
from runtime.checkpoint import format as checkpoints
from runtime.distributed.world import World
from runtime.trained_cases import training_split

PREFIX = "pseudo_"
# Preprocessed image (C, D, H, W) -> probabilities (K, D, H, W).
Predict = Callable[[NDArray[np.float32]], NDArray[np.float32]]
# Name and record of a pseudo-labelled case.
Labelled = tuple[str, CaseRecord]


def make_parser() -> Parser:
    """Builds the command line."""
    parser = Parser(prog="pseudo_labels", description=str(__doc__).partition("\n")[0])
    add = parser.add_argument
    add("--load_ckpt_path", type=Path, required=True, metavar="PATH", help="the teacher's checkpoint")
    add("--data_dir", type=Path, required=True, metavar="PATH", help="the preprocessed folder that it was trained on")
    add("--results_dir", type=Path, required=True, metavar="PATH", help="the new preprocessed folder")
    add("--threshold", type=number(float, 0, 1), default=0.9, metavar="P", help="lowest probability that is accepted")
    add(
        "--max_share",
        type=number(float, 0, 1),
        default=0.5,
        metavar="SHARE",
        help="maximum share of pseudo-labels in a batch",
    )
    add("--unlabelled", type=Path, metavar="PATH", help="scans to label (default: the training cases themselves)")
    add("--model", metavar="SPEC", help="the teacher's network, if the checkpoint's own spec may not be imported")
    return parser


def main(argv: list[str] | None = None) -> int:
    options = make_parser().parse_args(argv)
    index = open_folder(options.data_dir, options.results_dir)
    scans = find_scans(index, options.unlabelled, options.results_dir) if options.unlabelled else []
    trained_on = check_teacher(options.load_ckpt_path, options.data_dir, index)
    predict = load_teacher(options.load_ckpt_path, options.data_dir, options.model)
    try:
        options.results_dir.mkdir(parents=True, exist_ok=True)
        copy_cases(index, options.data_dir, options.results_dir)
        if options.unlabelled:
            labelled, errors = label_scans(scans, index, options, predict)
        else:
            labelled, errors = [distil(index, case, options, predict) for case in index.split["train"]], []
        if len(errors) == 1 == len(scans):
            raise UserError(errors[0])
        failed = f"{len(errors)} of {counted(len(scans), 'scan')} could not be labelled, for the reasons above"
        if errors and not labelled:
            raise UserError(f"{failed}, and no other was added: {options.results_dir} is no data set")
        write_index(index, labelled, options, trained_on)
    except OSError as error:
        raise UserError(f"--results_dir {options.results_dir}: {error.strerror or error}") from None
    print(f"{counted(len(labelled), 'pseudo-labelled case')} beside {len(index.split['train'])}: {options.results_dir}")
    if errors:
        raise UserError(failed)
    return 0


def open_folder(data_dir: Path, results_dir: Path) -> DatasetIndex:
    """Returns D's index after checking its files.

    Raises:
        UserError: D is not a preprocessed folder or has pseudo-labels itself, or D2 already holds a data set.
    """
    if not (data_dir / INDEX_NAME).is_file():
        raise UserError(f"--data_dir {data_dir}: no {INDEX_NAME} in it; preprocess the data set with this program")
    if (results_dir / INDEX_NAME).exists():
        raise UserError(f"--results_dir {results_dir} already holds a data set; give another folder")
    index = read_index(data_dir / INDEX_NAME)
    if index.pseudo_labels:
        raise UserError(f"--data_dir {data_dir} has pseudo-labels itself; give the folder that they were made from")
    listed = [case for cases in index.split.values() for case in cases]
    verify_changed(data_dir, check_files(data_dir, listed).changed)
    return index


def check_teacher(path: Path, data_dir: Path, index: DatasetIndex) -> list[str]:
    """Returns D's cases that the teacher was trained on; notes it if evaluation cases are among them.

    Raises:
        UserError: it was trained with another split than D's or one of its folds, or on other volumes.
    """
    loaded = checkpoints.load(path)
    if not loaded.data:
        logger.warning(f"{path} does not record its training data: it may have seen the evaluation cases")
        return []
    if (split := training_split(loaded, data_dir)) is None:
        raise UserError(
            f"--load_ckpt_path {path} was trained on another data set or split than --data_dir holds: "
            "it may have seen this one's evaluation cases"
        )
    evaluated = index.split.get("evaluation", [])
    if seen := {*split["train"]}.intersection(evaluated):
        note(
            f"{path} was trained on {len(seen)} of {counted(len(evaluated), 'evaluation case')}: train on "
            "--results_dir with the same fold (--folds and --fold, or --splits), whose evaluation cases it has not seen"
        )
    return split["train"]


def load_teacher(path: Path, data_dir: Path, model: str | None) -> Predict:
    """Returns a function that predicts with the checkpoint's best network and the windows of its evaluation."""
    arguments = ["--exec_mode", "predict", "--load_ckpt_path", str(path), "--data_dir", str(data_dir)]
    arguments += ["--scan", "none", "--output", "none", *(["--model", model] if model else [])]
    config, given = parse_arguments(arguments)
    world = World.join(config.local_rank)
    ensemble, _ = load_ensemble(config, given, world)
    plan = MemoryPlan(volume_device=world.device, network_device=world.device, batch_size=config.val_batch_size)

    def predict(image: NDArray[np.float32]) -> NDArray[np.float32]:
        return torch.cat(list(mean_probabilities(torch.from_numpy(image)[None], ensemble, plan, "teacher")), 1).numpy()

    return predict


def copy_cases(index: DatasetIndex, data_dir: Path, results_dir: Path) -> None:
    """Links D's files into D2, or copies them if the file system has no hard links; modification times stay."""
    for case in (case for cases in index.split.values() for case in cases):
        for path in case_files(data_dir, case):
            _link(path, results_dir / path.name)


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copy2(source, target)


def distil(index: DatasetIndex, case: str, options: argparse.Namespace, predict: Predict) -> Labelled:
    """Writes a training case again, with the teacher's label where it is confident and the manual one elsewhere."""
    image, manual = read_case(options.data_dir, case)
    probabilities = predict(image)
    is_confident = probabilities.max(axis=0, keepdims=True) >= options.threshold
    label = np.where(is_confident, probabilities.argmax(axis=0)[None], manual).astype(np.uint8)
    name = PREFIX + case
    _link(case_file(options.data_dir, case, "x"), case_file(options.results_dir, name, "x"))
    print(
        f"{name}: {is_confident.mean():.1%} of voxels labelled by the teacher, {np.mean(label != manual):.2%} changed"
    )
    return name, _record(options.results_dir, name, label, like=index.cases[case], classes=len(index.spec.classes))


def find_scans(index: DatasetIndex, unlabelled: Path, results_dir: Path) -> list[Source]:
    """Returns the scans of --unlabelled.

    Raises:
        UserError: there are none, or one has the name of another or of a case of D, or a name that is no case id.
    """
    scans = find_sources(unlabelled, results_dir, "all", index.spec.channels)
    names = [scan.name for scan in scans]
    for name in names:
        if index.cases.keys() & {name, PREFIX + name} or not is_safe_case_id(PREFIX + name):
            raise UserError(f"--unlabelled {name} is a case of --data_dir itself, or its name is not a case id")
        if names.count(name) > 1:
            raise UserError(f"--unlabelled: two scans are called {name}; they would be one case")
    return scans


def label_scans(
    scans: Sequence[Source], index: DatasetIndex, options: argparse.Namespace, predict: Predict
) -> tuple[list[Labelled], list[str]]:
    """Labels scans one after another, whatever happens to one of them; a scan that is not added leaves no file.

    Returns:
        The scans whose predicted foreground is confident enough, and the errors of those that could not be labelled.
    """
    sources = [record.transform.source for record in index.cases.values() if record.transform]
    spec = replace(index.spec, orientation=index.spec.orientation or common_orientation(sources))
    labelled: list[Labelled] = []
    errors: list[str] = []
    for scan in scans:
        added = None
        try:
            added = _label_scan(scan, replace(index, spec=spec), options, predict)
        except BrokenPipeError:  # nobody reads the output, which is no fault of this scan
            raise
        except Exception as error:
            errors.append(failure_of(scan.name, error))
            if len(scans) > 1:  # the error of a single one ends the program
                logger.error(errors[-1])
        finally:
            if added is None:
                for path in case_files(options.results_dir, PREFIX + scan.name):
                    path.unlink(missing_ok=True)
        labelled += [added] if added else []
    return labelled, errors


def _label_scan(scan: Source, index: DatasetIndex, options: argparse.Namespace, predict: Predict) -> Labelled | None:
    """Writes a scan and its label as a case; None if its predicted foreground is not confident enough.

    Raises:
        UserError: the scan is unusable or has the content of one of D's cases.
    """
    name, spec = PREFIX + scan.name, index.spec
    image, record = _preprocess(scan, spec)
    _save(path := case_file(options.results_dir, name, "x"), image)
    digests = {record.digests.get("x"): case for case, record in index.cases.items()}
    if same := digests.get(file_md5(path)):
        raise UserError(f"--unlabelled {scan.name} is the same scan as {same} of --data_dir")
    probabilities = predict(image)
    label = probabilities.argmax(axis=0).astype(np.uint8)[None]
    confidence = float(probabilities.max(axis=0)[label[0] > 0].mean()) if label.any() else 0.0
    is_left_out = confidence < options.threshold
    print(f"{name}: {'left out, ' * is_left_out}mean foreground confidence {confidence:.3f}")
    if is_left_out:
        return None
    return name, _record(options.results_dir, name, label, like=record, classes=len(spec.classes))


def _preprocess(source: Source, spec: DatasetSpec) -> tuple[NDArray[np.float32], CaseRecord]:
    scan = source.read(spec.channels)
    if len(scan.array) != spec.channels:
        raise UserError(f"{source.name}: has {counted(len(scan.array), 'channel')}, the network takes {spec.channels}")
    image, transform = preprocess_scan(scan, spec, source.name)
    statistics = {"mean": float(image.mean(dtype=np.float64)), "std": float(image.std(dtype=np.float64))}
    record = CaseRecord(transform=transform, boxes={}, digests={}, source_stamp=[[0, 0], [0, 0]], statistics=statistics)
    return image, record


def _save(path: Path, array: NDArray[Any]) -> None:
    with replacing(path) as temporary, temporary.open("wb") as stream:
        np.save(stream, array, allow_pickle=False)


def _record(folder: Path, name: str, label: NDArray[np.uint8], *, like: CaseRecord, classes: int) -> CaseRecord:
    """Writes the label of a case whose image is in place, and returns its record, made from `like`."""
    _save(case_file(folder, name, "y"), label)
    files = {kind: case_file(folder, name, kind) for kind in "xy"}
    stamps = {kind: file_stamp(path) for kind, path in files.items()}
    digests = {kind: file_md5(path) for kind, path in files.items()}
    return replace(like, boxes=foreground_boxes(label, classes), digests=digests, stamps=stamps, voxels=())


def write_index(
    index: DatasetIndex, labelled: list[Labelled], options: argparse.Namespace, trained_on: list[str]
) -> None:
    """Writes D2's `dataset.json`, which completes it. Raises UserError if there are no new cases."""
    if not labelled:
        raise UserError(f"--threshold {options.threshold:g}: no scan is labelled with such confidence")
    with options.load_ckpt_path.open("rb") as stream:
        teacher = hashlib.file_digest(stream, "sha256").hexdigest()
    names = [name for name, _ in labelled]
    result = replace(
        index,
        split={**index.split, "train": [*index.split["train"], *names]},
        cases={**index.cases, **dict(labelled)},
        pseudo_labels=PseudoLabels(
            cases=names,
            teacher=teacher,
            threshold=options.threshold,
            max_share=options.max_share,
            trained_on=trained_on,
        ),
    )
    write_json(options.results_dir / INDEX_NAME, result.to_json())


if __name__ == "__main__":
    sys.exit(run_program(main, "pseudo_labels"))
