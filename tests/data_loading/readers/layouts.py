"""Helpers for the tests of KiTS19's and the Decathlon's readers."""

from __future__ import annotations

from pathlib import Path

from data_loading.readers.base import RawDataset


def touch_kits19(folder: Path, *numbers: int | str) -> Path:
    for number in numbers:
        case = folder / (f"case_{number:05d}" if isinstance(number, int) else f"case_{number}")
        case.mkdir(parents=True)
        (case / "imaging.nii.gz").touch()
        (case / "segmentation.nii.gz").touch()
    return folder


def case_ids(raw: RawDataset) -> list[str]:
    return [case.case for case in raw.cases]
