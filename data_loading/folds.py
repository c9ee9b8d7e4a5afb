"""`--folds`: cross-validation over a preprocessed folder's cases, with nnU-Net's own folds and its `splits_final.json`.

Folds are made of the labelled cases of "train" and "evaluation", when a run starts; the folder stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.messages import counted, note
from data_loading.dataset import find_index
from data_loading.index import write_json

# nnU-Net's seed of its folds: with it the same cases are held out as in its published results.
NNUNET_SEED = 12345
SPLITS_NAME = "splits_final.json"


@dataclass(frozen=True)
class Fold:
    """The training and the validation cases of one fold, each sorted."""

    train: tuple[str, ...]
    val: tuple[str, ...]

    def to_json(self) -> dict[str, list[str]]:
        return {"train": list(self.train), "val": list(self.val)}

    @classmethod
    def from_json(cls, record: Any) -> Fold:
        """Reads a fold. Raises ValueError, TypeError or KeyError for anything else."""
        parts = [record["train"], record["val"]]
        if not all(isinstance(part, list) and all(isinstance(case, str) for case in part) for part in parts):
            raise TypeError("a fold holds two lists of case ids")
        train, val = (tuple(sorted(part)) for part in parts)
        if repeated := [case for case in {*train, *val} if (train + val).count(case) > 1]:
            raise ValueError(f"lists {min(repeated)} twice in one fold")
        return cls(train, val)


@dataclass(frozen=True, kw_only=True)
class LabelledCases:
    """The cases of a preprocessed folder that folds are made of.

    Attributes:
        split: the folder's own.
        patients: the patient of each case.
        pseudo_labelled: training cases that a network labelled; no fold validates on them.
        only_training: folds are made of the training cases alone.
    """

    split: Mapping[str, Sequence[str]]
    patients: Mapping[str, str]
    pseudo_labelled: frozenset[str]
    only_training: bool

    @classmethod
    def find(cls, data_dir: Path, split: Mapping[str, Sequence[str]], only_training: bool) -> LabelledCases:
        """Reads the index of a folder with this split.

        A pseudo-labelled case with the same image as another is that one's patient.
        """
        index = find_index(data_dir)
        records = index.cases if index else {}
        pseudo_labelled = frozenset(index.pseudo_labels.cases if index and index.pseudo_labels else ())
        cases = [case for part in split.values() for case in part]
        patients = {case: (records[case].patient if case in records else "") or case for case in cases}
        originals = {records[case].digests.get("x"): case for case in cases if case in records.keys() - pseudo_labelled}
        for case in pseudo_labelled.intersection(cases):
            if (digest := records[case].digests.get("x")) and digest in originals:
                patients[case] = patients[originals[digest]]
        return cls(split=split, patients=patients, pseudo_labelled=pseudo_labelled, only_training=only_training)

    def available(self) -> list[str]:
        """Returns the cases that folds divide."""
        cases = [*self.split["train"], *(() if self.only_training else self.split["evaluation"])]
        return sorted(case for case in cases if case not in self.pseudo_labelled)

    def with_fold(self, fold: Fold) -> dict[str, list[str]]:
        """Returns the split of a run on this fold.

        Pseudo-labelled cases of other patients train in every fold. Evaluation cases that are in neither part of the
        fold stay held back, as "test" cases.
        """
        validated = {self.patients[case] for case in fold.val}
        added = [
            case
            for case in self.split["train"]
            if case in self.pseudo_labelled and self.patients[case] not in validated
        ]
        used = {*fold.train, *fold.val}
        held_back = [*self.split.get("test", ()), *(case for case in self.split["evaluation"] if case not in used)]
        split = {"train": [*fold.train, *added], "evaluation": list(fold.val)}
        return split | ({"test": held_back} if held_back else {})

    def check(self, fold: Fold, source: str, remedy: str) -> None:
        """Raises UserError if a fold names other cases than these, or a patient in both of its parts.

        Args:
            source: where the fold comes from, for the message.
            remedy: what to do, for the message.
        """
        held_back = {*self.split.get("test", ()), *self.pseudo_labelled}
        for case in (*fold.train, *fold.val):
            if case in held_back:
                kind = "pseudo-labelled" if case in self.pseudo_labelled else "a test case of --data_dir"
                raise UserError(f"{source} names {case}, which is {kind}; {remedy}")
            if case not in self.patients:
                raise UserError(f"{source} names {case}, which --data_dir does not have; {remedy}")
        if both := {self.patients[case] for case in fold.train} & {self.patients[case] for case in fold.val}:
            raise UserError(f"{source}: patient {min(both)} is in its training and in its validation part; {remedy}")


def make_folds(patients: Mapping[str, str], count: int) -> list[Fold]:
    """Divides cases into folds as nnU-Net does, by patient.

    nnU-Net calls scikit-learn's `KFold(count, shuffle=True, random_state=12345)` on the sorted case ids: the shuffled
    ids are cut into pieces, of which the first ones are larger by one where the division leaves a remainder. Where
    each case is a patient of its own, these are its folds; cases of one patient stay together.

    Args:
        patients: the patient of each case.

    Raises:
        UserError: fewer patients than folds.
    """
    ordered = sorted(set(patients.values()))
    if len(ordered) < count:
        what = counted(len(ordered), "patient" if len(ordered) < len(patients) else "case")
        raise UserError(f"--folds {count}: there are only {what} to divide; use fewer folds")
    indices = np.arange(len(ordered))
    np.random.RandomState(NNUNET_SEED).shuffle(indices)  # the generator of scikit-learn
    cases = sorted(patients)
    folds = []
    for piece in np.array_split(indices, count):
        held_out = {ordered[index] for index in piece}
        train = tuple(case for case in cases if patients[case] not in held_out)
        folds.append(Fold(train, tuple(case for case in cases if patients[case] in held_out)))
    return folds


def find_folds(labelled: LabelledCases, count: int, file: Path | None) -> list[Fold]:
    """Returns the folds of a folder's cases: those of a file, or else `count` of nnU-Net's.

    Raises:
        UserError: the file is damaged or names other cases, or there are too few cases.
    """
    available = labelled.available()
    if file is None:
        return make_folds({case: labelled.patients[case] for case in available}, count)
    folds = read_splits(file)
    for number, fold in enumerate(folds):
        labelled.check(fold, f"--splits {file}: fold {number}", "correct the file, or preprocess the cases it names")
    return folds


def note_unused(labelled: LabelledCases, fold: Fold) -> None:
    """Notes training cases of the folder that are in neither part of a fold, as a file may leave them out."""
    unused = [case for case in labelled.available() if case not in {*fold.train, *fold.val}]
    if unused := [case for case in unused if case in labelled.split["train"]]:
        note(f"{counted(len(unused), 'training case')} of --data_dir in neither part of the fold: {unused[0]}, …")


def read_splits(path: Path) -> list[Fold]:
    """Reads nnU-Net's `splits_final.json`, a list of {"train": [case, …], "val": [case, …]}.

    Raises:
        UserError: missing, or not such a file.
    """
    try:
        folds = [Fold.from_json(record) for record in json.loads(path.read_text(encoding="utf-8-sig"))]
    except OSError as error:
        raise UserError(f"--splits {path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(
            f'--splits {path}: {error}; expected a list of {{"train": […], "val": […]}}, as in nnU-Net\'s {SPLITS_NAME}'
        ) from None
    if not folds or not all(fold.train and fold.val for fold in folds):
        raise UserError(f"--splits {path}: a fold is empty, or there is none")
    return folds


def write_splits(folder: Path, folds: Sequence[Fold]) -> None:
    """Writes `splits_final.json`, atomically: other ranks may be reading it."""
    write_json(folder / SPLITS_NAME, [fold.to_json() for fold in folds])
