"""`--dataset kits19`: MLPerf's data set, `DATA_DIR/case_00000/{imaging,segmentation}.nii.gz`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import UserError
from common.messages import counted
from data_loading.io.file_kinds import kits19_file
from data_loading.io.orientation import orientation_of, reorient, reorientation_to
from data_loading.io.volume import Volume, read_geometry
from data_loading.readers.base import (
    RawCase,
    RawDataset,
    ReaderOptions,
    apply_options,
    make_case,
    map_labels,
    split_by_patient,
)
from data_loading.spec import KITS19, KITS19_ORIENTATION

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
    folders = sorted({*data_dir.glob("case_*"), *(file.parent for file in data_dir.glob("*/imaging.nii*"))})
    labelled = [folder for folder in folders if _is_labelled(folder)]
    pairs = [(folder, *(kits19_file(folder, name) for name in ("imaging", "segmentation"))) for folder in labelled]
    cases: list[RawCase] = [
        Kits19Case(**vars(make_case(folder.name, *files)), reorients=options.orientation is None)
        for folder, *files in pairs
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
    notes = _notes([folder for folder in folders if folder not in labelled])
    return RawDataset(spec=spec, cases=cases, split=split, drop_empty=bool(options.drop_empty), notes=notes)


@dataclass(frozen=True, kw_only=True)
class Kits19Case(RawCase):
    """A case whose axes run as KiTS19's do (slices, rows, columns), also if another program has stored it as x, y, z.

    Attributes:
        reorients: whether to bring the axes into KiTS19's order; otherwise the user has chosen another.
    """

    reorients: bool = True

    def settings(self) -> str:
        return super().settings() + (f" reoriented to {KITS19_ORIENTATION}" if self._is_turned() else "")

    def read(self) -> tuple[Volume, Volume]:
        """Reads the case as `RawCase.read` does, with its axes in KiTS19's order."""
        image, label = super().read()
        found = orientation_of(image.geometry.affine)
        if not self.reorients or found == KITS19_ORIENTATION:
            return image, label
        change = reorientation_to(image.geometry.affine, KITS19_ORIENTATION)
        note = f"its axes run {found}, reoriented to KiTS19's {KITS19_ORIENTATION}"
        return replace(reorient(image, change), notes=(*image.notes, note)), reorient(label, change)

    def _is_turned(self) -> bool:
        with suppress(UserError):  # reading the case reports it
            return self.reorients and orientation_of(read_geometry(self.image).affine) != KITS19_ORIENTATION
        return False


def _notes(others: Sequence[Path]) -> list[str]:
    """Returns lines about the entries case_…, and other folders with a scan, that are not used."""
    numbers = [folder.name.removeprefix("case_") for folder in others]
    unlabelled = [folder.name for folder, number in zip(others, numbers, strict=True) if _has_no_mask(number)]
    unknown = [folder.name for folder in others if folder.name not in unlabelled]
    notes = []
    for names, reason in (
        (unlabelled, f"KiTS19 publishes masks only below case_{LABELLED_CASES:05d}"),
        (unknown, "not a folder named case_ and a number"),
    ):
        if names:
            span = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
            notes.append(f"passed over {counted(len(names), 'case')}, {span}: {reason}")
    return notes


def _has_no_mask(number: str) -> bool:
    return number.isdecimal() and int(number) >= LABELLED_CASES


def _is_labelled(folder: Path) -> bool:
    number = folder.name.removeprefix("case_")
    return folder.is_dir() and number != folder.name and number.isdecimal() and int(number) < LABELLED_CASES


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
