"""The training loop: train is the outline, train_epoch an epoch, train_step one micro-batch.

The host waits for the device once an epoch, when the mean loss is read; what it reads of a step has arrived by then.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from common.errors import Interrupted, UserError
from data_loading.pytorch_loader import Batch, TrainingLoader, is_of_worker, lost_worker
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
from runtime.memory_format import MEMORY_FORMATS
from runtime.objective import Objective, plain
from runtime.precision import Precision
from runtime.seeding import seed_step
from runtime.train_state import Stop, TrainState


@dataclass(frozen=True)
class StepSettings:
    """How a micro-batch is computed; `seed` is this rank's, of whatever network and objective draw."""

    loss: nn.Module
    precision: Precision
    ga_steps: int
    layout: str
    seed: int = 0
    objective: Objective = plain


Emit = Callable[[Event], None]


def train(
    state: TrainState,
    loader: TrainingLoader,
    schedule: EvalSchedule,
    learning_rate: Callable[[int], float],
    settings: StepSettings,
    evaluate: Callable[[int], EvaluationStopped],
    world: World,
    step_sync: StepSync,
    emit: Emit,
) -> Stop:
    """Trains on from the state, until the schedule ends, a callback sets `state.stop`, or a signal asks to leave.

    Whatever ends it, the log is closed.
    """
    started = time.perf_counter()

    def close(stop: Stop) -> Stop:
        emit(RunStopped(stop.status, stop.reason, state.epoch, time.perf_counter() - started))
        return stop

    def score() -> None:
        if schedule.evaluates(state.epoch) and state.evaluated < state.epoch and not state.stop:
            event = evaluate(state.epoch)
            state.evaluated = state.epoch
            emit(event)

    try:
        score()  # of an epoch that an earlier process ended with
        for first, last in schedule.blocks(state.epoch + 1):
            if state.stop:
                break
            emit(BlockStarted(first, last - first + 1))
            for epoch in range(first, last + 1):
                if state.stop:
                    break
                train_epoch(state, epoch, loader, learning_rate(epoch), settings, world, step_sync, emit)
            score()
            emit(BlockStopped(first, max(1, state.epoch - first + 1)))
    except Interrupted as leaving:
        state.stop = Stop("aborted", str(leaving), leaving.exit_status)
    except BaseException as error:
        is_lost = isinstance(error, RuntimeError) and world.lost_another(error)
        # A loader worker's error holds that process's traceback; the cause is its last line.
        told = " ".join(str(error).splitlines()[-1:])
        close(Stop("aborted", "another rank was lost" if is_lost else f"{type(error).__name__}: {told}"))
        if isinstance(error, RuntimeError) and is_of_worker(error):
            raise UserError(lost_worker(error, "a step was computed")) from error
        raise
    return close(state.stop or Stop("aborted", f"the target was not reached in {schedule.epochs} epochs"))


def train_epoch(
    state: TrainState,
    epoch: int,
    loader: TrainingLoader,
    rate: float,
    settings: StepSettings,
    world: World,
    step_sync: StepSync,
    emit: Emit,
) -> None:
    """The rest of one epoch from `state.batch` on, or up to the step at which a callback sets `state.stop`.

    Micro-batches that no longer fill a step are left out, as the reference discards their gradients.
    """
    state.model.train()
    state.optimizer.zero_grad(set_to_none=True)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    batches = len(loader) - len(loader) % settings.ga_steps
    emit(EpochStarted(epoch, rate, batches))
    started = time.perf_counter()
    total = torch.zeros((), device=world.device) if state.loss_sum is None else state.loss_sum.to(world.device)
    step_losses: list[Tensor] = []
    samples = 0
    rest = itertools.islice(loader.epoch(epoch, state.batch), batches - state.batch)
    for index, batch in enumerate(rest, state.batch):
        is_last = (index + 1) % settings.ga_steps == 0
        emit(PhaseEnd("data"))
        seed_step(settings.seed, epoch, index)
        step_losses.append(train_step(state, batch, settings, is_last, lambda phase: emit(PhaseEnd(phase))))
        total = total + step_losses[-1]
        samples += len(batch["image"])
        emit(MicroBatchEnd(epoch, index, len(batch["image"])))
        if is_last:
            state.step, state.batch, state.loss_sum = state.step + 1, index + 1, total
            for event in _beat(step_sync, state, epoch, index, torch.stack(step_losses).mean()):
                emit(event)
            step_losses.clear()
            if state.stop:
                return
    for event in step_sync.drain():
        emit(event)
    if state.stop:
        return
    # The epoch's one host sync: the mean loss over batches and ranks.
    loss = (world.sum(total) / (batches * world.size)).item()
    state.epoch, state.batch, state.loss_sum = epoch, 0, None
    emit(EpochStopped(epoch, loss, rate, samples * world.size, time.perf_counter() - started))


def _beat(step_sync: StepSync, state: TrainState, epoch: int, batch: int, loss: Tensor) -> Iterator[StepEnd]:
    norm = loss if state.gradient_norm is None else state.gradient_norm
    return step_sync.submit(epoch, batch, loss, norm, loss_scale(state.scaler))


def loss_scale(scaler: torch.amp.GradScaler) -> Tensor | None:
    """The scale, a scalar on the device; None without one. `get_scale` would make the host wait."""
    return scaler._get_scale_async() if scaler.is_enabled() else None


def train_step(
    state: TrainState,
    batch: Batch,
    settings: StepSettings,
    is_last: bool,
    done: Callable[[str], None] = lambda phase: None,
) -> Tensor:
    """Forward and backward of one micro-batch; with the last of its group, the step and its only all-reduce.

    Args:
        done: told of the phase that has ended.

    Returns:
        The loss, a scalar that stays on the device.
    """
    device = settings.precision.device
    image = batch["image"].to(device, non_blocking=True, memory_format=MEMORY_FORMATS[settings.layout])
    label = batch["label"].to(device, non_blocking=True)

    def predict(images: Tensor) -> Tensor:
        with settings.precision.autocast():
            logits: Tensor = state.model(images)
        return logits

    with nullcontext() if is_last else without_communication(state.model):
        loss = settings.objective(state.network, predict, settings.loss, image, label)
        state.scaler.scale(loss / settings.ga_steps).backward()
    done("forward and backward")
    if is_last:
        scale = loss_scale(state.scaler)
        gradients = [p.grad for p in state.network.parameters() if p.grad is not None]
        norm = get_total_norm(gradients)
        state.gradient_norm = norm if scale is None else norm / scale
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
    return loss.detach()
