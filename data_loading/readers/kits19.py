"""`--dataset kits19`: MLPerf's data set, `DATA_DIR/case_00000/{imaging,segmentation}.nii.gz`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from common.errors import UserError
from data_loading.readers.base import RawDataset, ReaderOptions, apply_options, make_case, map_labels, split_by_patient
from data_loading.spec import KITS19

# MLPerf's 42 evaluation cases, one five-digit id per line.
EVALUATION_CASES = Path(__file__).resolve().parents[2] / "evaluation_cases.txt"
# KiTS19 publishes masks for 210 patients; later ids have none.
LABELLED_CASES = 210


def read_kits19(data_dir: Path, options: ReaderOptions, evaluation_ids: Sequence[str] | None = None) -> RawDataset:
    """Finds the labelled cases of KiTS19, split by MLPerf's list unless the options give split ratios.

    With any option that changes the data, the spec's name is no longer "kits19", so that no run on it counts as closed.

    Args:
        evaluation_ids: five-digit ids of the evaluation cases; None: MLPerf's list.

    Raises:
        UserError: no cases in the folder, or an image without its mask.
    """
    cases = [
        make_case(folder.name, folder / "imaging.nii.gz", folder / "segmentation.nii.gz")
        for folder in sorted(data_dir.glob("case_*"))
        if _is_labelled(folder)
    ]
    if not cases:
        raise UserError(f"--data_dir {data_dir}: no case_00000 … in it{_hint(data_dir)}")
    spec, cases = map_labels(apply_options(KITS19, options), cases, options)
    if options.split_ratios is not None:
        split = split_by_patient(cases, options, f"--data_dir {data_dir}")
    else:
        listed = EVALUATION_CASES.read_text(encoding="utf-8").split() if evaluation_ids is None else evaluation_ids
        evaluation = {f"case_{number}" for number in listed}
        split = {
            "train": [raw.case for raw in cases if raw.case not in evaluation],
            "evaluation": [raw.case for raw in cases if raw.case in evaluation],
        }
    defaults = vars(ReaderOptions(seed=options.seed, drop_empty=options.drop_empty))
    if changed := [name for name, value in vars(options).items() if value != defaults[name]]:
        spec = replace(spec, name=f"kits19 with other {', '.join(changed)}")
    return RawDataset(spec=spec, cases=cases, split=split, drop_empty=bool(options.drop_empty))


def _is_labelled(folder: Path) -> bool:
    number = folder.name.removeprefix("case_")
    return folder.is_dir() and number.isdecimal() and int(number) < LABELLED_CASES


def _hint(data_dir: Path) -> str:
    """Returns a suggestion for a folder without cases, as the end of an error message."""
    with suppress(OSError):  # a folder without permission
        if (data_dir / "imaging.nii.gz").exists():
            return f"; did you mean its parent {data_dir.resolve().parent}?"
        for child in sorted(path for path in data_dir.iterdir() if path.is_dir()):
            if next(child.glob("case_*"), None):
                return f"; did you mean {child}?"
        if (data_dir / "dataset.json").exists() and (data_dir / "imagesTr").is_dir():
            return "; it has the Decathlon's layout, use --dataset msd"
    return "; give the folder that holds case_00000/imaging.nii.gz and case_00000/segmentation.nii.gz"
