"""`--eval_ranks`: which ranks train, which only evaluate, and how weights and scores pass between the two.

The weights go from training rank 0 to the evaluating ranks by broadcasts. Everything else goes through the key-value
store, where neither side waits for the other in a collective, which would time out: hours may pass between evaluations.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common.errors import UserError
from runtime.distributed.world import KeyValueStore, World

# Interval at which a rank that waits for the other side polls the store.
POLL_S = 0.05
# The same during an evaluation, to learn that the run has ended.
CHECK_S = 0.5


class RunEnded(Exception):  # noqa: N818 - not an error
    """The run ended while an evaluation was under way."""


@dataclass(frozen=True, kw_only=True)
class Roles:
    """What the ranks of a run do: the first `training` ones train; those after them, if any, only evaluate.

    Attributes:
        everyone: all ranks of the run.
        own: the ranks that do the same as this one, with the run's store.
        training: number of ranks that train.
        link: joins training rank 0 to the evaluating ranks; None on the other training ranks and if all ranks train.
    """

    everyone: World
    own: World
    training: int
    link: EvaluationLink | None = None

    @property
    def has_evaluators(self) -> bool:
        """Whether some ranks only evaluate."""
        return self.training < self.everyone.size

    @property
    def is_evaluator(self) -> bool:
        """Whether this rank only evaluates."""
        return self.everyone.rank >= self.training

    @property
    def peers(self) -> range:
        """The ranks that do the same as this one, as ranks of `everyone`."""
        return range(self.training, self.everyone.size) if self.is_evaluator else range(self.training)


def assign_roles(world: World, eval_ranks: int) -> Roles:
    """Makes the last `eval_ranks` ranks evaluate. Every rank must call it.

    Raises:
        UserError: no rank is left to train.
    """
    training = world.size - eval_ranks
    if training < 1:
        given = f"--eval_ranks {eval_ranks}, but the run has {world.size} rank(s), and at least one must train"
        raise UserError(f"{given}; start {eval_ranks + 1} or more, as with torchrun --nproc_per_node")
    if not eval_ranks or world.store is None:
        return Roles(everyone=world, own=world, training=world.size)
    evaluating = range(training, world.size)
    own = replace(world.split([range(training), evaluating]), store=world.store)
    between = world.split([[0, *evaluating]])
    is_linked = world.rank in (0, *evaluating)
    link = EvaluationLink(between, world.store) if is_linked else None
    return Roles(everyone=world, own=own, training=training, link=link)


class EvaluationLink:
    """One end of the connection between training rank 0 and the evaluating ranks; numbers the evaluations of a run.

    Args:
        world: training rank 0, then the evaluating ranks.
        store: shared by all ranks of the run.
    """

    def __init__(self, world: World, store: KeyValueStore) -> None:
        self._world = world
        self._store = store
        self._number = 0
        self._checked_at = 0.0

    # Training rank 0

    def send_weights(self, epoch: int, weights: dict[str, Tensor]) -> None:
        """Hands the weights of an epoch, in the order of a state dict, to the evaluating ranks."""
        self._number += 1
        self._store.set(f"evaluation {self._number}", str(epoch))
        self._world.broadcast_tensors(tensor.to(self._world.device) for tensor in weights.values())

    def scores(self) -> str | None:
        """Returns the scores of the weights sent last once they have arrived; None before."""
        return self._store.get(f"scores {self._number}")

    def end_run(self, exit_status: int, patience_s: float) -> None:
        """Announces the run's exit status to the evaluating ranks; waits until they have it, at most `patience_s`."""
        self._store.set("ended", str(exit_status))
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline and any(
            self._store.get(f"read by {rank}") is None for rank in range(1, self._world.size)
        ):
            time.sleep(POLL_S)

    # The evaluating ranks

    def next_epoch(self, while_waiting: Callable[[], None]) -> int | None:
        """Waits for the next evaluation, however long; returns its epoch, or None once the run has ended."""
        self._number += 1
        while (epoch := self._store.get(f"evaluation {self._number}")) is None:
            if self._store.get("ended") is not None:
                return None
            while_waiting()
            time.sleep(POLL_S)
        return int(epoch)

    def receive_weights(self, weights: dict[str, Tensor]) -> None:
        """Sets a state dict's tensors to the weights sent: must follow `next_epoch` on every evaluating rank."""
        received = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in weights.values()]
        self._world.broadcast_tensors(received)
        with torch.no_grad():
            for own, tensor in zip(weights.values(), received, strict=True):
                own.copy_(tensor)

    def send_scores(self, text: str) -> None:
        """Returns the scores of the weights received last to the training ranks."""
        self._store.set(f"scores {self._number}", text)

    def check(self) -> None:
        """Raises RunEnded once the run has ended; looks at most every `CHECK_S`."""
        now = time.monotonic()
        if now - self._checked_at > CHECK_S:
            self._checked_at = now
            if self._store.get("ended") is not None:
                raise RunEnded

    def exit_status(self) -> int:
        """Returns the run's exit status, and acknowledges it, once the run has ended."""
        self._store.set(f"read by {self._world.rank}", "yes")
        return int(self._store.get("ended") or 0)
