"""The preprocessed folder: `case_x.npy`, `case_y.npy` and `dataset.json`, the only interface to training.

A folder that the MLPerf reference wrote has no `dataset.json`; it opens as well.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from common.errors import UserError
from common.files import replacing
from data_loading.io.orientation import common_orientation
from data_loading.preprocessing import Boxes, Transform, foreground_boxes
from data_loading.spec import KITS19, KITS19_ORIENTATION, DatasetSpec

INDEX_NAME = "dataset.json"
# The index while cases are missing.
PARTIAL_INDEX_NAME = "dataset.partial.json"
# Boxes of a folder that the reference wrote, which has no index.
BOXES_NAME = "foreground_boxes.json"
# Raised when a reader of the older format would go wrong.
INDEX_FORMAT = 1
INDEX_KEYS = {"format", "spec", "split", "split_hash", "made", "cases", "pseudo"}


@dataclass(frozen=True)
class CaseRecord:
    """What `dataset.json` keeps of a case.

    Attributes:
        transform: the way from the scan's grid, None in a folder that the reference wrote.
        boxes: foreground components' boxes per class.
        digests: MD5 of the files "x" and "y" (MLPerf publishes MD5s, so we keep the same).
        source_stamp: size and modification time of the raw files; a changed source is preprocessed again.
        statistics: mean and deviation of the preprocessed image.
        stamps: [bytes, time of the last change in ns] of the files "x" and "y" as preprocessing left them; {} in a
            folder of an earlier version.
        patient: whose scan it is, "" where each case is a patient of its own.
    """

    transform: Transform | None
    boxes: Boxes
    digests: dict[str, str]
    source_stamp: list[list[int]]
    statistics: dict[str, float]
    stamps: dict[str, list[int]] = field(default_factory=dict)
    patient: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "transform": self.transform.to_json() if self.transform else None,
            "boxes": {str(value): boxes for value, boxes in self.boxes.items()},
            "digests": self.digests,
            "source_stamp": self.source_stamp,
            "statistics": self.statistics,
            "stamps": self.stamps,
            "patient": self.patient,
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> CaseRecord:
        return cls(
            Transform.from_json(record["transform"]) if record["transform"] else None,
            {int(value): [tuple(box) for box in boxes] for value, boxes in record["boxes"].items()},
            {str(kind): str(md5) for kind, md5 in record["digests"].items()},
            record["source_stamp"],
            record["statistics"],
            {str(kind): [int(size), int(changed)] for kind, (size, changed) in record.get("stamps", {}).items()},
            str(record.get("patient", "")),
        )


@dataclass(frozen=True)
class Pseudo:
    """Which training cases a network has labelled: the last ones of the subset "train".

    Attributes:
        teacher: SHA-256 of the checkpoint.
        threshold: confidence below which its labels are not taken.
        max_share: of a batch, at most.
    """

    cases: list[str]
    teacher: str
    threshold: float
    max_share: float

    def check(self, split: dict[str, list[str]]) -> None:
        """Raises ValueError where it does not fit the split."""
        if self.cases != split["train"][-len(self.cases) :] or not 0 <= self.max_share <= 1:
            raise ValueError("its pseudo-labelled cases are not the last training cases")


@dataclass(frozen=True)
class DatasetIndex:
    """A preprocessed folder's contents: spec, split by subset name, and a record per case.

    Attributes:
        made: what else its volumes and split follow from: the options of preprocessing, and the cases that it dropped.
    """

    spec: DatasetSpec
    split: dict[str, list[str]]
    cases: dict[str, CaseRecord]
    made: dict[str, Any] = field(default_factory=dict)
    pseudo: Pseudo | None = None

    def to_json(self) -> dict[str, Any]:
        content = {
            "format": INDEX_FORMAT,
            "spec": self.spec.to_json(),
            "split": self.split,
            "split_hash": split_hash(self.split),
            "made": self.made,
            "cases": {case: record.to_json() for case, record in sorted(self.cases.items())},
        }
        content |= {"pseudo": asdict(self.pseudo)} if self.pseudo else {}
        return content | {"digest": _digest(content)}


def _digest(content: dict[str, Any]) -> str:
    """SHA-256 of an index: a flipped digit in it would change a run in silence."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def split_hash(split: Mapping[str, Sequence[str]]) -> str:
    """SHA-256 of a split: of two folders, or a folder and a checkpoint's, whether they keep the same cases apart."""
    return hashlib.sha256(json.dumps({name: sorted(split[name]) for name in sorted(split)}).encode()).hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Writes JSON atomically: a reader, or a run interrupted here, finds the old file or the new one."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_index(path: Path) -> DatasetIndex:
    """Reads a `dataset.json`. Raises UserError when it is damaged or of another format."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("format") != INDEX_FORMAT:
            raise UserError(f"{path}: format {content.get('format')!r}, expected {INDEX_FORMAT}; preprocess again")
        digest = content.pop("digest", None)  # the first version wrote none
        if (digest is not None and digest != _digest(content)) or not content.keys() <= INDEX_KEYS:
            raise UserError(f"{path}: its content is not what preprocess_dataset.py wrote; preprocess again")
        spec = DatasetSpec.from_json(content["spec"])
        split = {str(subset): [str(case) for case in cases] for subset, cases in content["split"].items()}
        cases = {case: CaseRecord.from_json(record) for case, record in content["cases"].items()}
        made = dict(content.get("made", {}))
        pseudo = Pseudo(**content["pseudo"]) if "pseudo" in content else None
        if pseudo:
            pseudo.check(split)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error!r}); preprocess again") from None
    listed = [case for subset in split.values() for case in subset]
    if len(set(listed)) != len(listed) or not set(listed) <= set(cases):
        raise UserError(f"{path}: the split names a case twice or one that is not there; preprocess again")
    if unsafe := [case for case in cases if not is_safe_case_id(case)]:
        raise UserError(f"{path}: {unsafe[0]!r} is not a case id; preprocess again")
    if content.get("split_hash") not in (None, split_hash(split)):
        raise UserError(f"{path}: its split is not the one that preprocess_dataset.py wrote; preprocess again")
    _check_patients(path, split, cases)
    return DatasetIndex(spec, split, cases, made, pseudo)


def _check_patients(path: Path, split: dict[str, list[str]], cases: dict[str, CaseRecord]) -> None:
    """Refuses a split that has a patient on both sides: its scores would be too good."""
    subset_of: dict[str, str] = {}
    for subset, names in split.items():
        for case in names:
            patient = cases[case].patient
            if patient and subset_of.setdefault(patient, subset) != subset:
                raise UserError(
                    f"{path}: patient {patient} is in {subset_of[patient]} and in {subset}; preprocess again"
                )


def is_safe_case_id(case: str) -> bool:
    """A case id becomes part of a file name: it must stay inside the folder."""
    return bool(case) and not case.startswith(".") and not any(sign in case for sign in "/\\\0")


def read_spec_and_split(data_dir: Path, evaluation_ids: Iterable[str]) -> tuple[DatasetSpec, dict[str, list[str]]]:
    """Spec (its orientation found in the cases) and split of a preprocessed folder: no volume is touched.

    Args:
        data_dir: the preprocessed folder.
        evaluation_ids: MLPerf's evaluation ids ("00000", …), for a folder that the reference wrote.

    Raises:
        UserError: not a (completely) preprocessed folder; the message names the one that was meant, where one is near.
    """
    if not data_dir.is_dir():
        raise UserError(f"--data_dir {data_dir}: no such folder")
    if (data_dir / INDEX_NAME).is_file():
        index = read_index(data_dir / INDEX_NAME)
        ways = [record.transform.source for record in index.cases.values() if record.transform]
        return replace(index.spec, orientation=index.spec.orientation or common_orientation(ways)), index.split
    if (data_dir / PARTIAL_INDEX_NAME).is_file():
        raise UserError(f"--data_dir {data_dir}: its preprocessing has not ended; run preprocess_dataset.py again")
    cases = sorted(path.name.removesuffix("_x.npy") for path in data_dir.glob("case_*_x.npy"))
    if not cases:
        raise UserError(f"--data_dir {data_dir}: no preprocessed cases in it{_hint(data_dir)}")
    held_out = {f"case_{case_id}" for case_id in evaluation_ids}
    split = {
        "train": [case for case in cases if case not in held_out],
        "evaluation": [case for case in cases if case in held_out],
    }
    return replace(KITS19, orientation=KITS19_ORIENTATION), split


def pseudo_share(data_dir: Path) -> tuple[int, float]:
    """How many of the training cases, the last ones, are pseudo-labelled, and their largest share of a batch."""
    index = read_index(data_dir / INDEX_NAME) if (data_dir / INDEX_NAME).is_file() else None
    return (len(index.pseudo.cases), index.pseudo.max_share) if index and index.pseudo else (0, 1.0)


def _hint(data_dir: Path) -> str:
    """Which folder was meant, when it lies one level off, or what to run first."""

    def is_preprocessed(folder: Path) -> bool:
        return (folder / INDEX_NAME).is_file() or next(folder.glob("*_x.npy"), None) is not None

    try:
        below = [child for child in sorted(data_dir.iterdir()) if child.is_dir() and is_preprocessed(child)]
        if below:
            return f"; did you mean {below[0]}?"
        if is_preprocessed(data_dir.resolve().parent):
            return f"; did you mean {data_dir.resolve().parent}?"
        if next(data_dir.glob("case_*/imaging.nii.gz"), None) or (data_dir / "imagesTr").is_dir():
            return "; these are raw scans, run preprocess_dataset.py on them first"
    except OSError:
        pass
    return "; run preprocess_dataset.py first and give its --results_dir"


def file_of(data_dir: Path, case: str, kind: str) -> Path:
    """The file of a case: kind "x" is the image, "y" the label."""
    return data_dir / f"{case}_{kind}.npy"


def map_array(path: Path, dtype: type[np.generic]) -> NDArray[Any]:
    """Memory-maps a (C, D, H, W) array: only what is read of it is loaded.

    Raises:
        UserError: missing, damaged, shorter than its header says, or of another type or number of axes.
    """
    try:
        array: NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise UserError(f"{path}: missing; run preprocess_dataset.py again") from None
    except OSError as error:  # not allowed, too many open files, a disk that fails
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # numpy reads the header as Python: a damaged one raises what the tokenizer raises
        raise UserError(f"{path}: damaged ({error}); run preprocess_dataset.py --mode verify, then again") from None
    if array.dtype != dtype or array.ndim != 4:
        raise UserError(f"{path}: expected 4 axes of {np.dtype(dtype)}, found {array.ndim} of {array.dtype}")
    return array


def map_case(data_dir: Path, case: str) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Memory-maps a case's image (C, D, H, W) and label (1, D, H, W). Raises UserError when they do not fit."""
    image = map_array(file_of(data_dir, case, "x"), np.float32)
    label = map_array(file_of(data_dir, case, "y"), np.uint8)
    if image.shape[1:] != label.shape[1:]:
        raise UserError(f"{case}: image {image.shape} and label {label.shape} differ; preprocess the case again")
    return image, label


