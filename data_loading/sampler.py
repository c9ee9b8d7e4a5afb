"""The order in which every rank processes its training cases, and each sample's random generator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError

# numpy's SeedSequence takes any list of words; these keep the streams of one seed apart (`split.py` has 2).
ORDER_STREAM = 0
SAMPLE_STREAM = 1


@dataclass(frozen=True, kw_only=True)
class PseudoLabelCap:
    """Limits pseudo-labelled training cases, the last ones of all, to a share of every batch.

    Attributes:
        count: number of these cases.
        max_share: largest share of a batch.
    """

    count: int = 0
    max_share: float = 1.0

    def max_per_batch(self, batch_size: int) -> int:
        return int(self.max_share * batch_size + 1e-9)

    def batches(self, cases: int, batch_size: int) -> int:
        """Returns the number of batches per epoch over all ranks.

        Each manually labelled case is used once, pseudo-labelled ones as often as the cap allows.

        Args:
            cases: number of all cases, pseudo-labelled ones included.
        """
        limit, batches = self.max_per_batch(batch_size), cases // batch_size
        return batches if limit == batch_size else min(batches, (cases - self.count) // (batch_size - limit))

    def mean_per_batch(self, cases: int, batch_size: int) -> Fraction:
        """Returns their mean number per batch: their share of all cases, or the cap if that is lower."""
        return min(Fraction(self.max_per_batch(batch_size)), Fraction(self.count * batch_size, cases))


def batches_per_epoch(cases: int, batch_size: int, ranks: int, pseudo_labels: PseudoLabelCap = PseudoLabelCap()) -> int:
    """Returns the number of batches per rank and epoch; a last round without a batch for every rank is dropped.

    Raises:
        UserError: less than one batch for every rank.
    """
    batches = pseudo_labels.batches(cases, batch_size) // ranks
    if batches == 0 and cases >= batch_size * ranks:
        raise UserError(
            f"too few manually labelled cases ({cases - pseudo_labels.count} beside {pseudo_labels.count} "
            f"pseudo-labelled ones) for {ranks} rank(s) x batch size {batch_size}, where at most a share of "
            f"{pseudo_labels.max_share:g} may be pseudo-labelled; use fewer ranks or a smaller --batch_size"
        )
    if batches == 0:
        ways = [f"at most {cases // batch_size} rank(s)"] if cases >= batch_size else []
        ways += [f"a --batch_size of at most {cases // ranks}"] if cases >= ranks else []
        raise UserError(
            f"too few training cases ({cases}) for {ranks} rank(s) x batch size {batch_size}; "
            f"use {' or '.join(ways) or 'more cases'}"
        )
    return batches


@dataclass(frozen=True, kw_only=True)
class EpochSampler:
    """The seeded order of every epoch, sharded over the ranks without overlap.

    All ranks draw the same permutations of the cases. By default an epoch is one permutation without its incomplete
    last batches, and a rank takes every `ranks`-th sample. With `fixed_batches` or pseudo-labelled cases the
    permutations form an endless stream (the pseudo-labelled cases have a stream of their own), an epoch continues
    where the previous one ended, so that the numbers of uses of two cases in a stream differ by at most one, and a rank
    takes every `ranks`-th batch.

    Attributes:
        cases: number of training cases.
        fixed_batches: batches per rank and epoch; None: one pass over the data.
        pseudo_labels: cap on the last cases, which are pseudo-labelled.
    """

    cases: int
    batch_size: int
    rank: int
    ranks: int
    seed: int
    fixed_batches: int | None = None
    pseudo_labels: PseudoLabelCap = PseudoLabelCap()

    def __len__(self) -> int:
        return self.fixed_batches or batches_per_epoch(self.cases, self.batch_size, self.ranks, self.pseudo_labels)

    def batches(self, epoch: int) -> list[list[tuple[int, int]]]:
        """Returns this rank's batches of `epoch` (from 1): lists of keys (permutation from 1, case index).

        A sample's random draws depend on the whole key, since an epoch may use a case twice.
        """
        if self.fixed_batches or self.pseudo_labels.count:
            numbers = range((epoch - 1) * len(self) * self.ranks, epoch * len(self) * self.ranks)
            return [self._stream_batch(number) for number in numbers[self.rank :: self.ranks]]
        used = self._permutation(self.cases, epoch)[: len(self) * self.batch_size * self.ranks]
        mine = [(epoch, case) for case in used[self.rank :: self.ranks].tolist()]
        return [mine[i : i + self.batch_size] for i in range(0, len(mine), self.batch_size)]

    def _stream_batch(self, number: int) -> list[tuple[int, int]]:
        """Returns the batch of that number, counted from 0 over all epochs and ranks: pseudo-labelled cases first."""
        rate = self.pseudo_labels.mean_per_batch(self.cases, self.batch_size)
        low, high = int(rate * number), int(rate * (number + 1))
        others = self.cases - self.pseudo_labels.count
        size = self.batch_size
        return [
            *((turn, others + case) for turn, case in self._stream(range(low, high), self.pseudo_labels.count, 1)),
            *self._stream(range(size * number - low, size * (number + 1) - high), others),
        ]

    def _stream(self, positions: range, cases: int, *stream: int) -> Iterator[tuple[int, int]]:
        """Yields the keys at these positions of an endless stream of permutations."""
        for position in positions:
            turn = position // cases + 1
            yield turn, int(self._permutation(cases, turn, *stream)[position % cases])

    def _permutation(self, cases: int, number: int, *stream: int) -> NDArray[np.int64]:
        return _permutation(cases, (ORDER_STREAM, self.seed, number, *stream))


@lru_cache(maxsize=8)
def _permutation(cases: int, seed: tuple[int, ...]) -> NDArray[np.int64]:
    """Draws a permutation; cached, since a batch's samples mostly come from the same one."""
    return np.random.default_rng(seed).permutation(cases)


def sample_rng(seed: int, permutation: int, case: int) -> np.random.Generator:
    """Returns the generator of all randomness of one sample, whichever rank or loader worker makes it."""
    return np.random.default_rng([SAMPLE_STREAM, seed, permutation, case])
