"""The preprocessed folder: `case_x.npy`, `case_y.npy` and `dataset.json`, the only interface to training.

Folders written by the MLPerf reference, which have no `dataset.json`, open as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from common.progress import track
from data_loading.index import INDEX_NAME, PARTIAL_INDEX_NAME, DatasetIndex, read_index, write_json
from data_loading.io.orientation import common_orientation
from data_loading.preprocessing import Boxes, Shape, as_shape, foreground_boxes
from data_loading.sampler import PseudoLabelCap
from data_loading.spec import KITS19, KITS19_ORIENTATION, DatasetSpec

# Cached foreground boxes of a folder without an index.
BOXES_NAME = "foreground_boxes.json"


def find_index(data_dir: Path) -> DatasetIndex | None:
    """Returns a folder's index; None for a folder that the reference wrote. Raises UserError if it is damaged."""
    return read_index(data_dir / INDEX_NAME) if (data_dir / INDEX_NAME).is_file() else None


def read_spec_and_split(data_dir: Path, evaluation_ids: Iterable[str]) -> tuple[DatasetSpec, dict[str, list[str]]]:
    """Returns a preprocessed folder's spec, with the orientation that its cases share, and its split; opens no volume.

    Args:
        data_dir: the preprocessed folder.
        evaluation_ids: MLPerf's evaluation ids ("00000", …), for a folder that the reference wrote.

    Raises:
        UserError: not a preprocessed folder, or an incomplete one; the message suggests one nearby.
    """
    if not data_dir.is_dir():
        raise UserError(f"--data_dir {data_dir}: no such folder")
    if index := find_index(data_dir):
        sources = [record.transform.source for record in index.cases.values() if record.transform]
        return replace(index.spec, orientation=index.spec.orientation or common_orientation(sources)), index.split
    if (data_dir / PARTIAL_INDEX_NAME).is_file():
        raise UserError(f"--data_dir {data_dir}: preprocessing is incomplete; run preprocess_dataset.py again")
    cases = sorted(path.name.removesuffix("_x.npy") for path in data_dir.glob("case_*_x.npy"))
    if not cases:
        raise UserError(f"--data_dir {data_dir}: no preprocessed cases in it{_hint(data_dir)}")
    held_out = {f"case_{case_id}" for case_id in evaluation_ids}
    split = {
        "train": [case for case in cases if case not in held_out],
        "evaluation": [case for case in cases if case in held_out],
    }
    return replace(KITS19, orientation=KITS19_ORIENTATION), split


def _hint(data_dir: Path) -> str:
    """Suggests a preprocessed folder one level up or down, or what to run first."""

    def is_preprocessed(folder: Path) -> bool:
        return (folder / INDEX_NAME).is_file() or next(folder.glob("*_x.npy"), None) is not None

    with suppress(OSError):
        below = [child for child in sorted(data_dir.iterdir()) if child.is_dir() and is_preprocessed(child)]
        if below:
            return f"; did you mean {below[0]}?"
        if is_preprocessed(data_dir.resolve().parent):
            return f"; did you mean {data_dir.resolve().parent}?"
        if next(data_dir.glob("case_*/imaging.nii.gz"), None) or (data_dir / "imagesTr").is_dir():
            return "; these are raw scans, run preprocess_dataset.py on them first"
    return "; run preprocess_dataset.py first and give its --results_dir"


def pseudo_label_cap(data_dir: Path, split: Mapping[str, Sequence[str]] | None = None) -> PseudoLabelCap:
    """Returns the cap on pseudo-labelled cases that a preprocessed folder sets.

    Args:
        split: the run's, which may leave out cases; None: the folder's.
    """
    index = find_index(data_dir)
    if not index or not index.pseudo_labels:
        return PseudoLabelCap()
    cases = {*index.pseudo_labels.cases}.intersection((split or index.split)["train"])
    return PseudoLabelCap(count=len(cases), max_share=index.pseudo_labels.max_share)


def seen_by_teacher(data_dir: Path, cases: Sequence[str]) -> list[str]:
    """Returns which of these cases the network was trained on that labelled a folder's pseudo-labelled cases."""
    index = find_index(data_dir)
    if not index or not index.pseudo_labels:
        return []
    pseudo = index.pseudo_labels
    trained_on = {*index.split["train"]} - {*pseudo.cases} if pseudo.trained_on is None else {*pseudo.trained_on}
    return sorted(trained_on.intersection(cases))


