"""`--resume`: the newest good state, what has changed since it was saved, and what that means."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.messages import logger, note
from runtime.checkpoint import format as checkpoints
from runtime.checkpoint.format import Checkpoint
from runtime.distributed.world import World
from runtime.eval_schedule import EvalSchedule
from runtime.train_state import TrainState

# Another one is another run: its state would mean nothing.
STRUCTURAL_FLAGS = ("model", "normalization", "activation", "optimizer", "freeze")
# The place in the middle of an epoch counts in batches of these.
ORDER_FLAGS = ("batch_size", "ga_steps", "loader", "steps_per_epoch")
# Nothing of a run's numbers follows from these.
INCIDENTAL_FLAGS = (
    "data_dir",
    "log_dir",
    "save_ckpt_path",
    "load_ckpt_path",
    "init_from",
    "resume",
    "ckpt_every",
    "ckpt_keep",
    "local_rank",
    "exec_mode",
    "subset",
    "seed",
    "num_workers",
    "verbose",
    "no_report",
    "compare",
    "trackers",
    "untimed_steps",
    "val_batch_size",
    "submission_org",
    "submission_platform",
    "submission_status",
    "division",
    "scan",
    "output",
    "series",
    "checkpoint",
    "test_time_flips",
    "save_probabilities",
    "max_memory_gb",
)


def newest_good(path: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; those that are not are named on stderr. None where there is none at all.

    Raises:
        UserError: there are files, and every one is damaged.
    """
    damaged = []
    for file in checkpoints.generations(path):
        try:
            found = checkpoints.load(file, "--resume")
        except UserError as error:
            damaged.append(str(error))
            logger.warning(str(error))
            continue
        return found
    if damaged:
        raise UserError(
            f"--resume: none of the {len(damaged)} checkpoint(s) of {path} is whole; restore one, or start from the "
            "beginning without --resume"
        )
    return None


def find(path: Path | None, start: Path | None, world: World) -> Checkpoint | None:
    """The state to go on from, the same on every rank: rank 0 reads it, since its disk may be its alone.

    Args:
        path: of the run's own checkpoints; None: do not look for any.
        start: of a checkpoint to go on from where the run has none yet, or None.

    Raises:
        UserError: what was asked for is not there or damaged, on every rank.
    """
    found: Checkpoint | UserError | None = None
    if world.is_main:
        try:
            found = newest_good(path) if path else None
            if found is None and start is not None:
                found = checkpoints.load(start)
        except UserError as error:
            found = error
    received: Checkpoint | UserError | None = world.broadcast(found)
    if isinstance(received, UserError):
        raise received
    return received


def is_done(loaded: Checkpoint, schedule: EvalSchedule, threshold: float) -> str:
    """Why there is nothing to go on with, a phrase; "" where there is, be it one evaluation."""
    if loaded.best_dice >= threshold:
        return f"reached a mean Dice of {loaded.best_dice:.4f} at epoch {loaded.best_epoch}"
    is_pending = schedule.evaluates(loaded.last_epoch) and loaded.evaluated < loaded.last_epoch
    is_over = loaded.last_epoch >= schedule.epochs and not is_pending
    return f"has {loaded.last_epoch} epochs behind it" if is_over else ""


def changes(loaded: Checkpoint, config: dict[str, Any], data: str) -> list[str]:
    """What is other than when the state was saved, a phrase a flag.

    Args:
        config: this run's flags.
        data: digest of this run's data set and split.

    Raises:
        UserError: the network, the optimizer or the data set is another one.
    """
    stored = json.loads(json.dumps(loaded.config))  # tuples and lists look alike
    current = json.loads(json.dumps(config))
    changed = {
        name: f"--{name} {_plain(current[name])}, was {_plain(stored[name])}"
        for name in current
        if name in stored and current[name] != stored[name]
    }
    structural = [changed[name] for name in STRUCTURAL_FLAGS if name in changed]
    if structural:
        raise UserError(f"{loaded.path} is of another run: {'; '.join(structural)}; give those flags as they were")
    if loaded.data and data and loaded.data != data:
        raise UserError(f"{loaded.path} was trained on another data set or split than --data_dir holds")
    return [text for name, text in changed.items() if name not in INCIDENTAL_FLAGS]


def _plain(value: Any) -> str:
    return (" ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)


def to_boundary(state: TrainState, loaded: Checkpoint, config: dict[str, Any], ranks: int, seed: int) -> None:
    """Skips the rest of an epoch whose sharding has changed since the state was saved, and notes it."""
    reasons = [f"--{name}" for name in ORDER_FLAGS if name in loaded.config and loaded.config[name] != config[name]]
    reasons += ["the seed"] if loaded.seed != seed else []
    if len(loaded.loss_sums) not in (0, ranks):
        reasons.append("the number of ranks")
        note(f"resumed on {ranks} rank(s), was {len(loaded.loss_sums)}: the global batch changes alike")
    if state.batch and reasons:
        state.epoch, state.batch, state.loss_sum = state.epoch + 1, 0, None
        verb = "are" if len(reasons) > 1 else "is"
        note(
            f"the rest of epoch {state.epoch} from batch {loaded.batch} on is left out, since "
            f"{' and '.join(reasons)} {verb} another"
        )


def describe(loaded: Checkpoint, changed: Sequence[str]) -> str:
    """Where it goes on from, in a line."""
    where = f"batch {loaded.batch} of epoch {loaded.last_epoch + 1}" if loaded.batch else f"epoch {loaded.last_epoch}"
    return f"resumed from {loaded.path} after {where}" + (f"; changed: {', '.join(changed)}" if changed else "")
