"""`dataset.json`: what preprocessing records about a data set and each of its cases."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.files import replacing
from data_loading.preprocessing import Boxes, GridTransform
from data_loading.spec import DatasetSpec, with_current_keys

INDEX_NAME = "dataset.json"
# The index while cases are missing.
PARTIAL_INDEX_NAME = "dataset.partial.json"
# Increased when an older reader would misread the format.
INDEX_FORMAT = 1
INDEX_KEYS = {"format", "spec", "split", "split_hash", "provenance", "cases", "pseudo_labels"}


@dataclass(frozen=True, kw_only=True)
class CaseRecord:
    """A case's record in `dataset.json`.

    Attributes:
        transform: from the scan's grid to the network's; None for a folder that the reference wrote.
        boxes: boxes of foreground components per class.
        digests: MD5 of the files "x" and "y" (MLPerf publishes MD5s).
        source_stamp: size and modification time of the raw files; a changed source is preprocessed again.
        statistics: "mean" and "std" of the preprocessed image.
        stamps: [bytes, modification time in ns] of the files "x" and "y" as preprocessing left them; {} in a folder
            written by an earlier version.
        patient: patient id, "" if every case is a patient of its own.
        voxels: number of voxels of each class, the background's first, in the mask on its scan's grid; () in a folder
            written by an earlier version.
        notes: what the user should know about the case, one line each.
    """

    transform: GridTransform | None
    boxes: Boxes
    digests: dict[str, str]
    source_stamp: list[list[int]]
    statistics: dict[str, float]
    stamps: dict[str, list[int]] = field(default_factory=dict)
    patient: str = ""
    voxels: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "transform": self.transform.to_json() if self.transform else None,
            "boxes": {str(value): boxes for value, boxes in self.boxes.items()},
            "digests": self.digests,
            "source_stamp": self.source_stamp,
            "statistics": self.statistics,
            "stamps": self.stamps,
            "patient": self.patient,
            "voxels": list(self.voxels),
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> CaseRecord:
        """Reads a record. Raises ValueError, TypeError or KeyError for anything else."""
        result = cls(
            transform=GridTransform.from_json(record["transform"]) if record["transform"] else None,
            boxes={int(value): [tuple(box) for box in boxes] for value, boxes in record["boxes"].items()},
            digests={str(kind): str(md5) for kind, md5 in record["digests"].items()},
            source_stamp=record["source_stamp"],
            statistics=with_current_keys(record["statistics"]),
            stamps={str(kind): [int(size), int(changed)] for kind, (size, changed) in record.get("stamps", {}).items()},
            patient=str(record.get("patient", "")),
            voxels=tuple(int(count) for count in record.get("voxels", ())),
            notes=tuple(str(line) for line in record.get("notes", ())),
        )
        result.check_sizes()
        return result

    def check_sizes(self) -> None:
        """Raises ValueError if the case has more voxels than its file, or boxes lie outside of it."""
        if self.transform is None:
            return
        shape = self.transform.shape
        if "x" in self.stamps and math.prod(shape) * np.dtype(np.float32).itemsize > self.stamps["x"][0]:
            raise ValueError(f"{shape} is larger than its file")
        for box in (box for boxes in self.boxes.values() for box in boxes):
            if not all(0 <= low < high <= n for low, high, n in zip(box[:3], box[3:], shape, strict=True)):
                raise ValueError(f"box {box} is not within {shape}")


@dataclass(frozen=True, kw_only=True)
class PseudoLabels:
    """The training cases that were labelled by a network: the last ones of "train".

    Attributes:
        teacher: SHA-256 of the network's checkpoint.
        threshold: labels below this confidence were discarded.
        max_share: largest share of a batch.
        trained_on: cases of the folder that the network was trained on; None: its other training cases.
    """

    cases: list[str]
    teacher: str
    threshold: float
    max_share: float
    trained_on: list[str] | None = None

    def check(self, split: dict[str, list[str]]) -> None:
        """Raises ValueError if it contradicts the split."""
        if self.cases != split["train"][-len(self.cases) :] or not 0 <= self.max_share <= 1:
            raise ValueError("its pseudo-labelled cases are not the last training cases")


@dataclass(frozen=True, kw_only=True)
class DatasetIndex:
    """Contents of `dataset.json`: the spec, case ids by subset, and a record per case.

    Attributes:
        provenance: the options of preprocessing, and the cases that it dropped.
    """

    spec: DatasetSpec
    split: dict[str, list[str]]
    cases: dict[str, CaseRecord]
    provenance: dict[str, Any] = field(default_factory=dict)
    pseudo_labels: PseudoLabels | None = None

    def to_json(self) -> dict[str, Any]:
        content = {
            "format": INDEX_FORMAT,
            "spec": self.spec.to_json(),
            "split": self.split,
            "split_hash": split_hash(self.split),
            "provenance": self.provenance,
            "cases": {case: record.to_json() for case, record in sorted(self.cases.items())},
        }
        content |= {"pseudo_labels": asdict(self.pseudo_labels)} if self.pseudo_labels else {}
        return content | {"digest": _digest(content)}


def _digest(content: dict[str, Any]) -> str:
    """Returns the SHA-256 of an index: a flipped digit in it would silently change a run."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def split_hash(split: Mapping[str, Sequence[str]]) -> str:
    """Returns the SHA-256 of a split: equal hashes mean that two folders or checkpoints hold out the same cases."""
    return hashlib.sha256(json.dumps({name: sorted(split[name]) for name in sorted(split)}).encode()).hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Writes JSON atomically: a reader, or an interrupted run, finds the old file or the new one."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_index(path: Path) -> DatasetIndex:
    """Reads a `dataset.json`. Raises UserError if it is damaged or has another format."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))  # some editors begin UTF-8 with a mark
        if content.get("format") != INDEX_FORMAT:
            raise UserError(f"{path}: format {content.get('format')!r}, expected {INDEX_FORMAT}; preprocess again")
        digest = content.pop("digest", None)  # the first version wrote none
        is_intact = digest in (None, _digest(content))
        content = with_current_keys(content)
        if not is_intact or not content.keys() <= INDEX_KEYS:
            raise UserError(f"{path}: content differs from what preprocess_dataset.py wrote; preprocess again")
        index = DatasetIndex(
            spec=DatasetSpec.from_json(content["spec"]),
            split={str(subset): [str(case) for case in cases] for subset, cases in content["split"].items()},
            cases={case: CaseRecord.from_json(record) for case, record in content["cases"].items()},
            provenance=dict(content.get("provenance", {})),
            pseudo_labels=PseudoLabels(**content["pseudo_labels"]) if "pseudo_labels" in content else None,
        )
        if index.pseudo_labels:
            index.pseudo_labels.check(index.split)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise UserError(f"{path}: damaged, or written by another program; preprocess again") from None
    listed = [case for subset in index.split.values() for case in subset]
    if len(set(listed)) != len(listed) or not set(listed) <= set(index.cases):
        raise UserError(f"{path}: the split lists a case twice or one that does not exist; preprocess again")
    if unsafe := [case for case in index.cases if not is_safe_case_id(case)]:
        raise UserError(f"{path}: {unsafe[0]!r} is not a case id; preprocess again")
    if content.get("split_hash") not in (None, split_hash(index.split)):
        raise UserError(f"{path}: the split differs from what preprocess_dataset.py wrote; preprocess again")
    _check_patients(path, index)
    return index


def _check_patients(path: Path, index: DatasetIndex) -> None:
    """Raises UserError for a patient in two subsets, which would inflate the scores."""
    subset_of: dict[str, str] = {}
    for subset, cases in index.split.items():
        for case in cases:
            patient = index.cases[case].patient
            if patient and subset_of.setdefault(patient, subset) != subset:
                raise UserError(
                    f"{path}: patient {patient} is in {subset_of[patient]} and in {subset}; preprocess again"
                )


def is_safe_case_id(case: str) -> bool:
    """Returns whether a file name made from the case id stays inside the folder."""
    return bool(case) and not case.startswith(".") and not any(character in case for character in "/\\\0")
