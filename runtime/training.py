"""The training loop: `train` is a run's epochs, `train_epoch` one epoch, `finish_step` what follows a step's numbers.

A run ends by a returned `Stop`; every rank returns the same one. The host waits for the device once per epoch, when the
mean loss is read; a step's numbers have arrived by the time they are read.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from common.compat import is_dataloader_worker_error, is_unused_parameter_error, loss_scale
from common.errors import DIVERGED_EXIT, RANK_LOST_EXIT, Interrupted, UserError, exit_status_of
from data_loading.base_loader import Batch, TrainingLoader
from data_loading.pytorch_loader import lost_worker_message
from model.deep_supervision import Outputs
from runtime.callbacks.base import Callback
from runtime.checkpoint.writer import CheckpointWriter
from runtime.distributed.step_sync import StepSync
from runtime.distributed.world import World, without_communication
from runtime.eval_schedule import EvalSchedule
from runtime.logging.events import (
    BlockStarted,
    BlockStopped,
    EpochStarted,
    EpochStopped,
    EvaluationStopped,
    Event,
    MicroBatchEnd,
    PhaseEnd,
    RunStopped,
    StepEnd,
)
from runtime.lr_schedule import LRSchedule
from runtime.memory_format import MEMORY_FORMATS
from runtime.objective import Objective, plain
from runtime.precision import Precision
from runtime.remote_evaluation import RemoteEvaluator
from runtime.scores import evaluate_if_due, resume_evaluation, return_to_evaluated, take_scores
from runtime.seeding import seed_step
from runtime.train_state import Stop, TrainState, first_stop, stop_at_signal, target_not_reached

# Ranks named in the one line that reports a divergence.
NAMED_RANKS = 4


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """How the loss of a micro-batch is computed.

    Attributes:
        ga_steps: micro-batches accumulated into one optimizer step.
        layout: "NCDHW" or "NDHWC", the memory order of the images.
        seed: this rank's seed, for random numbers of the network (dropout) and the objective (mixup).
        max_grad_norm: largest norm of a step's gradients; None: any.
    """

    loss: nn.Module
    precision: Precision
    ga_steps: int
    layout: str
    seed: int = 0
    objective: Objective = plain
    max_grad_norm: float | None = None


@dataclass(frozen=True, kw_only=True)
class TrainLoop:
    """The parts of a run that the loop drives; what they change is in `TrainState`.

    Attributes:
        evaluate: scores the evaluation cases after an epoch; every rank must call it. With `--eval_ranks`, what has
            other ranks do so while training goes on.
        emit: reports an event to the trackers.
        quality_threshold: mean Dice that ends the run with success.
        ranks_per_sample: number of ranks that share each sample.
        first_rule_evaluation: the first epoch with an evaluation under MLPerf's rule. Before it, a score of zero may
            only mean that the network has not found anything yet.
    """

    loader: TrainingLoader
    schedule: EvalSchedule
    learning_rate: LRSchedule
    step: StepConfig
    evaluate: Callable[[int], EvaluationStopped] | RemoteEvaluator
    callbacks: Sequence[Callback]
    checkpoints: CheckpointWriter
    step_sync: StepSync
    world: World
    emit: Callable[[Event], None]
    quality_threshold: float
    ranks_per_sample: int = 1
    first_rule_evaluation: int = 1


def train(state: TrainState, loop: TrainLoop) -> Stop:
    """Trains from the given state until the schedule ends or something stops the run; closes the log in any case.

    Raises:
        UserError: a worker process of the loader died.
    """
    started = time.perf_counter()

    def close_log(stop: Stop) -> Stop:
        seconds = time.perf_counter() - started
        loop.emit(
            RunStopped(
                status=stop.status, reason=stop.reason, epoch=state.epoch, seconds=seconds, exit_status=stop.exit_status
            )
        )
        return stop

    try:
        return close_log(run_blocks(state, loop))
    except Interrupted as signalled:  # raised inside an evaluation, which no rank can finish without the others
        return close_log(stop_at_signal(signalled))
    except BaseException as error:
        if isinstance(error, RuntimeError) and loop.world.lost_another(error):
            close_log(Stop("aborted", "another rank was lost", RANK_LOST_EXIT))
            raise
        cause = _user_error(error) or error
        # A loader worker's error carries that process's traceback; the cause is its last line.
        last_line = " ".join(str(cause).splitlines()[-1:])
        close_log(Stop("aborted", f"{type(cause).__name__}: {last_line}", exit_status_of(cause)))
        if cause is not error:
            raise cause from error
        raise


def _user_error(error: BaseException) -> UserError | None:
    """Returns what the user can do about an error for which torch has no type of its own."""
    if not isinstance(error, RuntimeError):
        return None
    if is_dataloader_worker_error(error):
        return UserError(lost_worker_message(error, "computing a step"))
    if is_unused_parameter_error(error):
        return UserError(
            "the network left out parameters in this rank's last step, perhaps by stochastic depth, so the ranks' "
            "gradients can't be averaged; train it on one rank, or multiply what it leaves out by zero"
        )
    return None


def run_blocks(state: TrainState, loop: TrainLoop) -> Stop:
    """Runs block after block, each with its evaluation, until something stops the run or no epochs are left."""
    # After an epoch that an earlier process completed.
    stop = resume_evaluation(state, loop) or evaluate_if_due(state, loop)
    stop = stop or first_stop(callback.on_train_start(state) for callback in loop.callbacks)
    for first_epoch, last_epoch in loop.schedule.blocks(state.epoch + 1):
        if stop:
            break
        loop.emit(BlockStarted(first_epoch, last_epoch - first_epoch + 1))
        for epoch in range(first_epoch, last_epoch + 1):
            stop = train_epoch(state, loop, epoch) or take_scores(state, loop)
            if stop:
                break
        stop = stop or evaluate_if_due(state, loop)
        loop.emit(BlockStopped(first_epoch, max(1, state.epoch - first_epoch + 1)))
    if not (stop and stop.is_interrupted):  # a resumed run repeats the evaluation that a signal interrupts
        if stop and stop.exit_status == DIVERGED_EXIT:
            return_to_evaluated(state)
        last = take_scores(state, loop, wait=True)
        stop = last if last and last.status == "success" else stop or last
    return stop or Stop("aborted", target_not_reached(loop.schedule.epochs))


def train_epoch(state: TrainState, loop: TrainLoop, epoch: int) -> Stop | None:
    """Trains the rest of one epoch, from `state.batch` on; returns why the run must end, or None.

    Micro-batches that no longer fill a step are left out: the MLPerf reference discards their gradients.
    """
    config, emit = loop.step, loop.emit
    learning_rate = loop.learning_rate(epoch)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate
    state.model.train()
    state.optimizer.zero_grad(set_to_none=True)
    batches = len(loop.loader) - len(loop.loader) % config.ga_steps
    emit(EpochStarted(epoch, learning_rate, batches))
    started = time.perf_counter()
    samples = 0
    device = loop.world.device
    loss_sum = torch.zeros((), device=device) if state.loss_sum is None else state.loss_sum.to(device)
    step_losses: list[Tensor] = []

    micro_batches = itertools.islice(loop.loader.epoch(epoch, state.batch), batches - state.batch)
    for index, batch in enumerate(micro_batches, state.batch):
        emit(PhaseEnd("data"))
        completes_step = (index + 1) % config.ga_steps == 0
        seed_step(config.seed, epoch, index)
        # Gradients accumulate in the parameters; the ranks average them once per step, in its last backward pass.
        loss = forward_backward(state, batch, config, communicate=completes_step)
        emit(PhaseEnd("forward and backward"))
        if completes_step:
            gradient_norm = state.gradient_norm = optimizer_step(state, config.max_grad_norm)
        samples += len(batch["image"])
        loss_sum = loss_sum + loss
        step_losses.append(loss)
        emit(MicroBatchEnd(epoch, index, len(batch["image"])))
        if completes_step:
            state.step, state.batch, state.loss_sum = state.step + 1, index + 1, loss_sum
            if state.average:
                state.average.update(state.step)
            mean_loss = torch.stack(step_losses).mean()
            step_losses.clear()
            for step in loop.step_sync.submit(
                epoch=epoch,
                batch=index,
                loss=mean_loss,
                gradient_norm=gradient_norm,
                loss_scale=loss_scale(state.scaler),
            ):
                if stop := finish_step(state, loop, step):
                    return stop
    for step in loop.step_sync.drain():
        if stop := finish_step(state, loop, step):
            return stop

    result = EpochStopped(
        epoch=epoch,
        # The epoch's one host sync: the mean loss over batches and ranks.
        loss=(loop.world.sum(loss_sum) / (batches * loop.world.size)).item(),
        learning_rate=learning_rate,
        samples=samples * loop.world.size // loop.ranks_per_sample,
        seconds=time.perf_counter() - started,
    )
    state.epoch, state.batch, state.loss_sum = epoch, 0, None
    emit(result)
    stop = first_stop(callback.on_epoch_end(result, state) for callback in loop.callbacks)
    if loop.checkpoints.is_due_after_epoch(epoch):
        loop.checkpoints.save(state)
    return stop


def forward_backward(state: TrainState, batch: Batch, config: StepConfig, *, communicate: bool) -> Tensor:
    """Adds a micro-batch's share of the step's gradients to the parameters.

    Args:
        communicate: average the gradients over the ranks (the one all-reduce of a step).

    Returns:
        The loss, a scalar that stays on the device.
    """
    device = config.precision.device
    image = batch["image"].to(device, non_blocking=True, memory_format=MEMORY_FORMATS[config.layout])
    label = batch["label"].to(device, non_blocking=True)

    def predict(images: Tensor) -> Outputs:
        with config.precision.autocast():
            outputs: Outputs = state.model(images)
        return outputs

    with nullcontext() if communicate else without_communication(state.model):
        loss = config.objective(state.network, predict, config.loss, image, label)
        state.scaler.scale(loss / config.ga_steps).backward()
    return loss.detach()


def optimizer_step(state: TrainState, max_grad_norm: float | None = None) -> Tensor:
    """Updates the weights from the accumulated gradients, then clears the gradients.

    Args:
        max_grad_norm: gradients with a larger norm are first scaled down to it.

    Returns:
        The gradients' norm before that, the loss scale divided out: a scalar that stays on the device.
    """
    scale = loss_scale(state.scaler)
    norm = get_total_norm([p.grad for p in state.network.parameters() if p.grad is not None])
    norm = norm if scale is None else norm / scale
    if max_grad_norm is not None:
        # By the true norm; the gradients keep the loss scale, which the scaler divides out.
        clip_grads_with_norm_(state.network.parameters(), max_grad_norm, norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    return norm


def finish_step(state: TrainState, loop: TrainLoop, step: StepEnd) -> Stop | None:
    """Acts on a step's numbers once they have reached the host: on a GPU, one step later. The same on every rank."""
    loop.emit(step)
    stop = first_stop(callback.on_step_end(step, state) for callback in loop.callbacks)
    if step.fault:  # the weights are damaged: do not save them
        return Stop("aborted", f"diverged: {describe_fault(loop, step)}", DIVERGED_EXIT)
    if step.save:
        loop.checkpoints.save(state)
    if step.signal and not stop:
        return stop_at_signal(Interrupted(step.signal))
    return stop


def describe_fault(loop: TrainLoop, step: StepEnd) -> str:
    """Names the ranks whose loss is not finite, with their samples; all ranks where only the gradients are not.

    Every rank must call it.
    """
    rank = loop.world.rank
    samples = "; ".join(loop.loader.describe(step.epoch, step.batch))
    reports = loop.world.gather((step.loss, f"rank {rank}: loss {step.loss:g} on {samples}"))
    at_fault = [text for loss, text in reports if not math.isfinite(loss)] or [text for _, text in reports]
    more = f" | and {len(at_fault) - NAMED_RANKS} more ranks" if len(at_fault) > NAMED_RANKS else ""
    return (
        f"epoch {step.epoch}, batch {step.batch}: gradient norm {step.gradient_norm:g}, loss scale "
        f"{step.loss_scale:g}, {' | '.join(at_fault[:NAMED_RANKS])}{more}"
    )
