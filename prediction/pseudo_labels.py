"""Pseudo-labels: a trained network labels scans, and a student trains on them beside the manual labels.

    python3 -m prediction.pseudo_labels --load_ckpt_path TEACHER --data_dir D --results_dir D2 \\
        --threshold 0.9 --max_share 0.5 [--unlabelled SCANS]

D2 holds D's cases, and to train `pseudo_…` ones: without --unlabelled D's training cases again (self-distillation), in
which the teacher's label replaces the manual one where its probability reaches the threshold; with it, the scans (NIfTI
files or DICOM series) whose predicted foreground is at least as probable on average. D's other subsets stay as they
are: no scan of theirs is labelled. `dataset.json` records the teacher's SHA-256 and the threshold, and training caps
the pseudo-labelled samples of a batch at --max_share.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from common.cli import Parser, number
from common.errors import UserError, run_program
from common.files import replacing
from common.messages import logger
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
from data_loading.integrity import check_files, file_md5, file_stamp, split_digest, verify_changed
from data_loading.io.orientation import common_orientation
from data_loading.io.scan_discovery import Source, find_sources
from data_loading.preprocessing import foreground_boxes, preprocess_image
from data_loading.spec import DatasetSpec
from prediction.memory import Place
from prediction.predict import Predictor, make_predictor, mean_probabilities
from runtime.arguments import parse_arguments
from runtime.checkpoint import format as checkpoints
from runtime.distributed.world import World

PREFIX = "pseudo_"
# Preprocessed image (C, D, H, W) -> probabilities (K, D, H, W).
Predict = Callable[[NDArray[np.float32]], NDArray[np.float32]]
Made = tuple[str, CaseRecord]


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="pseudo_labels", description=__doc__.partition("\n")[0] if __doc__ else None)
    add = parser.add_argument
    add("--load_ckpt_path", type=Path, required=True, help="the teacher's checkpoint")
    add("--data_dir", type=Path, required=True, help="the preprocessed folder that it was trained on")
    add("--results_dir", type=Path, required=True, help="the new preprocessed folder")
    add("--threshold", type=number(float, 0, 1), default=0.9, help="confidence from which its labels are taken")
    add("--max_share", type=number(float, 0, 1), default=0.5, help="of pseudo-labelled samples in a batch")
    add("--unlabelled", type=Path, help="scans to label; without: the training cases themselves")
    add("--model", help="the teacher's network, where the checkpoint may not name it itself")
    return parser


def main(argv: list[str] | None = None) -> int:
    options = make_parser().parse_args(argv)
    index = open_folder(options.data_dir, options.results_dir)
    check_teacher(options.load_ckpt_path, options.data_dir, index)
    predict = load_teacher(options.load_ckpt_path, options.data_dir, options.model)
    try:
        options.results_dir.mkdir(parents=True, exist_ok=True)
        copy_cases(index, options.data_dir, options.results_dir)
        if options.unlabelled:
            made = list(label_scans(index, options, predict))
        else:
            made = [distil(index, case, options, predict) for case in index.split["train"]]
        write_index(index, made, options)
    except OSError as error:
        raise UserError(f"--results_dir {options.results_dir}: {error.strerror or error}") from None
    print(f"{len(made)} pseudo-labelled cases beside {len(index.split['train'])}: {options.results_dir}")
    return 0


def open_folder(data_dir: Path, results_dir: Path) -> DatasetIndex:
    """The index of D, its files checked. Raises UserError where D is no such folder, or D2 holds a data set already."""
    if not (data_dir / INDEX_NAME).is_file():
        raise UserError(f"--data_dir {data_dir}: no {INDEX_NAME} in it; preprocess the data set with this program")
    if (results_dir / INDEX_NAME).exists():
        raise UserError(f"--results_dir {results_dir} holds a data set already; name another folder")
    index = read_index(data_dir / INDEX_NAME)
    if index.pseudo_labels:
        raise UserError(f"--data_dir {data_dir} has pseudo-labels itself; give the folder that they were made from")
    listed = [case for cases in index.split.values() for case in cases]
    verify_changed(data_dir, check_files(data_dir, listed).changed)
    return index


def check_teacher(path: Path, data_dir: Path, index: DatasetIndex) -> None:
    """Raises UserError for a teacher of another split: D's evaluation cases may be among those that it has learnt."""
    known = checkpoints.load(path).data
    if known and known != split_digest(data_dir, index.split):
        raise UserError(
            f"--load_ckpt_path {path} was trained on another data set or split than --data_dir holds: "
            "cases of this one's evaluation may be known to it"
        )
    if not known:
        logger.warning(
            f"{path} does not say what it was trained on: whether it knows the evaluation's cases cannot be told"
        )


def load_teacher(path: Path, data_dir: Path, model: str | None) -> Predict:
    """The network of the checkpoint's best state, with the windows that it was evaluated with."""
    arguments = ["--exec_mode", "predict", "--load_ckpt_path", str(path), "--data_dir", str(data_dir)]
    arguments += ["--scan", "none", "--output", "none", *(["--model", model] if model else [])]
    config, given = parse_arguments(arguments)
    world = World.join(config.local_rank)
    predictor: Predictor = make_predictor(config, given, world)[0]
    place = Place(world.device, world.device, config.val_batch_size, "")
    return lambda image: mean_probabilities(torch.from_numpy(image)[None], predictor, place)


