"""When an evaluation is due, and what follows from its scores: the best weights, a checkpoint, the end of the run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.errors import DIVERGED_EXIT
from runtime.logging.events import EvaluationStopped
from runtime.remote_evaluation import RemoteEvaluator
from runtime.train_state import Stop, TrainState, first_stop, on_host, other_weights

if TYPE_CHECKING:
    from runtime.training import TrainLoop

# Below this mean Dice the network predicts nothing at all: MLPerf's reference calls the run diverged.
DIVERGED_DICE = 1e-6


def evaluate_if_due(state: TrainState, loop: TrainLoop) -> Stop | None:
    """Scores the evaluation cases if the schedule asks for it; returns why the run must end, or None.

    With `--eval_ranks` it only starts the evaluation, once that before it is done.
    """
    started = state.pending.epoch if state.pending else state.evaluated
    if not loop.schedule.evaluates(state.epoch) or started >= state.epoch:
        return None
    if not isinstance(loop.evaluate, RemoteEvaluator):
        with state.evaluating():
            result = loop.evaluate(state.epoch)
        return act_on_scores(state, loop, result)
    stop = take_scores(state, loop, wait=True)
    if not stop:
        loop.evaluate.start(state)
    return stop


def take_scores(state: TrainState, loop: TrainLoop, *, wait: bool = False) -> Stop | None:
    """Acts on the scores of the evaluation under way on other ranks once they are here.

    Args:
        wait: wait for them.
    """
    if state.pending is None or not isinstance(loop.evaluate, RemoteEvaluator):
        return None
    result = loop.evaluate.scores(wait=wait)
    if result is None:
        return None
    weights, state.pending = state.pending.weights, None
    return act_on_scores(state, loop, result, weights)


def return_to_evaluated(state: TrainState) -> None:
    """Gives a state that training has damaged the weights under evaluation, without momentum, to be saved."""
    if state.pending is None:
        return
    state.network.load_state_dict(state.pending.weights)
    if state.average:
        state.average.load(state.pending.weights)
    state.optimizer.state.clear()
    if state.scaler.is_enabled():  # its scale may have shrunk to nothing, with which a resumed run would fail at once
        state.scaler.load_state_dict(torch.amp.GradScaler("cpu").state_dict())
    state.epoch, state.batch, state.loss_sum, state.gradient_norm = state.pending.epoch, 0, None, None


def resume_evaluation(state: TrainState, loop: TrainLoop) -> Stop | None:
    """Repeats the evaluation that was under way on other ranks when the checkpoint was saved, if there was one."""
    pending = state.pending
    if pending is None:
        return None
    if isinstance(loop.evaluate, RemoteEvaluator):
        loop.evaluate.hand_over(pending)
        return None
    with other_weights(state.network, pending.weights):
        result = loop.evaluate(pending.epoch)
    state.pending = None
    return act_on_scores(state, loop, result, pending.weights)


def act_on_scores(
    state: TrainState, loop: TrainLoop, result: EvaluationStopped, weights: dict[str, Tensor] | None = None
) -> Stop | None:
    """Reports an evaluation, keeps the best weights, and returns why the run must end, or None.

    Args:
        weights: those evaluated, on the host; None: the state's.
    """
    state.evaluated, state.scored = result.epoch, state.evaluated_weights if weights is None else weights
    loop.emit(result)
    stop = stop_for_score(result, loop, best_before=state.best_dice)
    is_best = keep_if_best(state, result)
    loop.learning_rate.on_evaluation_end(result)
    requested = first_stop(callback.on_evaluation_end(result, state) for callback in loop.callbacks)
    stop, state.scored = stop or requested, None
    if is_best and not (stop and stop.exit_status == DIVERGED_EXIT):
        loop.checkpoints.save(state)
    return stop


def stop_for_score(result: EvaluationStopped, loop: TrainLoop, best_before: float) -> Stop | None:
    """Returns success at the target, aborted if the score has fallen to zero or is NaN, otherwise None."""
    dice = result.mean_dice
    if dice >= loop.quality_threshold:
        return Stop("success", f"mean Dice {dice:.4f} reached {loop.quality_threshold}")
    had_begun = best_before >= DIVERGED_DICE or result.epoch >= loop.first_rule_evaluation
    if not math.isfinite(dice) or (dice < DIVERGED_DICE and had_begun):
        return Stop("aborted", f"diverged: mean Dice {dice}", DIVERGED_EXIT)
    return None


def keep_if_best(state: TrainState, result: EvaluationStopped) -> bool:
    """Keeps the scored weights on the host if their mean Dice is the highest so far; returns whether it is."""
    if not result.mean_dice > state.best_dice:
        return False
    state.best_dice, state.best_epoch = result.mean_dice, result.epoch
    state.best_network = on_host(state.scored_weights)
    return True
