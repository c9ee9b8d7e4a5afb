"""RunConfig <-> the command line. `@FILE` anywhere reads arguments from a file: one flag a line, # comments."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.registry import Spec
from runtime.command_line import make_parser


@dataclass(frozen=True)
class RunConfig:
    """Every flag of `main.py`, under its own name; what each means stands in `command_line.py`.

    `compare` has none: it is what `--log_dir` names beside the first folder.
    """

    data_dir: Path
    log_dir: Path
    compare: tuple[Path, ...]
    save_ckpt_path: Path | None
    load_ckpt_path: tuple[Path, ...]
    init_from: Path | None
    freeze: tuple[str, ...]
    resume: bool
    ckpt_every: str
    ckpt_keep: int
    loader: str
    local_rank: int
    exec_mode: str
    subset: str
    batch_size: int
    ga_steps: int
    epochs: int
    steps_per_epoch: int | None
    evaluate_every: int | None
    start_eval_at: int | None
    quality_threshold: float
    layout: str
    input_shape: tuple[int, int, int]
    val_input_shape: tuple[int, int, int]
    val_batch_size: int
    seed: int
    num_workers: int
    benchmark: bool
    warmup_steps: int
    untimed_steps: int
    compile: bool
    amp: bool
    amp_dtype: str
    optimizer: str
    learning_rate: float
    momentum: float
    init_learning_rate: float
    lr_warmup_epochs: int
    lr_decay_epochs: tuple[int, ...]
    lr_decay_factor: float
    lr_schedule: str
    lamb_betas: tuple[float, float]
    weight_decay: float
    model: Spec
    normalization: str
    activation: str
    loss: Spec
    include_background: bool
    verbose: bool
    no_report: bool
    trackers: tuple[str, ...]
    callbacks: tuple[str, ...]
    augment: tuple[Spec, ...]
    oversampling: float
    overlap: float
    cudnn_benchmark: bool
    cudnn_deterministic: bool
    division: str
    ruleset: str
    submission_org: str
    submission_platform: str | None
    submission_status: str
    scan: Path | None
    output: Path | None
    series: str | None
    checkpoint: str
    test_time_flips: str
    save_probabilities: bool
    max_memory_gb: float | None

    def to_json(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return str(value) if isinstance(value, Path | Spec) else value


PREDICT_FLAGS = ("scan", "output", "series", "test_time_flips", "save_probabilities", "max_memory_gb")
# What belongs to a trained network rather than to a run: `--exec_mode evaluate` takes these from the checkpoint
# unless they are given, so that the score is the one that training saw.
NETWORK_FLAGS = (
    "model",
    "normalization",
    "activation",
    "loss",
    "include_background",
    "layout",
    "val_input_shape",
    "overlap",
    "amp",
    "amp_dtype",
)


def with_checkpoint_network(config: RunConfig, given: frozenset[str], stored: dict[str, Any]) -> RunConfig:
    """The configuration with a checkpoint's `NETWORK_FLAGS`, but for those given on the command line.

    Specs among them are untrusted: they may not import whatever they name.
    """
    taken: dict[str, Any] = {name: stored[name] for name in NETWORK_FLAGS if name in stored and name not in given}
    taken |= {name: Spec(taken[name]) for name in ("model", "loss") if name in taken}
    return replace(config, **taken)


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[RunConfig, frozenset[str]]:
    """The command line as a RunConfig, and the names of the flags that were given on it.

    Raises:
        UserError: an unknown flag, a bad value, or flags that contradict each other.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser()
    try:
        values = vars(parser.parse_args(arguments))
    except RecursionError:
        raise UserError("an argument file names itself") from None
    not_given = object()  # as every flag's default, it remains where a second pass finds no such flag
    parser.set_defaults(**dict.fromkeys(values, not_given))
    given = frozenset(name for name, value in vars(parser.parse_args(arguments)).items() if value is not not_given)
    for name in (
        "input_shape",
        "val_input_shape",
        "lr_decay_epochs",
        "lamb_betas",
        "trackers",
        "callbacks",
        "freeze",
        "augment",
        "load_ckpt_path",
    ):
        values[name] = tuple(values[name])
    folders = values["log_dir"] if isinstance(values["log_dir"], list) else [values["log_dir"]]
    values["log_dir"], values["compare"] = folders[0], tuple(folders[1:])
    if values["data_dir"] is None:
        trains_without = values["exec_mode"] == "train" and values["loader"] == "synthetic"
        if not trains_without and values["exec_mode"] in ("train", "evaluate"):
            raise UserError("--data_dir is required: the folder that preprocess_dataset.py wrote")
        values["data_dir"] = Path("synthetic") if trains_without else Path("none")
    config = RunConfig(**values)
    _check(config, given)
    return config, given


