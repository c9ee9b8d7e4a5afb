"""Cross-validation: the runs of several folds as one table over all cases, each scored by the run that held it out."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.files import replacing
from common.messages import counted
from data_loading.folds import SPLITS_NAME, Fold, read_splits
from data_loading.split import excluded_ids
from report.records import Evaluation, Run

TABLE_NAME = "folds.csv"
# Cases that one message names.
NAMED_CASES = 3


@dataclass(frozen=True, kw_only=True)
class JoinedFolds:
    """The scores of all cases, from one evaluation of each run.

    Attributes:
        folds: number of runs with such an evaluation.
        classes: names of the foreground classes.
        dice: Dice per foreground class, by case.
        run_of: the name of the run that scored a case.
        problems: a line for cases that several runs scored, and one for those that none did.
    """

    folds: int
    classes: list[str]
    dice: dict[str, list[float]]
    run_of: dict[str, str]
    problems: list[str]

    @property
    def class_dice(self) -> list[float]:
        """The mean over all cases of each class."""
        return [sum(column) / len(self.dice) for column in zip(*self.dice.values(), strict=True)]

    @property
    def mean_dice(self) -> float:
        return sum(self.class_dice) / len(self.classes)

    def describe(self) -> str:
        """Returns the result as a phrase."""
        classes = ", ".join(f"{name} {dice:.4f}" for name, dice in zip(self.classes, self.class_dice, strict=True))
        cases, folds = counted(len(self.dice), "case"), counted(self.folds, "fold")
        return f"{cases} of {folds}, mean Dice {self.mean_dice:.4f} ({classes})"


def are_folds(runs: Sequence[Run]) -> bool:
    """Returns whether each run trained on a fold of the same cases, as far as their folders state it."""
    if any(run.config.get("fold") is None or run.classes != runs[0].classes for run in runs):
        return False
    splits = [folds for run in runs if (folds := _splits(run))]
    return all(folds == splits[0] for folds in splits)


def join_folds(runs: Sequence[Run], names: Sequence[str], *, last: bool = False) -> JoinedFolds | None:
    """Joins the best or the last evaluations of the runs; None if no run was evaluated.

    A case that several runs scored counts once, with the score of the first of them.
    """
    dice: dict[str, list[float]] = {}
    run_of: dict[str, str] = {}
    repeated: list[str] = []
    evaluations = [(name, found) for run, name in zip(runs, names, strict=True) if (found := _evaluation(run, last))]
    for name, evaluation in evaluations:
        for case, scores in evaluation.per_case.items():
            if case in dice:
                repeated.append(f"{case} by {run_of[case]} and {name}")
            else:
                dice[case], run_of[case] = scores, name
    if not dice:
        return None
    problems = []
    if repeated:
        cases = counted(len(repeated), "case")
        problems.append(f"{cases} scored by several runs, of which the first counts: {_some(repeated)}")
    if missing := sorted(_held_out_cases(runs) - dice.keys()):
        problems.append(f"{counted(len(missing), 'case')} scored by none of these runs: {_some(missing)}")
    classes = runs[0].class_names(len(next(iter(dice.values()))))
    return JoinedFolds(folds=len(evaluations), classes=classes, dice=dice, run_of=run_of, problems=problems)


def _evaluation(run: Run, last: bool) -> Evaluation | None:
    return run.evaluations[max(run.evaluations)] if last and run.evaluations else run.best


def _held_out_cases(runs: Sequence[Run]) -> set[str]:
    """Returns the cases that the folds of these runs hold out one after another, as far as their folders state it."""
    cases: set[str] = set()
    for run in runs:
        held_out = {case for fold in _splits(run) for case in fold.val}
        cases |= held_out - excluded_ids(run.config.get("exclude", ()), held_out)
    return cases


def _splits(run: Run) -> list[Fold]:
    """Returns all folds that a run was one of; [] if its folder was copied without them."""
    with suppress(UserError):
        return read_splits(run.folder / SPLITS_NAME)
    return []


def _some(entries: Sequence[str]) -> str:
    return ", ".join(entries[:NAMED_CASES]) + (", …" if len(entries) > NAMED_CASES else "")


def write_folds(folder: Path, joined: JoinedFolds) -> Path:
    """Writes each case's scores, the worst first, to FOLDER/folds.csv; returns its path."""
    path = folder / TABLE_NAME
    rows = sorted((sum(dice) / len(dice), case, dice) for case, dice in joined.dice.items())
    try:
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(["case", "run", "mean_dice", *(f"{name}_dice" for name in joined.classes)])
            for mean, case, dice in rows:
                writer.writerow([case, joined.run_of[case], *(f"{value:.6g}" for value in (mean, *dice))])
    except OSError as error:
        raise UserError(f"--log_dir {folder}: {TABLE_NAME} cannot be written: {error.strerror or error}") from None
    return path
