"""When a run evaluates: MLPerf's rule, scaled to the samples of an epoch, or the user's own schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from common.errors import UserError
from common.messages import counted

# MLPerf's schedule counts in samples of KiTS19's training set: an evaluation from epoch 1000 on, every 20.
RULE_SAMPLES = 168
RULE_FIRST_EVALUATION = 1000
RULE_EVALUATION_INTERVAL = 20


@dataclass(frozen=True)
class EvalSchedule:
    """At most `epochs` epochs; evaluates after `first_evaluation` (None: never), then every `interval` epochs."""

    epochs: int
    first_evaluation: int | None
    interval: int

    def evaluates(self, epoch: int) -> bool:
        first = self.first_evaluation
        return first is not None and epoch >= first and (epoch - first) % self.interval == 0

    def check(self, batches: int, ga_steps: int, warmup_steps: int | None) -> None:
        """Refuses a run that would end without a result, before anything is built.

        Args:
            batches: number of micro-batches per rank and epoch.
            warmup_steps: of `--benchmark`; None without it.

        Raises:
            UserError: an epoch without a step, or nothing left to time after the warm-up.
        """
        if batches < ga_steps:
            raise UserError(f"--ga_steps {ga_steps}, but an epoch has {batches} batches: no step would ever be taken")
        iterations = batches - batches % ga_steps
        if warmup_steps is not None and self.epochs * iterations <= warmup_steps:
            raise UserError(
                f"--benchmark: {self.epochs} epoch(s) of {iterations} iterations leave nothing to time after "
                f"--warmup_steps {warmup_steps}; use --epochs {warmup_steps // iterations + 2} or a shorter warm-up"
            )

    def note(self) -> str:
        """Returns a note if no evaluation will take place, which users seldom intend; otherwise ""."""
        if self.first_evaluation is not None and self.first_evaluation <= self.epochs:
            return ""
        when = f"the first is due at epoch {self.first_evaluation}" if self.first_evaluation else "there are no cases"
        return f"no evaluation in {counted(self.epochs, 'epoch')} ({when}); see --start_eval_at and --evaluate_every"

    def blocks(self, start: int) -> Iterator[tuple[int, int]]:
        """Yields the (first, last) epochs up to and including each evaluation, from epoch `start` on."""
        first = start
        for epoch in range(start, self.epochs + 1):
            if self.evaluates(epoch) or epoch == self.epochs:
                yield first, epoch
                first = epoch + 1


def make_schedule(
    epochs: int, samples_per_epoch: int, start_eval_at: int | None = None, evaluate_every: int | None = None
) -> EvalSchedule:
    """Returns the user's schedule; a value that is None follows MLPerf's rule, scaled to the samples per epoch."""
    first = start_eval_at or math.ceil(RULE_FIRST_EVALUATION * RULE_SAMPLES / samples_per_epoch)
    interval = evaluate_every or math.ceil(RULE_EVALUATION_INTERVAL * RULE_SAMPLES / samples_per_epoch)
    return EvalSchedule(epochs, first, interval)