def read_case(data_dir: Path, case: str) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """A case's whole image (C, D, H, W) and label (1, D, H, W) in memory. Raises UserError as `map_case` does.

    Read, not copied from a map, and no slower: where a file is cut off meanwhile or a disk fails, a map means SIGBUS.
    """
    image, label = map_case(data_dir, case)
    return _read(file_of(data_dir, case, "x"), image), _read(file_of(data_dir, case, "y"), label)


def _read(path: Path, mapped: NDArray[Any]) -> NDArray[Any]:
    whole = None
    with suppress(OSError, ValueError):
        whole = np.load(path, allow_pickle=False)
    if whole is None or (whole.shape, whole.dtype) != (mapped.shape, mapped.dtype):
        raise UserError(f"{path}: vanished or changed while it was read; run preprocess_dataset.py --mode verify")
    return whole


def load_boxes(data_dir: Path, cases: Sequence[str], classes: int) -> list[Boxes]:
    """Every case's foreground boxes, from `dataset.json`.

    In a folder that the reference wrote they are found once (seconds a case) and kept in a file beside the labels;
    those of a label that has changed since are found again. Where the folder cannot be written each run finds them.
    """
    if (data_dir / INDEX_NAME).is_file():
        records = read_index(data_dir / INDEX_NAME).cases
        return [records[case].boxes for case in cases]
    kept = _read_kept_boxes(data_dir / BOXES_NAME)
    stamps = {case: _stamp(file_of(data_dir, case, "y"), classes) for case in cases}
    missing = [case for case in cases if kept.get(case, ([], {}))[0] != stamps[case]]
    for case in tqdm(missing, desc="foreground boxes", unit="case", disable=None):
        label = np.asarray(map_array(file_of(data_dir, case, "y"), np.uint8))
        kept[case] = (stamps[case], foreground_boxes(label, classes))
    if missing:
        with suppress(OSError):  # a read-only folder: the run needs the boxes, not the file
            write_json(data_dir / BOXES_NAME, kept)
    return [kept[case][1] for case in cases]


def _stamp(label: Path, classes: int) -> list[int]:
    """What the boxes of a label depend on; no boxes have the stamp of a missing file."""
    try:
        status = label.stat()
    except OSError:
        return [-1]
    return [status.st_size, status.st_mtime_ns, classes]


def _read_kept_boxes(path: Path) -> dict[str, tuple[list[int], Boxes]]:
    """What an earlier run kept, {} where there is nothing or it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {
            case: (stamp, {int(value): [tuple(box) for box in boxes] for value, boxes in found.items()})
            for case, (stamp, found) in content.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
