"""`--dataset msd`: one task of the Medical Segmentation Decathlon, `imagesTr`, `labelsTr` and `dataset.json`."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.errors import UserError
from data_loading.index import is_safe_case_id
from data_loading.io.scan_discovery import stem
from data_loading.readers.base import (
    RawDataset,
    ReaderOptions,
    apply_options,
    existing,
    make_case,
    map_labels,
    split_by_patient,
)
from data_loading.spec import DatasetSpec


def read_msd(data_dir: Path, options: ReaderOptions) -> RawDataset:
    """Finds the cases that the task's `dataset.json` lists; several modalities become channels.

    Unless the options differ: normalised per scan, kept at its own spacing, split 80/20, scored on whole volumes.

    Raises:
        UserError: `dataset.json` is missing or damaged, lists no cases or paths outside the folder, or files are
            missing.
    """
    index = data_dir / "dataset.json"
    spec, pairs = _read_index(index, data_dir)
    cases = []
    for image, label in sorted(pairs):
        case = stem(Path(image))
        for path in (Path(image), Path(label)):
            if path.is_absolute() or ".." in path.parts or not is_safe_case_id(case):
                raise UserError(f"{index}: {str(path)!r} is outside the data folder")
        cases.append(make_case(case, existing(data_dir / image), existing(data_dir / label)))
    if len({raw.case for raw in cases}) != len(cases):
        raise UserError(f"{index}: lists a case twice")
    split = split_by_patient(cases, options, index)
    spec, cases = map_labels(apply_options(spec, options), cases, options)
    return RawDataset(spec=spec, cases=cases, split=split, drop_empty=bool(options.drop_empty))


def _read_index(index: Path, data_dir: Path) -> tuple[DatasetSpec, list[tuple[str, str]]]:
    """Reads a Decathlon `dataset.json`: the spec, and (image, label) paths relative to the data folder."""
    try:
        if index.exists() and not index.is_file():  # reading a pipe would block
            raise TypeError("a folder, a pipe or a device")
        content = json.loads(index.read_text(encoding="utf-8-sig"))  # some programs begin UTF-8 with a mark
        if nnunet := _nnunet_advice(content):
            raise UserError(f"{index}: {nnunet}")
        classes = {int(value): _string(name) for value, name in content["labels"].items()}
        pairs = [(_string(entry["image"]), _string(entry["label"])) for entry in content["training"]]
        channels = len(content["modality"].values())
        name = _string(content.get("name", data_dir.name)).lower()
    except FileNotFoundError:
        raise UserError(f"--data_dir {data_dir}: no dataset.json in it{_hint(data_dir)}") from None
    # RecursionError: thousands of nested brackets.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index}: not a Decathlon dataset.json ({error!r})") from None
    if sorted(classes) != list(range(len(classes))) or len(classes) < 2:
        raise UserError(f"{index}: labels must be numbered 0, 1, …, found {sorted(classes)}")
    if not channels:
        raise UserError(f"{index}: lists no modality")
    return DatasetSpec(name=name, classes=tuple(classes[value] for value in sorted(classes)), channels=channels), pairs


def _nnunet_advice(content: Any) -> str:
    """Returns what to do with nnU-Net's `dataset.json`, which has other keys; "" for any other."""
    if not isinstance(content, dict) or "channel_names" not in content or "training" in content:
        return ""
    return "nnU-Net's list, which names no cases; use --dataset nnunet"


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a string, found {repr(value)[:40]}")
    return value


def _hint(data_dir: Path) -> str:
    """Returns a suggestion for a folder without `dataset.json`, as the end of an error message."""
    with suppress(OSError):  # a folder without permission
        for child in sorted(path for path in data_dir.glob("*") if path.is_dir()):
            if (child / "dataset.json").exists():
                return f"; did you mean {child}?"
        if (data_dir.resolve().parent / "dataset.json").exists():
            return f"; did you mean {data_dir.resolve().parent}?"
        if next(data_dir.glob("case_*/imaging.nii.gz"), None):
            return "; it has KiTS19's layout, use --dataset kits19"
    return "; give the folder of one Decathlon task"
