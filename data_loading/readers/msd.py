"""`--dataset msd`: one task of the Medical Segmentation Decathlon, `imagesTr`, `labelsTr` and `dataset.json`."""

from __future__ import annotations

import json
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from common.errors import UserError
from common.files import normalised
from common.messages import counted
from data_loading.index import is_safe_case_id
from data_loading.io.file_kinds import is_nifti, stem
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

Part = TypeVar("Part", dict[str, Any], list[Any], str)


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
    notes = _unlisted({data_dir / path for pair in pairs for path in pair}, {raw.image.parent for raw in cases})
    return RawDataset(spec=spec, cases=cases, split=split, drop_empty=bool(options.drop_empty), notes=notes)


def _unlisted(listed: Collection[Path], folders: Collection[Path]) -> list[str]:
    """Returns a line about the images that lie beside the listed ones, if there are any."""
    names = {normalised(path.name) for path in listed}
    found: list[Path] = []
    with suppress(OSError):  # a folder whose files may be read but not listed
        found += [path for folder in folders for path in folder.iterdir() if is_nifti(path)]
    others = sorted(path.name for path in found if normalised(path.name) not in names)
    more = ", …" if len(others) > 3 else ""
    what = f"passed over {counted(len(others), 'image')} that dataset.json does not list"
    return [f"{what}: {', '.join(others[:3])}{more}"] if others else []


def _read_index(index: Path, data_dir: Path) -> tuple[DatasetSpec, list[tuple[str, str]]]:
    """Reads a Decathlon `dataset.json`: the spec, and (image, label) paths relative to the data folder."""
    try:
        if index.exists() and not index.is_file():  # reading a pipe would block
            raise TypeError("a folder, a pipe or a device")
        content = json.loads(index.read_text(encoding="utf-8-sig"))  # some programs begin UTF-8 with a mark
        if nnunet := _nnunet_advice(content):
            raise UserError(f"{index}: {nnunet}")
        classes = {_number(value): _string(name) for value, name in _part(content, "labels", dict).items()}
        pairs = [(_part(entry, "image", str), _part(entry, "label", str)) for entry in _part(content, "training", list)]
        channels = len(_part(content, "modality", dict))
        name = _string(content.get("name", data_dir.name)).lower()
    except FileNotFoundError:
        raise UserError(f"--data_dir {data_dir}: no dataset.json in it{_hint(data_dir)}") from None
    except TypeError as error:
        raise UserError(f"{index}: not a Decathlon dataset.json ({error})") from None
    except OSError as error:
        raise UserError(f"{index}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):  # RecursionError: thousands of nested brackets
        raise UserError(f"{index}: not a Decathlon dataset.json (not JSON, or damaged)") from None
    if sorted(classes) != list(range(len(classes))) or len(classes) < 2:
        raise UserError(f"{index}: labels must be numbered 0, 1, …, found {sorted(classes)}")
    if not channels:
        raise UserError(f"{index}: lists no modality")
    return DatasetSpec(name=name, classes=tuple(classes[value] for value in sorted(classes)), channels=channels), pairs


def _nnunet_advice(content: Any) -> str:
    """Returns what to do with nnU-Net's `dataset.json`, which has other keys; "" for any other."""
    if not isinstance(content, dict) or "channel_names" not in content or "modality" in content:
        return ""
    return "nnU-Net's list, which names no cases; use --dataset nnunet"


def _part(content: Any, key: str, kind: type[Part]) -> Part:
    """Returns a part of the list. Raises TypeError, with the reason, if it is missing or of another type."""
    names = {dict: "an object", list: "a list", str: "a string"}
    if not isinstance(content, dict):
        raise TypeError(f"expected an object with {key}, found {repr(content)[:40]}")
    if key not in content:
        raise TypeError(f"it lacks {key}")
    if not isinstance(value := content[key], kind):
        raise TypeError(f"{key}: expected {names[kind]}, found {repr(value)[:40]}")
    return value


def _number(text: str) -> int:
    if not text.isdecimal():
        raise TypeError(f"labels: expected numbers with names, found {text[:40]!r}")
    return int(text)


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
