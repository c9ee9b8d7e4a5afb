"""Seeded splits of cases into training, evaluation and test sets, by patient."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from common.errors import UserError
from common.messages import counted

SUBSETS = ("train", "evaluation", "test")
# Separates the split's random stream from those of `sampler.py`, which use the same seed.
SPLIT_STREAM = 2
# Ratios are decimal numbers, which floats represent inexactly.
TOLERANCE = 1e-9


def split_cases(cases: Sequence[str], evaluation_ratio: float, seed: int) -> tuple[list[str], list[str]]:
    """Splits cases into (training, evaluation), each sorted, with at least one case in both.

    Raises:
        UserError: fewer than two cases.
    """
    if len(cases) < 2:
        raise UserError(f"a split needs at least 2 cases, found {len(cases)}")
    ordered = sorted(cases)
    held_out = min(max(round(len(ordered) * evaluation_ratio), 1), len(ordered) - 1)
    evaluation = {ordered[i] for i in _permutation(len(ordered), seed)[:held_out]}
    return [case for case in ordered if case not in evaluation], sorted(evaluation)


def split_patients(patients: Mapping[str, str], ratios: Sequence[float], seed: int) -> dict[str, list[str]]:
    """Splits cases by patient into "train", "evaluation" and, with three ratios, "test"; cases are sorted.

    With two ratios the number of evaluation patients is rounded to nearest, with at least one in each part, as
    in `split_cases`. With three, both held-out parts are rounded down and all others train: 128 patients at 0.6, 0.2
    and 0.2 become 78, 25 and 25. A part with ratio 0 has no patients.

    Args:
        patients: the patient of each case.

    Raises:
        UserError: ratios that do not add up to 1, or too few patients for a part.
    """
    if len(ratios) not in (2, 3) or not min(ratios) >= 0 or not abs(sum(ratios) - 1) <= TOLERANCE:
        given = " ".join(f"{ratio:g}" for ratio in ratios)
        raise UserError(
            f"--split_ratios {given}: give two or three ratios that add up to 1, such as 0.8 0.2 or 0.6 0.2 0.2"
        )
    ordered = sorted(set(patients.values()))
    if len(ordered) < 2 <= sum(ratio > 0 for ratio in ratios):
        found = f"{len(patients)}{', all of one patient' if len(patients) > len(ordered) else ''}"
        raise UserError(f"a split needs at least 2 cases, found {found}; --split_ratios 1 0 trains on all")
    counts = _count_held_out(ordered, ratios, seed)
    counts = [len(ordered) - sum(counts), *counts]
    for part, ratio, count in zip(SUBSETS, ratios, counts, strict=False):
        if ratio > 0 and count == 0:
            raise UserError(
                f"--split_ratios: a ratio of {ratio:g} leaves none of {counted(len(ordered), 'patient')} for {part}; "
                "give other ratios (0 omits a part)"
            )
    # The permutation begins with evaluation, as in `split_cases`, then come test and train.
    ends = np.cumsum([*counts[1:], counts[0]])
    members = np.split(_permutation(len(ordered), seed), ends[:-1])
    parts = dict(zip((*SUBSETS[1 : len(ratios)], SUBSETS[0]), members, strict=True))
    part_of = {ordered[i]: part for part, indices in parts.items() for i in indices}
    return {
        part: sorted(case for case, patient in patients.items() if part_of[patient] == part)
        for part in SUBSETS[: len(ratios)]
    }


def leave_out(split: Mapping[str, Sequence[str]], excluded: Sequence[str]) -> dict[str, list[str]]:
    """Returns the split without the excluded cases.

    Args:
        excluded: case ids, or numbers of KiTS19's: 23 is case_00023.

    Raises:
        UserError: no such case, or no training case would be left.
    """
    known = sorted(case for cases in split.values() for case in cases)
    ids = excluded_ids(excluded, known)
    if unknown := sorted(ids.difference(known)):
        listed = f"{known[0]} to {known[-1]}" if known else "no cases"
        raise UserError(f"--exclude {' '.join(excluded)}: there is no {unknown[0]}; the data set has {listed}")
    left = {subset: [case for case in cases if case not in ids] for subset, cases in split.items()}
    if ids and not left["train"]:
        raise UserError(f"--exclude {' '.join(excluded)}: no training case is left")
    return left


def excluded_ids(excluded: Iterable[str], known: Collection[str]) -> set[str]:
    """Returns the case ids that `--exclude` names; a number that is no id stands for one of KiTS19's."""
    return {f"case_{int(case):05d}" if case.isdecimal() and case not in known else case for case in excluded}


def _count_held_out(patients: Sequence[str], ratios: Sequence[float], seed: int) -> list[int]:
    """Returns the number of evaluation patients and, with three ratios, of test patients."""
    if len(ratios) == 2:
        if min(ratios) > 0:
            return [len(split_cases(patients, ratios[1], seed)[1])]
        return [len(patients) if ratios[1] else 0]
    evaluation, test = (int(len(patients) * ratio + TOLERANCE) for ratio in ratios[1:])
    return [evaluation, test if ratios[0] else len(patients) - evaluation]


def _permutation(cases: int, seed: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.random.default_rng([SPLIT_STREAM, seed]).permutation(cases)
