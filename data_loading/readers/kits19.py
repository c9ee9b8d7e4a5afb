"""Raw layouts: how a data set lies on disk before preprocessing, and which of its cases are for evaluation.

A reader takes the folder, MLPerf's evaluation ids, the seed, and as keywords the flags of `preprocess_dataset.py` that
mean something for its data set, under the flags' own names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from common.errors import UserError
from data_loading.dataset import is_safe_case_id
from data_loading.readers.base import OWN_SPLIT, RawCase, RawDataset, VolumeFlags, split_of, with_classes, with_flags
from data_loading.spec import KITS19, DatasetSpec

# KiTS19 publishes masks for 210 patients; later ids have none.
LABELLED_KITS19_CASES = 210


def read_kits19(
    data_dir: Path,
    evaluation_ids: Sequence[str],
    seed: int,
    *,
    split: Sequence[float] | None = None,
    labels: Sequence[str] = (),
    drop_empty: bool = False,
    **volumes: Unpack[VolumeFlags],
) -> RawDataset:
    """`DATA_DIR/case_00000/{imaging,segmentation}.nii.gz`; the split is MLPerf's list, unless shares are given.

    Whatever is not MLPerf's has another name than kits19, so that no run on it counts as closed.

    Raises:
        UserError: no such folder, no cases in it, or an image without its mask.
    """
    cases = []
    for folder in sorted(data_dir.glob("case_*")):
        number = folder.name.removeprefix("case_")
        if not folder.is_dir() or not number.isdecimal() or int(number) >= LABELLED_KITS19_CASES:
            continue
        cases.append(_pair(folder.name, folder / "imaging.nii.gz", folder / "segmentation.nii.gz"))
    if not cases:
        raise UserError(f"--data_dir {data_dir}: no case_00000 … in it{_kits19_hint(data_dir)}")
    held_out = {f"case_{case_id}" for case_id in evaluation_ids}
    parts = {
        "train": [raw.case for raw in cases if raw.case not in held_out],
        "evaluation": [raw.case for raw in cases if raw.case in held_out],
    }
    spec = with_flags(KITS19, **volumes)
    if labels:
        spec, cases = with_classes(spec, cases, labels)
    if split is not None:
        parts = split_of(cases, split, seed, f"--data_dir {data_dir}")
    changes = [*volumes, *(["labels"] if labels else []), *(["split"] if split is not None else [])]
    if changes:
        spec = replace(spec, name=f"kits19 with other {', '.join(changes)}")
    return RawDataset(spec, cases, parts, drop_empty)


def _kits19_hint(data_dir: Path) -> str:
    with suppress(OSError):  # a folder that may not be looked into
        if (data_dir / "imaging.nii.gz").exists():
            return f"; did you mean its parent {data_dir.resolve().parent}?"
        for child in sorted(path for path in data_dir.iterdir() if path.is_dir()):
            if next(child.glob("case_*"), None):
                return f"; did you mean {child}?"
        if (data_dir / "dataset.json").exists() and (data_dir / "imagesTr").is_dir():
            return "; it has the Decathlon's layout, use --dataset msd"
    return "; give the folder that holds case_00000/imaging.nii.gz and case_00000/segmentation.nii.gz"


def read_msd(
    data_dir: Path,
    evaluation_ids: Sequence[str],
    seed: int,
    *,
    split: Sequence[float] = OWN_SPLIT,
    labels: Sequence[str] = (),
    drop_empty: bool = False,
    **volumes: Unpack[VolumeFlags],
) -> RawDataset:
    """The Medical Segmentation Decathlon: `imagesTr`, `labelsTr` and a `dataset.json` that lists them.

    Any task; several modalities are channels. Unless the flags say otherwise: normalised per scan, kept at its own
    spacing, split 80/20 by `seed`, scored on whole volumes.

    Raises:
        UserError: no or a damaged `dataset.json`, no cases, files missing, or paths that leave the folder.
    """
    index = data_dir / "dataset.json"
    try:
        if index.exists() and not index.is_file():  # to read a pipe would wait for its other end
            raise TypeError("a folder, a pipe or a device")
        content = json.loads(index.read_text(encoding="utf-8"))
        classes = {int(value): _text(name) for value, name in content["labels"].items()}
        pairs = [(_text(entry["image"]), _text(entry["label"])) for entry in content["training"]]
        modalities = len(content["modality"].values())
        name = _text(content.get("name", data_dir.name)).lower()
    except FileNotFoundError:
        raise UserError(f"--data_dir {data_dir}: no dataset.json in it{_msd_hint(data_dir)}") from None
    # RecursionError: nested by the thousand.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index}: not a Decathlon dataset.json ({error!r})") from None
    if sorted(classes) != list(range(len(classes))) or len(classes) < 2:
        raise UserError(f"{index}: labels must be numbered 0, 1, …, found {sorted(classes)}")
    if not modalities:
        raise UserError(f"{index}: names no modality")
    cases = []
    for image, label in sorted(pairs):
        case = Path(image).name.removesuffix(".gz").removesuffix(".nii")
        for path in (Path(image), Path(label)):
            if path.is_absolute() or ".." in path.parts or not is_safe_case_id(case):
                raise UserError(f"{index}: {str(path)!r} leaves the data folder")
        cases.append(_pair(case, data_dir / image, data_dir / label))
    names = [raw.case for raw in cases]
    if len(set(names)) != len(names):
        raise UserError(f"{index}: lists a case twice")
    parts = split_of(cases, split, seed, str(index))
    own = DatasetSpec(name=name, classes=tuple(classes[value] for value in range(len(classes))), channels=modalities)
    spec = with_flags(own, **volumes)
    if labels:
        spec, cases = with_classes(spec, cases, labels)
    return RawDataset(spec, cases, parts, drop_empty)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{repr(value)[:40]} in place of a text")
    return value


def _msd_hint(data_dir: Path) -> str:
    with suppress(OSError):  # a folder that may not be looked into
        for child in sorted(path for path in data_dir.glob("*") if path.is_dir()):
            if (child / "dataset.json").exists():
                return f"; did you mean {child}?"
        if (data_dir.resolve().parent / "dataset.json").exists():
            return f"; did you mean {data_dir.resolve().parent}?"
        if next(data_dir.glob("case_*/imaging.nii.gz"), None):
            return "; it has KiTS19's layout, use --dataset kits19"
    return "; give the folder of one Decathlon task"


def _pair(case: str, image: Path, label: Path) -> RawCase:
    try:
        is_whole = image.exists() and label.exists()
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise UserError(f"{case}: {image} or its mask cannot be looked up: {error.strerror}") from None
    if not is_whole:
        missing, present = (image, label) if not image.exists() else (label, image)
        what = "mask" if missing is label else "image"
        beside = f" beside {present.name}" if present.exists() else ""
        raise UserError(f"{case}: its {what} {missing} is missing{beside}; fetch it or remove the case")
    return RawCase(case, image, label)


RawReader = Callable[..., RawDataset]
# Extras by name: imported when `--dataset` names them.
RAW_LAYOUTS: dict[str, RawReader | str] = {
    "kits19": read_kits19,
    "msd": read_msd,
    "dicom": "data_loading.readers.dicom:read_dicom",
    "images": "data_loading.readers.images:read_images",
    "nifti": "data_loading.readers.nifti:read_folders",
}
