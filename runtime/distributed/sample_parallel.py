"""`--ranks_per_sample M`: groups of M ranks that share each training window, which is cut along depth into M slabs.

Consecutive ranks form a group, so that neighbours are on one machine where M divides its ranks. A group draws the
samples of one rank; see `model/slabs.py` for what its ranks exchange.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from common.errors import UserError
from runtime.distributed.world import World


@dataclass(frozen=True)
class SampleGroups:
    """How the ranks of a run are divided into groups.

    Attributes:
        count: number of groups, each of which trains on samples of its own.
        index: this rank's group, from 0.
        ranks: number of ranks in each.
        slab: this rank's place in its group, from 0.
    """

    count: int
    index: int
    ranks: int
    slab: int

    @classmethod
    def divide(cls, rank: int, ranks: int, ranks_per_sample: int) -> SampleGroups:
        """Divides the ranks that train, of which this is number `rank`.

        Raises:
            UserError: they cannot be divided into such groups.
        """
        if ranks % ranks_per_sample:
            raise UserError(
                f"--ranks_per_sample {ranks_per_sample}: the number of ranks that train, {ranks}, must be a multiple "
                f"of it; start {-(-ranks // ranks_per_sample) * ranks_per_sample} of them"
            )
        index, slab = divmod(rank, ranks_per_sample)
        return cls(ranks // ranks_per_sample, index, ranks_per_sample, slab)

    def connect(self, world: World) -> GroupSlabs | None:
        """Returns the connection of this rank's group; None if it is one rank. Every rank must call it."""
        if self.ranks == 1:
            return None
        groups = range(self.count)
        return GroupSlabs(world.split([range(self.ranks * g, self.ranks * (g + 1)) for g in groups]))


@dataclass
class GroupSlabs:
    """The ranks of a group as `model.slabs.Slabs`.

    Attributes:
        world: the group's ranks.
        halo_bytes: sent by this rank in `exchange` so far.
    """

    world: World
    halo_bytes: int = field(default=0, init=False)

    @property
    def count(self) -> int:
        return self.world.size

    def __deepcopy__(self, memo: dict[int, Any]) -> GroupSlabs:
        return self  # the copy of a network is connected with the same ranks

    def gather(self, tensor: Tensor) -> Tensor:
        return self.world.stack(tensor)

    def exchange(self, to_previous: Tensor | None, to_next: Tensor | None) -> tuple[Tensor, Tensor]:
        if to_previous is not None and self.world.rank > 0:
            self.halo_bytes += to_previous.nbytes
        if to_next is not None and self.world.rank < self.world.size - 1:
            self.halo_bytes += to_next.nbytes
        return self.world.exchange(to_previous, to_next)
