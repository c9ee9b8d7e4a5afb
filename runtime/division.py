"""Closed or open: what of a run departs from the closed division's rules (MLPerf Training rules for unet3d)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from errors import UserError
from runtime.arguments import RunConfig
from runtime.training import Schedule, make_schedule

CLOSED_CASES = {"train": 168, "evaluation": 42}
# What the rules fix, by flag; batch size, rates, momentum, warm-up, decay and weight decay are free.
CLOSED_FLAGS = {
    "optimizer": "sgd",
    "augment": ("mlperf",),
    "oversampling": 0.4,
    "input_shape": (128, 128, 128),
    "val_input_shape": (128, 128, 128),
    "overlap": 0.5,
    "quality_threshold": 0.908,
    "model": "unet3d",
    "normalization": "instancenorm",
    "activation": "relu",
    "loss": "dice_ce",
    "include_background": False,
    "load_ckpt_path": (),
    "init_from": None,
    "freeze": (),
    "lr_schedule": "multistep",
    "steps_per_epoch": None,
    "callbacks": (),
    "benchmark": False,
}


def departures(
    config: RunConfig, dataset: str, split: Mapping[str, Sequence[str]], schedule: Schedule, samples_per_epoch: int
) -> list[str]:
    """Everything that makes this run an open one, a phrase each; empty for a closed run."""
    found = []
    if dataset != "kits19":
        found.append(f"data set {dataset}, not kits19")
    for subset, count in CLOSED_CASES.items():
        if len(split.get(subset, ())) != count:
            found.append(f"{len(split.get(subset, ()))} {subset} cases, not {count}")
    if config.loader == "synthetic":
        found.append("--loader synthetic, not the data set's volumes")
    for flag, expected in CLOSED_FLAGS.items():
        value = getattr(config, flag)
        if value != expected:
            found.append(f"--{flag} {_plain(value)}, not {_plain(expected)}")
    rule = make_schedule(schedule.epochs, samples_per_epoch, None, None)
    if (schedule.first_evaluation, schedule.interval) != (rule.first_evaluation, rule.interval):
        found.append(
            f"evaluation from epoch {schedule.first_evaluation} every {schedule.interval}, "
            f"not from {rule.first_evaluation} every {rule.interval}"
        )
    return found


def _plain(value: object) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


def choose_division(asked: str, reasons: Sequence[str]) -> str:
    """`auto` is closed where nothing departs. Raises UserError when closed is asked for and something does."""
    if asked == "closed" and reasons:
        raise UserError(f"--division closed, but: {'; '.join(reasons)}")
    return asked if asked != "auto" else "open" if reasons else "closed"
