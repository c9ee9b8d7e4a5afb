"""`--eval_ranks`: evaluations on ranks of their own while training goes on; the side that trains and the other one.

After an epoch that is due, every training rank keeps a copy of the weights, rank 0 sends it to the evaluating ranks,
and training goes on. At the end of each later epoch the training ranks ask whether the scores are here, by a broadcast
from rank 0, so that all act on them at the same point. Before the next evaluation, and at the end of the run, they wait
for them: at most one evaluation is under way.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from common.errors import Interrupted
from runtime.checkpoint.writer import PATIENCE_S
from runtime.distributed.roles import POLL_S, Roles, RunEnded
from runtime.distributed.signals import SignalHandler
from runtime.evaluation import Evaluator
from runtime.logging.events import EvaluationStarted, EvaluationStopped, Event, Waiting
from runtime.train_state import PendingEvaluation, TrainState, on_host

# Until then no rank leaves the watchdog, where its silence would be taken for a fault.
EVERYONE_HEARD = "every rank knows that the run has ended"


@dataclass(frozen=True, kw_only=True)
class RemoteEvaluator:
    """The training side: every training rank must call each method, at the same point.

    Attributes:
        cases: number of evaluation cases.
    """

    roles: Roles
    cases: int
    signals: SignalHandler
    emit: Callable[[Event], None]

    def start(self, state: TrainState) -> None:
        """Has the evaluating ranks score the state's weights, which it keeps in `pending`."""
        self.roles.own.broadcast_buffers(state.network)  # as every evaluation does
        state.pending = PendingEvaluation(state.epoch, on_host(state.evaluated_weights))
        self.hand_over(state.pending)

    def hand_over(self, pending: PendingEvaluation) -> None:
        """Sends the weights to the evaluating ranks, which are waiting for them."""
        self.emit(EvaluationStarted(pending.epoch, self.cases, is_concurrent=True))
        if self.roles.link:
            self.roles.link.send_weights(pending.epoch, pending.weights)

    def scores(self, *, wait: bool) -> EvaluationStopped | None:
        """Returns the scores of the evaluation under way, the same on every training rank; None: not yet.

        Args:
            wait: wait for them. The ranks poll, since a collective would time out.

        Raises:
            Interrupted: a signal came while the ranks were waiting.
        """
        while True:
            seen = (self.roles.link.scores(), self.signals.number) if self.roles.link else None
            scores, signal = self.roles.own.broadcast(seen)
            if scores is not None:
                return EvaluationStopped(**json.loads(scores))
            if not wait:
                return None
            if signal:
                raise Interrupted(signal)
            self.emit(Waiting("scores"))
            time.sleep(POLL_S)

    def end_run(self, exit_status: int) -> None:
        """Releases the evaluating ranks; an evaluation under way is abandoned."""
        if self.roles.link:
            self.roles.link.end_run(exit_status, PATIENCE_S)
        self.roles.everyone.wait_for_main(EVERYONE_HEARD, PATIENCE_S)


def evaluate_until_end(roles: Roles, evaluator: Evaluator, emit: Callable[[Event], None]) -> int:
    """The other side: scores the weights that the training ranks send; returns the run's exit status.

    A signal needs no attention here: the watchdogs pass it on to the training ranks, which then end the run.
    """
    assert roles.link is not None
    weights = evaluator.scorer.network.state_dict()
    while (epoch := roles.link.next_epoch(lambda: emit(Waiting("weights to evaluate")))) is not None:
        roles.link.receive_weights(weights)
        try:
            result = evaluator(epoch)
        except RunEnded:
            break
        if roles.own.is_main:
            roles.link.send_scores(json.dumps(asdict(result)))
    status = roles.link.exit_status()
    roles.everyone.wait_for_main(EVERYONE_HEARD, PATIENCE_S)
    return status
