"""The training loop: train is the outline, train_epoch an epoch, train_step one micro-batch.

The host waits for the device once an epoch, when the mean loss is read; what it reads of a step has arrived by then.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from common.errors import Interrupted, UserError
from data_loading.pytorch_loader import Batch, TrainingLoader, is_of_worker, lost_worker
from runtime.distributed.step_sync import StepSync
from runtime.distributed.world import World, without_communication
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
from runtime.objective import Objective, plain
from runtime.precision import Precision
from runtime.seeding import seed_step

# MLPerf's schedule counts in samples of KiTS19's training set: an evaluation from epoch 1000 on, every 20.
RULE_SAMPLES = 168
RULE_FIRST_EVALUATION = 1000
RULE_EVALUATION_INTERVAL = 20

MEMORY_FORMATS = {"NCDHW": torch.contiguous_format, "NDHWC": torch.channels_last_3d}
# Of a 2-D network's weights.
PLANE_FORMATS = {"NCDHW": torch.contiguous_format, "NDHWC": torch.channels_last}


def place(network: nn.Module, device: torch.device, layout: str) -> nn.Module:
    """The network on the device, its weights in the layout's memory order."""
    network.to(device)
    for p in (*network.parameters(), *network.buffers()):
        if formats := PLANE_FORMATS[layout] if p.dim() == 4 else MEMORY_FORMATS[layout] if p.dim() == 5 else None:
            # A copy has the strides that a gradient gets; `contiguous` would leave those of a single channel.
            p.data = p.data.clone(memory_format=formats)
    for p in network.parameters():
        # A 1x1x1 kernel is in both orders; its gradient comes with NCDHW's strides, and DDP copies where they differ.
        if p.dim() == 5 and p[0, 0].numel() == 1:
            p.data = p.data.clone(memory_format=torch.contiguous_format)
    return network


@dataclass(frozen=True)
class Stop:
    """Why a run ends: "success" or "aborted", the reason, and the program's exit status."""

    status: str
    reason: str
    exit_status: int = 0


@dataclass
class TrainState:
    """What training changes; a checkpoint holds all of it.

    Attributes:
        network: the bare network; `model` is it, wrapped for gradient averaging.
        epoch: the last one that was completed.
        batch: micro-batches of the next epoch that are done, up to the last whole step.
        loss_sum: of those, this rank's losses: a scalar on the device; None where `batch` is 0.
        evaluated: the last epoch with an evaluation behind it.
        gradient_norm: of the last step, a scalar on the device; no checkpoint needs it.
        best_epoch, best_dice, best_network: of the best evaluation yet, the weights on the host.
        stop: why the run must end; None: go on.
        records: what callbacks and schedules must know again after a resume, by their names: plain Python, and alike
            on all ranks as far as decisions follow from it.
    """

    network: nn.Module
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    epoch: int = 0
    batch: int = 0
    loss_sum: Tensor | None = None
    evaluated: int = 0
    gradient_norm: Tensor | None = None
    best_epoch: int = 0
    best_dice: float = -1.0
    best_network: dict[str, Tensor] | None = None
    stop: Stop | None = None
    records: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class EvalSchedule:
    """Up to `epochs`, with an evaluation at `first_evaluation` and every `interval` after it; None: never."""

    epochs: int
    first_evaluation: int | None
    interval: int

    def evaluates(self, epoch: int) -> bool:
        first = self.first_evaluation
        return first is not None and epoch >= first and (epoch - first) % self.interval == 0

    def check(self, batches: int, ga_steps: int, warmup_steps: int | None) -> None:
        """Refuses, before anything is touched, a run that would end without a result.

        Args:
            batches: of a rank in an epoch.
            warmup_steps: of `--benchmark`; None without it.

        Raises:
            UserError: an epoch without a step, or nothing left to time after the warm-up.
        """
        if batches < ga_steps:
            raise UserError(f"--ga_steps {ga_steps}, but an epoch has {batches} batches: no step would ever be made")
        iterations = batches - batches % ga_steps
        if warmup_steps is not None and self.epochs * iterations <= warmup_steps:
            raise UserError(
                f"--benchmark: {self.epochs} epoch(s) of {iterations} iterations leave nothing to time after "
                f"--warmup_steps {warmup_steps}; use --epochs {warmup_steps // iterations + 2} or a shorter warm-up"
            )

    def note(self) -> str:
        """One line where no evaluation will take place, which a user seldom means; else ""."""
        if self.first_evaluation is not None and self.first_evaluation <= self.epochs:
            return ""
        when = f"the first is due at epoch {self.first_evaluation}" if self.first_evaluation else "there are no cases"
        return f"no evaluation in these {self.epochs} epochs ({when}); --start_eval_at and --evaluate_every set others"

    def blocks(self, start: int) -> Iterator[tuple[int, int]]:
        """(first, last) epochs of each stretch up to and with an evaluation, from epoch `start` on."""
        first = start
        for epoch in range(start, self.epochs + 1):
            if self.evaluates(epoch) or epoch == self.epochs:
                yield first, epoch
                first = epoch + 1


def make_schedule(
    epochs: int, samples_per_epoch: int, start_eval_at: int | None, evaluate_every: int | None
) -> EvalSchedule:
    """The rule's schedule, scaled to this run's samples an epoch, where the user gave none."""
    first = start_eval_at or math.ceil(RULE_FIRST_EVALUATION * RULE_SAMPLES / samples_per_epoch)
    interval = evaluate_every or math.ceil(RULE_EVALUATION_INTERVAL * RULE_SAMPLES / samples_per_epoch)
    return EvalSchedule(epochs, first, interval)


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
            state.batch, state.loss_sum = index + 1, total
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