def _check(config: RunConfig, given: frozenset[str]) -> None:
    """Refuses flags that contradict each other."""
    if config.exec_mode in ("evaluate", "predict") and not config.load_ckpt_path:
        raise UserError(f"--exec_mode {config.exec_mode} needs --load_ckpt_path, the checkpoint to {config.exec_mode}")
    if config.exec_mode != "train" and config.benchmark:
        raise UserError(f"--benchmark times training; it does not go with --exec_mode {config.exec_mode}")
    if config.exec_mode != "predict" and len(config.load_ckpt_path) > 1:
        raise UserError("--load_ckpt_path: several checkpoints are for --exec_mode predict, which averages them")
    if config.exec_mode != "report" and config.compare:
        raise UserError("--log_dir: several folders are for --exec_mode report, which compares their runs")
    if config.exec_mode != "evaluate" and "subset" in given:
        raise UserError(f"--subset is of --exec_mode evaluate, not of {config.exec_mode}")
    for name in PREDICT_FLAGS:
        if config.exec_mode != "predict" and name in given:
            raise UserError(f"--{name} is of --exec_mode predict, not of {config.exec_mode}")
        if config.exec_mode == "predict" and name in ("scan", "output") and getattr(config, name) is None:
            raise UserError(f"--exec_mode predict needs --{name}")
    if "amp_dtype" in given and config.amp_dtype != "auto" and not config.amp:
        raise UserError(f"--amp_dtype {config.amp_dtype} does nothing without --amp; add --amp or drop it")
    if "lamb_betas" in given and config.optimizer != "lamb":
        raise UserError(f"--lamb_betas is of --optimizer lamb, not of {config.optimizer}")
    if config.lr_decay_epochs and list(config.lr_decay_epochs) != sorted(set(config.lr_decay_epochs)):
        raise UserError("--lr_decay_epochs must rise from one to the next")
    if config.cudnn_benchmark and config.cudnn_deterministic:
        raise UserError("--cudnn_benchmark picks algorithms by time, --cudnn_deterministic forbids that; choose one")
    if not config.overlap < 1:
        raise UserError(f"--overlap {config.overlap:g}: windows must advance; use a value below 1 (MLPerf: 0.5)")
    if config.resume and checkpoint_path(config) is None:
        raise UserError("--resume, but with --ckpt_every never or --benchmark this run keeps no checkpoint")
    if config.init_from is not None and config.load_ckpt_path:
        raise UserError("--init_from takes weights alone, --load_ckpt_path a run's whole state; give one of them")
    for flag, specs in (("trackers", config.trackers), ("callbacks", config.callbacks)):
        if twice := [spec for spec in specs if specs.count(spec) > 1]:
            raise UserError(f"--{flag} names {twice[0]} twice")
    path = config.save_ckpt_path
    if path is not None and path.is_dir():
        raise UserError(f"--save_ckpt_path {path} is a folder; give a file, such as {path / 'checkpoint.pth'}")


def checkpoint_path(config: RunConfig) -> Path | None:
    """Where this run keeps its checkpoints; None: it makes none."""
    if config.save_ckpt_path is not None:
        return config.save_ckpt_path
    return None if config.ckpt_every == "never" or config.benchmark else config.log_dir / "checkpoint.pth"