def case_file(data_dir: Path, case: str, kind: str) -> Path:
    """Returns the path of a case's image, kind "x", or label, kind "y"."""
    return data_dir / f"{case}_{kind}.npy"


def case_files(data_dir: Path, case: str) -> tuple[Path, Path]:
    """Returns the paths of a case's image and label."""
    return case_file(data_dir, case, "x"), case_file(data_dir, case, "y")


def map_array(path: Path, dtype: type[np.generic]) -> NDArray[Any]:
    """Memory-maps a (C, D, H, W) array, so that only the parts that are used are read.

    Raises:
        UserError: missing, damaged, shorter than its header states, or of the wrong type or number of axes.
    """
    try:
        array: NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise UserError(f"{path}: missing; run preprocess_dataset.py again") from None
    except OSError as error:  # no permission, too many open files, a failing disk
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception:  # numpy parses the header as Python: a damaged one may raise anything
        raise UserError(f"{path}: damaged; run preprocess_dataset.py --mode verify, then again") from None
    if array.dtype != dtype or array.ndim != 4:
        raise UserError(f"{path}: expected a 4-D {np.dtype(dtype)} array, found {array.ndim}-D {array.dtype}")
    return array


def map_case(data_dir: Path, case: str) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Memory-maps a case's image (C, D, H, W) and label (1, D, H, W). Raises UserError if their shapes differ."""
    image = map_array(case_file(data_dir, case, "x"), np.float32)
    label = map_array(case_file(data_dir, case, "y"), np.uint8)
    if image.shape[1:] != label.shape[1:]:
        raise UserError(f"{case}: image {image.shape} and label {label.shape} differ; preprocess the case again")
    return image, label


def case_shape(data_dir: Path, case: str) -> Shape:
    """Returns the shape (D, H, W) of a case, from its header."""
    return as_shape(map_array(case_file(data_dir, case, "x"), np.float32).shape[1:])


def read_case(data_dir: Path, case: str) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Reads a case's whole image (C, D, H, W) and label (1, D, H, W) into memory. Raises UserError as `map_case` does.

    Reading takes no longer than copying from a memory map, which ends in SIGBUS if a file is truncated or a disk fails.
    """
    image, label = map_case(data_dir, case)
    return _read(case_file(data_dir, case, "x"), image), _read(case_file(data_dir, case, "y"), label)


def _read(path: Path, mapped: NDArray[Any]) -> NDArray[Any]:
    whole = None
    with suppress(OSError, ValueError):
        whole = np.load(path, allow_pickle=False)
    if whole is None or (whole.shape, whole.dtype) != (mapped.shape, mapped.dtype):
        raise UserError(f"{path}: vanished or changed while it was read; run preprocess_dataset.py --mode verify")
    return whole


def load_boxes(data_dir: Path, cases: Sequence[str], classes: int) -> list[Boxes]:
    """Returns the foreground boxes of each case, from `dataset.json`.

    For a folder that the reference wrote they are computed once (seconds per case) and cached in a file beside the
    labels; those of a label that has changed since are recomputed. In a read-only folder every run recomputes them.
    """
    if index := find_index(data_dir):
        return [index.cases[case].boxes for case in cases]
    cached = _read_cached_boxes(data_dir / BOXES_NAME)
    stamps = {case: _boxes_stamp(case_file(data_dir, case, "y"), classes) for case in cases}
    missing = [case for case in cases if cached.get(case, ([], {}))[0] != stamps[case]]
    for case in track(missing, len(missing), "foreground boxes", "case"):
        label = np.asarray(map_array(case_file(data_dir, case, "y"), np.uint8))
        cached[case] = (stamps[case], foreground_boxes(label, classes))
    if missing:
        with suppress(OSError):  # a read-only folder: the run needs the boxes, not the file
            write_json(data_dir / BOXES_NAME, cached)
    return [cached[case][1] for case in cases]


def _boxes_stamp(label: Path, classes: int) -> list[int]:
    """Returns a stamp that changes with a label's boxes; [-1], which no cached boxes have, for a missing file."""
    try:
        status = label.stat()
    except OSError:
        return [-1]
    return [status.st_size, status.st_mtime_ns, classes]


def _read_cached_boxes(path: Path) -> dict[str, tuple[list[int], Boxes]]:
    """Returns {case: (stamp, boxes)} as cached by an earlier run, {} if the file is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {
            case: (stamp, {int(value): [tuple(box) for box in boxes] for value, boxes in found.items()})
            for case, (stamp, found) in content.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
