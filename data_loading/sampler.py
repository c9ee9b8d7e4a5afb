"""Split and order: which cases train, which evaluate, and in what order every rank meets its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError

# numpy's SeedSequence takes any list of words; these keep the streams of one seed apart.
ORDER_STREAM = 0
SAMPLE_STREAM = 1
SPLIT_STREAM = 2
SUBSETS = ("train", "evaluation", "test")
# Shares are decimal numbers, which floats are not.
SHARE_TOLERANCE = 1e-9


def split_cases(cases: Sequence[str], evaluation_share: float, seed: int) -> tuple[list[str], list[str]]:
    """A seeded split into (training, evaluation), each sorted; at least one case in both.

    Raises:
        UserError: fewer than two cases.
    """
    if len(cases) < 2:
        raise UserError(f"a split needs at least 2 cases, found {len(cases)}")
    ordered = sorted(cases)
    held_out = min(max(round(len(ordered) * evaluation_share), 1), len(ordered) - 1)
    permutation = np.random.default_rng([SPLIT_STREAM, seed]).permutation(len(ordered))
    evaluation = {ordered[i] for i in permutation[:held_out]}
    return [case for case in ordered if case not in evaluation], sorted(evaluation)


def split_patients(patients: Mapping[str, str], shares: Sequence[float], seed: int) -> dict[str, list[str]]:
    """A seeded split by patient into "train", "evaluation" and, of three shares, "test"; cases sorted.

    Of two shares the evaluation's is rounded to the nearest number of patients, at least one on either side, as
    `split_cases` does. Of three each held-out part is rounded down and the rest trains: 128 patients at 0.6, 0.2 and
    0.2 are 78, 25 and 25. A share of 0 has no patients.

    Args:
        patients: whose each case is.

    Raises:
        UserError: shares that are no shares, or too few patients for a part.
    """
    if len(shares) not in (2, 3) or not min(shares) >= 0 or not abs(sum(shares) - 1) <= SHARE_TOLERANCE:
        told = " ".join(f"{share:g}" for share in shares)
        raise UserError(
            f"--split_ratios {told}: give two or three shares that add up to 1, such as 0.8 0.2 or 0.6 0.2 0.2"
        )
    ordered = sorted(set(patients.values()))
    if len(ordered) < 2 <= sum(share > 0 for share in shares):
        whose = ", all of one patient" if len(patients) > len(ordered) else ""
        raise UserError(
            f"a split needs at least 2 cases, found {len(patients)}{whose}; --split_ratios 1 0 trains on all"
        )
    if len(shares) == 2:
        held_out = split_cases(ordered, shares[1], seed)[1] if min(shares) > 0 else ordered if shares[1] else []
        counts = [len(held_out)]
    else:
        counts = [int(len(ordered) * share + SHARE_TOLERANCE) for share in shares[1:]]
        counts[-1] = len(ordered) - counts[0] if shares[0] == 0 else counts[-1]
    counts = [len(ordered) - sum(counts), *counts]
    for part, share, count in zip(SUBSETS, shares, counts, strict=False):
        if share > 0 and count == 0:
            raise UserError(
                f"--split_ratios: {len(ordered)} patient(s) leave none for {part} at a share of {share:g}; give "
                "other shares (0 leaves a part out)"
            )
    permutation = np.random.default_rng([SPLIT_STREAM, seed]).permutation(len(ordered))
    # The first of the permutation are evaluation's, as in `split_cases`, then come test's.
    ends = np.cumsum([*counts[1:], counts[0]])
    parts = dict(zip((*SUBSETS[1 : len(shares)], SUBSETS[0]), np.split(permutation, ends[:-1]), strict=True))
    part_of = {ordered[i]: part for part, members in parts.items() for i in members}
    return {
        part: sorted(case for case, patient in patients.items() if part_of[patient] == part)
        for part in SUBSETS[: len(shares)]
    }


@dataclass(frozen=True)
class PseudoLabelCap:
    """Training cases of which a batch may hold only so many, such as pseudo-labelled ones: the last of all.

    Attributes:
        count: how many there are.
        share: of a batch, at most.
    """

    count: int = 0
    share: float = 1.0

    def room(self, batch_size: int) -> int:
        """How many of them a batch may hold."""
        return int(self.share * batch_size + 1e-9)

    def batches(self, cases: int, batch_size: int) -> int:
        """Batches in an epoch of so many cases, these included: all others are met once, these where there is room."""
        room, batches = self.room(batch_size), cases // batch_size
        return batches if room == batch_size else min(batches, (cases - self.count) // (batch_size - room))

    def rate(self, cases: int, batch_size: int) -> Fraction:
        """How many of them come with a batch, in the long run: as many as they are among all, or the room for them."""
        return min(Fraction(self.room(batch_size)), Fraction(self.count * batch_size, cases))


def batches_per_epoch(cases: int, batch_size: int, ranks: int, capped: PseudoLabelCap = PseudoLabelCap()) -> int:
    """Batches that every rank gets in an epoch; the last incomplete round of batches is dropped.

    Raises:
        UserError: not one batch for every rank.
    """
    batches = capped.batches(cases, batch_size) // ranks
    if batches == 0 and cases >= batch_size * ranks:
        raise UserError(
            f"{cases - capped.count} training cases and {capped.count} pseudo-labelled ones, of which a batch may hold "
            f"a share of {capped.share:g}, do not give {ranks} rank(s) one batch of {batch_size} each; use less"
        )
    if batches == 0:
        ways = [f"at most {cases // batch_size} rank(s)"] if cases >= batch_size else []
        ways += [f"a --batch_size of at most {cases // ranks}"] if cases >= ranks else []
        raise UserError(
            f"{cases} training cases do not give {ranks} rank(s) one batch of {batch_size} each; "
            f"use {' or '.join(ways) or 'more cases'}"
        )
    return batches


@dataclass(frozen=True)
class EpochSampler:
    """The seeded order of every epoch, dealt out over the ranks.

    All ranks draw the same permutations of the cases. An epoch is one of its own, less the incomplete last batches, of
    which every rank takes every `ranks`-th sample. With `steps` or capped cases the permutations are an endless row
    (of the capped cases another), and an epoch goes on where the one before it ended, so that of any two cases one is
    at most one sample ahead; every rank takes every `ranks`-th batch. The ranks' samples are disjoint.

    Attributes:
        steps: batches of a rank in an epoch; None: as many as meet each case once.
        capped: the last cases of all, of which a batch may hold only a share.
    """

    cases: int
    batch_size: int
    rank: int
    ranks: int
    seed: int
    steps: int | None = None
    capped: PseudoLabelCap = PseudoLabelCap()

    def __len__(self) -> int:
        return self.steps or batches_per_epoch(self.cases, self.batch_size, self.ranks, self.capped)

    def batches(self, epoch: int) -> list[list[tuple[int, int]]]:
        """This rank's batches in `epoch` (counted from 1): a sample is (permutation counted from 1, case index).

        The pair, and not the case alone, is what a sample's own draws follow from: an epoch may meet a case twice.
        """
        if self.steps or self.capped.count:
            numbers = range((epoch - 1) * len(self) * self.ranks, epoch * len(self) * self.ranks)
            return [self._of_streams(number) for number in numbers[self.rank :: self.ranks]]
        used = self._permutation(self.cases, epoch)[: len(self) * self.batch_size * self.ranks]
        mine = [(epoch, case) for case in used[self.rank :: self.ranks].tolist()]
        return [mine[i : i + self.batch_size] for i in range(0, len(mine), self.batch_size)]

    def _of_streams(self, number: int) -> list[tuple[int, int]]:
        """The batch of that number, of all epochs and ranks, counted from 0: some of the capped cases, then others."""
        rate = self.capped.rate(self.cases, self.batch_size)
        low, high = int(rate * number), int(rate * (number + 1))
        others = self.cases - self.capped.count
        size = self.batch_size
        return [
            *((turn, others + case) for turn, case in self._stream(range(low, high), self.capped.count, 1)),
            *self._stream(range(size * number - low, size * (number + 1) - high), others),
        ]

    def _stream(self, places: range, cases: int, *stream: int) -> Iterator[tuple[int, int]]:
        """What stands at these places of an endless row of permutations."""
        for place in places:
            turn = place // cases + 1
            yield turn, int(self._permutation(cases, turn, *stream)[place % cases])

    def _permutation(self, cases: int, number: int, *stream: int) -> NDArray[np.int64]:
        return _permutation(cases, (ORDER_STREAM, self.seed, number, *stream))


@lru_cache(maxsize=8)
def _permutation(cases: int, seed: tuple[int, ...]) -> NDArray[np.int64]:
    """Kept: a batch's samples are mostly of one permutation."""
    return np.random.default_rng(seed).permutation(cases)


def sample_rng(seed: int, permutation: int, case: int) -> np.random.Generator:
    """All randomness of one sample of `EpochSampler`, whichever rank or loader worker makes it."""
    return np.random.default_rng([SAMPLE_STREAM, seed, permutation, case])
