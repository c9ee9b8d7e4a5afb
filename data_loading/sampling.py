"""Split and order: which cases train, which evaluate, and in what order every rank meets its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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


def batches_per_epoch(cases: int, batch_size: int, ranks: int) -> int:
    """Batches that every rank gets in an epoch; the last incomplete round of batches is dropped.

    Raises:
        UserError: not one batch for every rank.
    """
    batches = cases // (batch_size * ranks)
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

    def __len__(self) -> int:
        return batches_per_epoch(self.cases, self.batch_size, self.ranks)

    def batches(self, epoch: int) -> list[list[int]]:
        """This rank's batches of case indices in `epoch` (counted from 1)."""
        rng = np.random.default_rng([ORDER_STREAM, self.seed, epoch])
        used = rng.permutation(self.cases)[: len(self) * self.batch_size * self.ranks]
        mine = used[self.rank :: self.ranks].tolist()
        return [mine[i : i + self.batch_size] for i in range(0, len(mine), self.batch_size)]


def sample_rng(seed: int, epoch: int, case: int) -> np.random.Generator:
    """All randomness of one sample, whichever rank or loader worker makes it."""
    return np.random.default_rng([SAMPLE_STREAM, seed, epoch, case])
