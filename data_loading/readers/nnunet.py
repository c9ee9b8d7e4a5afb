"""`--dataset nnunet`: nnU-Net's raw layout, `imagesTr/CASE_0000.nii.gz`, `labelsTr/CASE.nii.gz` and its `dataset.json`.

preprocess_dataset.py --dataset nnunet --data_dir nnUNet_raw/Dataset004_Hippocampus --results_dir OUT
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.messages import counted
from data_loading.io.channel_files import by_case, read_channel_files
from data_loading.io.file_kinds import is_nifti, passed_over, stem
from data_loading.io.orientation import to_grid
from data_loading.io.volume import Volume, read_nifti
from data_loading.readers.base import (
    RawCase,
    RawDataset,
    ReaderOptions,
    apply_options,
    map_labels,
    split_by_patient,
)
from data_loading.spec import DatasetSpec

ENDINGS = (".nii.gz", ".nii")
# Not a class: the label of voxels without one.
IGNORE_NAME = "ignore"


@dataclass(frozen=True, kw_only=True)
class ChannelsCase(RawCase):
    """A case whose channels are files of their own; `image` is the first.

    Attributes:
        channels: the files, channel by channel.
    """

    channels: tuple[Path, ...]

    def files(self) -> list[list[Path]]:
        return [list(self.channels), [self.label]]

    def read(self) -> tuple[Volume, Volume]:
        """Reads the case as `RawCase.read` does."""
        image = read_channel_files(self.channels, self.case)
        label = read_nifti(self.label, self.mask_type())
        return image, self.to_classes(to_grid(label, image.geometry, self.case))


@dataclass(frozen=True, kw_only=True)
class RawIndex:
    """nnU-Net's `dataset.json`.

    Attributes:
        spec: classes and channels.
        ignore_label: value of the label "ignore", if there is one.
        ending: of the files' names, such as .nii.gz.
        cases: number of training cases, as the file states it; None if it does not.
    """

    spec: DatasetSpec
    ignore_label: int | None
    ending: str
    cases: int | None


def read_nnunet(data_dir: Path, options: ReaderOptions) -> RawDataset:
    """Finds the cases of `labelsTr` with their channels in `imagesTr`; unless options differ, as `read_msd`.

    Raises:
        UserError: `dataset.json` is missing, damaged or has region-based labels, or files are missing.
    """
    index = read_raw_index(data_dir)
    images, labels = (_files(data_dir / name, index.ending) for name in ("imagesTr", "labelsTr"))
    masks = {stem(path): path for path in labels}
    channels = by_case(images)
    if not masks:
        raise UserError(f"{data_dir / 'labelsTr'}: no mask CASE{index.ending} in it{_others(data_dir / 'labelsTr')}")
    if without := sorted(channels.keys() - masks.keys()):
        more = f" (and {len(without) - 1} more)" if len(without) > 1 else ""
        raise UserError(f"{data_dir}: labelsTr has no {without[0]}{index.ending}, but imagesTr has its scan{more}")
    numbers = list(range(index.spec.channels))
    cases = []
    for case in sorted(masks):
        found = channels.get(case, {})
        if sorted(found) != numbers:
            wanted = ", ".join(f"{case}_{number:04d}{index.ending}" for number in numbers)
            held = ", ".join(found[number].name for number in sorted(found)) or "none of them"
            raise UserError(f"{data_dir / 'imagesTr'}: channel_names of dataset.json want {wanted}, found {held}")
        files = tuple(found[number] for number in numbers)
        cases.append(ChannelsCase(case=case, image=files[0], label=masks[case], channels=files))
    used = [path for parts in channels.values() for path in parts.values()]
    notes = [passed_over(data_dir / "imagesTr", used, f"{data_dir / 'imagesTr'}: passed over ")]
    if index.cases not in (None, len(cases)):
        notes.append(f"{data_dir}: dataset.json has numTraining {index.cases}, found {counted(len(cases), 'case')}")
    split = split_by_patient(cases, options, data_dir)
    if options.ignore_label is None:
        options = replace(options, ignore_label=index.ignore_label)
    spec, mapped = map_labels(apply_options(index.spec, options), cases, options)
    return RawDataset(
        spec=spec, cases=mapped, split=split, drop_empty=bool(options.drop_empty), notes=[*filter(None, notes)]
    )


def _files(folder: Path, ending: str) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; --dataset nnunet needs imagesTr, labelsTr and dataset.json")
    return [path for path in sorted(folder.iterdir()) if is_nifti(path) and path.name.endswith(ending)]


def _others(folder: Path) -> str:
    return passed_over(folder, [], "; it holds ")


def read_raw_index(data_dir: Path) -> RawIndex:
    """Reads nnU-Net's `dataset.json`. Raises UserError if it is missing, damaged, or asks for what does not exist."""
    path = data_dir / "dataset.json"
    try:
        if path.exists() and not path.is_file():  # reading a pipe would block
            raise TypeError("a folder, a pipe or a device")
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        if "channel_names" not in content and "modality" in content:
            raise UserError(f"{path}: the Decathlon's list, or that of nnU-Net's first version; use --dataset msd")
        if "dataset" in content:
            raise UserError(f"{path}: names its files under 'dataset', which is not read; put them in imagesTr")
        ending = content.get("file_ending", ENDINGS[0])
        if ending not in ENDINGS:
            raise UserError(f"{path}: file_ending {ending!r}; only {' and '.join(ENDINGS)} are read")
        labels = dict(content["labels"])
        ignore_label = int(labels.pop(IGNORE_NAME)) if IGNORE_NAME in labels else None
        classes = _read_classes(path, labels)
        channels = len(content["channel_names"].values())
        cases = int(content["numTraining"]) if "numTraining" in content else None
    except FileNotFoundError:
        raise UserError(
            f"--data_dir {data_dir}: no dataset.json in it; give the folder of one nnU-Net data set"
        ) from None
    # RecursionError: thousands of nested brackets.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not nnU-Net's dataset.json ({error!r})") from None
    if not channels:
        raise UserError(f"{path}: channel_names is empty")
    name = str(content.get("name", data_dir.resolve().name)).lower()
    spec = DatasetSpec(name=name, classes=classes, channels=channels)
    return RawIndex(spec=spec, ignore_label=ignore_label, ending=ending, cases=cases)


def _read_classes(path: Path, labels: dict[str, Any]) -> tuple[str, ...]:
    """Returns the class names of `labels`, {name: value}."""
    for name, value in labels.items():
        if isinstance(value, list):
            raise UserError(
                f"{path}: label {name!r} is a region, a list of values, which may overlap others; here each voxel has "
                "one class: give every value a name of its own"
            )
    values = {int(value): str(name) for name, value in labels.items()}
    if len(values) < len(labels) or sorted(values) != list(range(len(values))) or len(values) < 2:
        raise UserError(f"{path}: labels must be numbered 0, 1, …, found {sorted(map(int, labels.values()))}")
    return tuple(values[value] for value in sorted(values))