def copy_cases(index: DatasetIndex, data_dir: Path, results_dir: Path) -> None:
    """D's files under a second name, or as copies where the file system has none; their stamps stay."""
    for case in (case for cases in index.split.values() for case in cases):
        for path in case_files(data_dir, case):
            _give(path, results_dir / path.name)


def _give(path: Path, name: Path) -> None:
    name.unlink(missing_ok=True)
    try:
        name.hardlink_to(path)
    except OSError:
        shutil.copy2(path, name)


def distil(index: DatasetIndex, case: str, options: Any, predict: Predict) -> Made:
    """A training case again: the teacher's label where it is sure, the manual one elsewhere."""
    image, manual = read_case(options.data_dir, case)
    probabilities = predict(image)
    is_sure = probabilities.max(axis=0, keepdims=True) >= options.threshold
    label = np.where(is_sure, probabilities.argmax(axis=0)[None], manual).astype(np.uint8)
    name = PREFIX + case
    _give(case_file(options.data_dir, case, "x"), case_file(options.results_dir, name, "x"))
    print(f"{name}: {is_sure.mean():.1%} of its voxels by the teacher, {np.mean(label != manual):.2%} changed")
    return name, _record(options.results_dir, name, label, index.cases[case], index.spec)


def label_scans(index: DatasetIndex, options: Any, predict: Predict) -> Iterator[Made]:
    """Those of the scans whose predicted foreground is probable enough.

    Raises:
        UserError: a scan that is one of D's cases, by its name or its content.
    """
    digests = {record.digests.get("x"): case for case, record in index.cases.items()}
    known = [r.transform.source for r in index.cases.values() if r.transform]
    spec = replace(index.spec, orientation=index.spec.orientation or common_orientation(known))
    for source in find_sources(options.unlabelled, options.results_dir, None):
        name = PREFIX + source.name
        if source.name in index.cases or not is_safe_case_id(name):
            raise UserError(f"--unlabelled {source.name} is a case of --data_dir itself, or has no plain name")
        image, record = _preprocess(source, spec)
        with replacing(path := case_file(options.results_dir, name, "x")) as temporary, temporary.open("wb") as stream:
            np.save(stream, image, allow_pickle=False)
        if same := digests.get(file_md5(path)):
            path.unlink()
            raise UserError(f"--unlabelled {source.name} is the same scan as {same} of --data_dir")
        probabilities = predict(image)
        label = probabilities.argmax(axis=0).astype(np.uint8)[None]
        confidence = float(probabilities.max(axis=0)[label[0] > 0].mean()) if label.any() else 0.0
        if confidence < options.threshold:
            path.unlink()
            print(f"{name}: left out, the mean confidence of its foreground is {confidence:.3f}")
            continue
        print(f"{name}: the mean confidence of its foreground is {confidence:.3f}")
        yield name, _record(options.results_dir, name, label, record, index.spec)


def _preprocess(source: Source, spec: DatasetSpec) -> tuple[NDArray[np.float32], CaseRecord]:
    scan = source.read(spec.channels)
    if len(scan.array) != spec.channels:
        raise UserError(f"{source.name}: has {len(scan.array)} channel(s), the network takes {spec.channels}")
    image, transform = preprocess_image(scan, spec)
    statistics = {"mean": float(image.mean(dtype=np.float64)), "std": float(image.std(dtype=np.float64))}
    return image, CaseRecord(
        transform=transform, boxes={}, digests={}, source_stamp=[[0, 0], [0, 0]], statistics=statistics
    )


def _record(folder: Path, name: str, label: NDArray[np.uint8], like: CaseRecord, spec: DatasetSpec) -> CaseRecord:
    """Writes the label; the record of the case, whose image is there."""
    with replacing(case_file(folder, name, "y")) as temporary, temporary.open("wb") as stream:
        np.save(stream, label, allow_pickle=False)
    files = {kind: case_file(folder, name, kind) for kind in "xy"}
    stamps = {kind: file_stamp(path) for kind, path in files.items()}
    digests = {kind: file_md5(path) for kind, path in files.items()}
    return replace(like, boxes=foreground_boxes(label, len(spec.classes)), digests=digests, stamps=stamps)


def write_index(index: DatasetIndex, made: list[Made], options: Any) -> None:
    """D2's `dataset.json`, last of all. Raises UserError where there is nothing new."""
    if not made:
        raise UserError(f"--threshold {options.threshold:g}: no scan is labelled with such confidence")
    with options.load_ckpt_path.open("rb") as stream:
        teacher = hashlib.file_digest(stream, "sha256").hexdigest()
    names = [name for name, _ in made]
    split = {**index.split, "train": [*index.split["train"], *names]}
    pseudo = PseudoLabels(cases=names, teacher=teacher, threshold=options.threshold, max_share=options.max_share)
    whole = DatasetIndex(
        spec=index.spec,
        split=split,
        cases={**index.cases, **dict(made)},
        provenance=index.provenance,
        pseudo_labels=pseudo,
    )
    write_json(options.results_dir / INDEX_NAME, whole.to_json())


if __name__ == "__main__":
    sys.exit(run_program(main, "pseudo_labels"))
