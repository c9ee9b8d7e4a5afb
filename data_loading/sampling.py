"""Split and order: which cases train, which evaluate, and in what order every rank meets its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from errors import UserError

# numpy's SeedSequence takes any list of words; these keep the streams of one seed apart.
ORDER_STREAM = 0
SAMPLE_STREAM = 1
SPLIT_STREAM = 2


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


@dataclass(frozen=True)
class Capped:
    """Training cases of which a batch may hold only so many, such as pseudo-labelled ones: the last of all.

    Attributes:
        count: how many there are.
        share: of a batch, at most.
    """

    count: int = 0
    share: float = 1.0

    def batches(self, cases: int, batch_size: int) -> int:
        """Batches in an epoch of so many cases, these included: all others are met once, these where there is room."""
        room = int(self.share * batch_size + 1e-9)
        batches = cases // batch_size
        return batches if room == batch_size else min(batches, (cases - self.count) // (batch_size - room))

    def deal(self, permutation: NDArray[np.int64], batches: int, batch_size: int) -> list[list[int]]:
        """An epoch's batches, these cases spread evenly over them."""
        is_capped = permutation >= len(permutation) - self.count
        others, capped = permutation[~is_capped].tolist(), permutation[is_capped].tolist()
        needed = batches * batch_size - min(len(others), batches * batch_size)
        dealt = []
        for batch in range(batches):
            some = needed * (batch + 1) // batches - needed * batch // batches
            dealt.append([*(capped.pop() for _ in range(some)), *(others.pop() for _ in range(batch_size - some))])
        return dealt


def batches_per_epoch(cases: int, batch_size: int, ranks: int, capped: Capped = Capped()) -> int:
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
class EpochOrder:
    """The seeded order of every epoch, dealt out over the ranks.

    All ranks draw the same permutation of an epoch and take every `ranks`-th case of it: the shards are
    disjoint, and together they are the permutation (less the incomplete last batches).
    """

    cases: int
    batch_size: int
    rank: int
    ranks: int
    seed: int
    capped: Capped = Capped()

    def __len__(self) -> int:
        return batches_per_epoch(self.cases, self.batch_size, self.ranks, self.capped)

    def batches(self, epoch: int) -> list[list[int]]:
        """This rank's batches of case indices in `epoch` (counted from 1)."""
        rng = np.random.default_rng([ORDER_STREAM, self.seed, epoch])
        if self.capped.count:
            dealt = self.capped.deal(rng.permutation(self.cases), len(self) * self.ranks, self.batch_size)
            return dealt[self.rank :: self.ranks]
        used = rng.permutation(self.cases)[: len(self) * self.batch_size * self.ranks]
        mine = used[self.rank :: self.ranks].tolist()
        return [mine[i : i + self.batch_size] for i in range(0, len(mine), self.batch_size)]


def sample_rng(seed: int, epoch: int, case: int) -> np.random.Generator:
    """All randomness of one sample, whichever rank or loader worker makes it."""
    return np.random.default_rng([SAMPLE_STREAM, seed, epoch, case])
