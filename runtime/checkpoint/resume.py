"""`--resume`: finds the newest intact checkpoint, compares the run with it, and restores the state."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from common.messages import counted, logger, note
from runtime.arguments import RunConfig, format_value
from runtime.checkpoint.format import Checkpoint, load, load_network
from runtime.checkpoint.writer import find_checkpoints
from runtime.distributed.world import World
from runtime.eval_schedule import EvalSchedule
from runtime.flag_fields import flag_names
from runtime.train_state import TrainState

# Flags by the effect of a change (see `flag_fields.Flag.resume`).
STRUCTURAL_FLAGS = flag_names(RunConfig, resume="structural")
ORDER_FLAGS = flag_names(RunConfig, resume="order")
INCIDENTAL_FLAGS = flag_names(RunConfig, resume="incidental")
# Settings that distinguish SGD, Adam and LAMB. Comparing all of them would refuse checkpoints of other torch versions.
OPTIMIZER_SETTINGS = {"momentum", "betas", "eps"}
# The flag that divides the ranks into groups, each with samples of its own.
SHARING = "ranks_per_sample"


def newest_intact(path: Path) -> Checkpoint | None:
    """Returns the newest intact checkpoint of the run that saves to `path`; None if there are no files.

    Damaged files are named on stderr.

    Raises:
        UserError: there are files, and every one is damaged.
    """
    damaged = 0
    for file in find_checkpoints(path):
        try:
            return load(file, "--resume")
        except UserError as error:
            damaged += 1
            logger.warning(str(error))
    if damaged:
        raise UserError(
            f"--resume: none of the {damaged} checkpoint(s) of {path} is intact; restore one, or start from the "
            "beginning without --resume"
        )
    return None


def find(path: Path | None, start: Path | None, world: World) -> Checkpoint | None:
    """Returns the state to resume from, the same on every rank: rank 0 reads it, as the file may be on its disk alone.

    Args:
        path: where the run saves its checkpoints; None: does not look for the run's own.
        start: another checkpoint, to start from if the run has none yet.
        world: all ranks of the run.

    Raises:
        UserError: on every rank, if the checkpoint is missing or damaged.
    """
    result: Checkpoint | UserError | None = None
    if world.is_main:
        try:
            result = newest_intact(path) if path else None
            if result is None and start is not None:
                result = load(start)
        except UserError as error:
            result = error
    received: Checkpoint | UserError | None = world.broadcast(result)
    if isinstance(received, UserError):
        raise received
    return received


def is_done(loaded: Checkpoint, schedule: EvalSchedule, threshold: float) -> str:
    """Returns why nothing is left to do, as a phrase; "" if anything is, even if it is a single evaluation."""
    if loaded.best_dice >= threshold:
        return f"reached a mean Dice of {loaded.best_dice:.4f} at epoch {loaded.best_epoch}"
    is_pending = schedule.evaluates(loaded.last_epoch) and loaded.evaluated < loaded.last_epoch
    is_over = loaded.last_epoch >= schedule.epochs and not is_pending and loaded.pending is None
    return f"has completed {counted(loaded.last_epoch, 'epoch')}" if is_over else ""


def changes(loaded: Checkpoint, config: dict[str, Any], data: str) -> list[str]:
    """Returns a phrase for each flag that differs from the checkpoint's and influences the run's numbers.

    Args:
        loaded: the checkpoint.
        config: this run's flags.
        data: digest of this run's data set and split.

    Raises:
        UserError: the network, the optimizer or the data set has changed.
    """
    stored = json.loads(json.dumps(loaded.config))  # makes tuples lists, so that they compare equal
    current = json.loads(json.dumps(config))
    changed = {
        name: f"--{name} {format_value(current[name])}, was {format_value(stored[name])}"
        for name in current
        if name in stored and current[name] != stored[name]
    }
    structural = [changed[name] for name in STRUCTURAL_FLAGS if name in changed]
    if structural:
        raise UserError(f"{loaded.path} belongs to another run: {'; '.join(structural)}; give those flags as they were")
    if loaded.data and data and loaded.data != data:
        raise UserError(f"{loaded.path} was trained on another data set or split than that of --data_dir")
    result = [text for name, text in changed.items() if name not in INCIDENTAL_FLAGS]
    if loaded.seed is not None and current.get("seed", -1) not in (-1, loaded.seed):  # -1 goes on with the run's
        result.append(f"--seed {current['seed']}, was {loaded.seed}")
    return result


def describe(loaded: Checkpoint, changed: Sequence[str]) -> str:
    """Returns the line that reports where the run resumes."""
    return f"resumed from {loaded.path} after {loaded.place}" + (f"; changed: {', '.join(changed)}" if changed else "")


def restore(state: TrainState, checkpoint: Checkpoint, rank: int = 0) -> None:
    """Sets the state to the checkpoint's last one.

    Raises:
        UserError: the checkpoint belongs to another network or optimizer.
    """
    load_network(state.network, checkpoint.last, checkpoint.path)
    if checkpoint.optimizer is not None and checkpoint.scaler is not None:
        try:
            _load_optimizer(state.optimizer, checkpoint.optimizer)
        except (ValueError, KeyError) as error:
            raise UserError(f"{checkpoint.path}: saved with another --optimizer ({error})") from None
        if checkpoint.scaler and state.scaler.is_enabled():
            state.scaler.load_state_dict(checkpoint.scaler)
    if state.average:
        state.average.load(checkpoint.average or checkpoint.last)
    state.epoch, state.evaluated = checkpoint.last_epoch, checkpoint.evaluated
    state.step, state.batch, state.pending = checkpoint.step, checkpoint.batch, checkpoint.pending
    sums = checkpoint.loss_sums
    state.loss_sum = torch.tensor(sums[rank]) if checkpoint.batch and rank < len(sums) else None
    state.best_epoch, state.best_dice = checkpoint.best_epoch, checkpoint.best_dice
    state.best_network = checkpoint.best if checkpoint.best_dice >= 0 else None
    state.callback_state.clear()
    state.callback_state.update(copy.deepcopy(checkpoint.callback_state))


def _load_optimizer(optimizer: torch.optim.Optimizer, stored: dict[str, Any]) -> None:
    """Loads the moments only: momentum, decay and betas remain those of this run's flags, which its log states."""
    own = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    for group, settings in zip(stored["param_groups"], own, strict=True):
        if other := sorted((group.keys() ^ settings.keys()) & OPTIMIZER_SETTINGS):
            raise ValueError(f"only one of the two has {', '.join(other)}")
    optimizer.load_state_dict(stored)
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)


