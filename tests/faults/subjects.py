"""Good inputs that the harness damages, the programs that read them, and digests of their results."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

import main as training
import preprocess_dataset
from data_loading.index import INDEX_NAME, read_index
from data_loading.io.volume import Geometry, Volume, write_nifti
from runtime.checkpoint import format as checkpoint

Program = Callable[[Path, Path], int | None]
Result = Callable[[Path], str]

# Two resolutions; crops around the foreground of larger volumes, so that boxes, voxels and labels affect the result.
TINY = (
    *("--model", "unet3d(filters=(2,4))", "--input_shape", "8", "8", "8", "--val_input_shape", "8", "8", "8"),
    *("--num_workers", "0", "--seed", "7", "--batch_size", "1", "--oversampling", "0.7", "--prewarm_steps", "0"),
    # Enough for a Dice above 0: a run that predicts no foreground ends as diverged.
    *("--epochs", "8", "--start_eval_at", "8", "--learning_rate", "0.3"),
)


@dataclass(frozen=True)
class Subject:
    """A program and a good input folder for it.

    Attributes:
        good: the undamaged folder.
        program: reads its first argument, creates its second, an output folder, and returns the exit status.
        result: returns a digest of the output folder.
        expected: digest of the output for the undamaged folder.
        share: share of all tries.
        has_checksum: suffixes of the files of which every byte is covered by a checksum.
    """

    name: str
    good: Path
    program: Program
    result: Result
    expected: str
    share: float
    has_checksum: tuple[str, ...]


def make_subjects(work_dir: Path) -> list[Subject]:
    """Writes two raw data sets and a preprocessed folder to `work_dir`, and the results of the programs next to them.

    Files whose modification times are in dataset.json get a fixed one, so that a try always damages the same bytes.
    """
    msd, kits19, preprocessed = (work_dir / name for name in ("msd", "kits19", "preprocessed"))
    _write_msd(msd, 4)
    _write_kits19(kits19, 2)
    with contextlib.redirect_stdout(io.StringIO()):
        _preprocess("msd", msd, preprocessed)
        for path in preprocessed.glob("*.npy"):
            os.utime(path, (0, 0))
        _preprocess("msd", msd, preprocessed)  # records these times in dataset.json
        return [
            make_subject(
                msd, partial(_preprocess, "msd"), result=preprocessing_result, share=0.4, has_checksum=(".gz",)
            ),
            make_subject(
                kits19, partial(_preprocess, "kits19"), result=preprocessing_result, share=0.2, has_checksum=(".gz",)
            ),
            make_subject(preprocessed, _train, result=training_result, share=0.4, has_checksum=(".npy", ".json")),
        ]


def make_subject(
    good: Path, program: Program, result: Result, share: float = 1.0, has_checksum: tuple[str, ...] = ()
) -> Subject:
    """Returns a subject with the name of its folder; runs the program on the undamaged folder."""
    out = good.with_name(f"{good.name} result")
    if status := program(good, out):
        raise RuntimeError(f"{good}: exit status {status} for the undamaged folder")
    return Subject(
        name=good.name,
        good=good,
        program=program,
        result=result,
        expected=result(out),
        share=share,
        has_checksum=has_checksum,
    )


def _preprocess(layout: str, data: Path, out: Path) -> int:
    arguments = ["--dataset", layout, "--num_workers", "1"]
    return preprocess_dataset.main([*arguments, "--data_dir", str(data), "--results_dir", str(out)])


def _train(data: Path, out: Path) -> int:
    arguments = ["--data_dir", str(data), "--log_dir", str(out), "--save_ckpt_path", str(out / "checkpoint.pth")]
    return training.main([*TINY, *arguments])


def preprocessing_result(out: Path) -> str:
    """Returns a digest of a preprocessed folder without the modification times of its files."""
    index = read_index(out / INDEX_NAME)
    records = {case: record.to_json() for case, record in index.cases.items()}
    timeless = [
        {field: value for field, value in record.items() if "stamp" not in field} for record in records.values()
    ]
    digest = hashlib.sha256(repr((index.spec, index.split, list(records), timeless)).encode())
    for path in sorted(out.iterdir()):
        digest.update(path.name.encode() + (b"" if path.name == INDEX_NAME else path.read_bytes()))
    return digest.hexdigest()


def training_result(out: Path) -> str:
    """Returns a digest of a trained network, its losses and its scores."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    digest = hashlib.sha256(repr([(line.get("loss"), line.get("per_case")) for line in lines]).encode())
    for name, tensor in checkpoint.load(out / "checkpoint.pth").last.items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def _write_msd(folder: Path, cases: int) -> None:
    """Writes the Decathlon's layout; every other scan is a plain .nii, all masks are gzipped."""
    pairs = []
    for number in range(cases):
        names = [f"imagesTr/scan_{number}{'.nii' if number % 2 else '.nii.gz'}", f"labelsTr/scan_{number}.nii.gz"]
        _write_pair(
            folder / names[0], folder / names[1], seed=number, shape=(12, 13 + number, 14), spacing_mm=(2.0, 1.0, 1.5)
        )
        pairs.append({"image": f"./{names[0]}", "label": f"./{names[1]}"})
    labels = {"0": "background", "1": "kidney", "2": "tumour"}
    content = {"name": "Scans", "modality": {"0": "CT"}, "labels": labels, "training": pairs}
    (folder / "dataset.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def _write_kits19(folder: Path, cases: int) -> None:
    for number in range(cases):
        case = folder / f"case_{number:05d}"
        names = (case / "imaging.nii.gz", case / "segmentation.nii.gz")
        _write_pair(*names, seed=number, shape=(12, 14, 16), spacing_mm=(3.0, 1.5, 2.0))


def _write_pair(
    image: Path, label: Path, seed: int, shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]
) -> None:
    """Writes a noisy scan and its mask with a block of each class; identical for the same arguments."""
    geometry = Geometry(np.diag([*spacing_mm, 1.0]), shape, spacing_mm)
    mask = np.zeros((1, *shape), np.uint8)
    mask[:, 2:6, 2:7, 2:6] = 1
    mask[:, 7:10, 8:11, 9:12] = 2
    scan = np.random.default_rng(seed).normal(300.0 * mask, 10).astype(np.float32)
    for path, array in ((image, scan), (label, mask)):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_nifti(path, Volume(array, geometry))
        os.utime(path, (0, 0))