def skip_partial_epoch(state: TrainState, loaded: Checkpoint, config: dict[str, Any], *, ranks: int, seed: int) -> None:
    """Skips the rest of an epoch whose assignment of samples to ranks and batches has changed since the save.

    Logs a note when it does, and when the number of ranks has changed.
    """
    reasons = [f"--{name}" for name in ORDER_FLAGS if name in loaded.config and loaded.config[name] != config[name]]
    reasons += ["the seed"] if loaded.seed != seed else []
    if len(loaded.loss_sums) not in (0, ranks):
        reasons.append("the number of ranks")
        before, now = _global_batch(len(loaded.loss_sums), loaded.config), _global_batch(ranks, config)
        consequence = f": the global batch is {now}, was {before}" if before != now else ""
        note(f"resumed on {ranks} rank(s), was {len(loaded.loss_sums)}{consequence}")
    if state.batch and reasons:
        state.epoch, state.batch, state.loss_sum = state.epoch + 1, 0, None
        verb = "have" if len(reasons) > 1 else "has"
        note(
            f"the rest of epoch {state.epoch} from batch {loaded.batch} on is skipped, since "
            f"{' and '.join(reasons)} {verb} changed"
        )


def _global_batch(ranks: int, config: dict[str, Any]) -> int:
    """Returns the number of samples in an optimizer step."""
    samples: int = ranks // config.get(SHARING, 1) * config["batch_size"] * config["ga_steps"]
    return samples
