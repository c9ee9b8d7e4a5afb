"""RunConfig <-> the command line. `@FILE` anywhere reads arguments from a file: one flag a line, # comments."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn

from errors import UserError
from runtime.flags import axes, interval, number
from runtime.rulesets import DEFAULT_RULESET, RULESETS

SEED_LIMIT = 2**31
PLACEHOLDER_ORG = "SUBMISSION_ORG_PLACEHOLDER"


@dataclass(frozen=True)
class RunConfig:
    """Every flag of `main.py`, under its own name; what each means stands in `make_parser`.

    `compare` has none: it is what `--log_dir` names beside the first folder.
    """

    data_dir: Path
    log_dir: Path
    compare: tuple[Path, ...]
    save_ckpt_path: Path | None
    load_ckpt_path: tuple[Path, ...]
    resume: bool
    ckpt_every: str
    ckpt_keep: int
    loader: str
    local_rank: int
    exec_mode: str
    batch_size: int
    ga_steps: int
    epochs: int
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
    lamb_betas: tuple[float, float]
    weight_decay: float
    model: str
    normalization: str
    activation: str
    include_background: bool
    verbose: bool
    no_report: bool
    trackers: tuple[str, ...]
    augment: str
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
    return str(value) if isinstance(value, Path) else value


PREDICT_FLAGS = ("scan", "output", "series", "test_time_flips", "save_probabilities", "max_memory_gb")
# What belongs to a trained network rather than to a run: `--exec_mode evaluate` takes these from the checkpoint
# unless they are given, so that the score is the one that training saw.
NETWORK_FLAGS = (
    "model", "normalization", "activation", "include_background", "layout", "val_input_shape", "overlap", "amp",
    "amp_dtype",
)  # fmt: skip


def with_checkpoint_network(config: RunConfig, given: frozenset[str], stored: dict[str, Any]) -> RunConfig:
    """The configuration with a checkpoint's `NETWORK_FLAGS`, but for those given on the command line."""
    taken: dict[str, Any] = {name: stored[name] for name in NETWORK_FLAGS if name in stored and name not in given}
    return replace(config, **taken)


class _Parser(argparse.ArgumentParser):
    """Reads `@FILE` with # comments, and tells a mistake in one line instead of a page of usage."""

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        try:
            return shlex.split(arg_line, comments=True)
        except ValueError as error:
            raise UserError(f"an argument file has a line {arg_line!r} with {error}") from None

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (main.py --help lists the flags)")


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
    for action in parser._actions:  # the second pass: without defaults, only what was given remains
        action.default = argparse.SUPPRESS
    given = frozenset(vars(parser.parse_args(arguments)))
    for name in ("input_shape", "val_input_shape", "lr_decay_epochs", "lamb_betas", "trackers", "load_ckpt_path"):
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
    if twice := [spec for spec in config.trackers if config.trackers.count(spec) > 1]:
        raise UserError(f"--trackers names {twice[0]} twice")
    path = config.save_ckpt_path
    if path is not None and path.is_dir():
        raise UserError(f"--save_ckpt_path {path} is a folder; give a file, such as {path / 'checkpoint.pth'}")


def checkpoint_path(config: RunConfig) -> Path | None:
    """Where this run keeps its checkpoints; None: it makes none."""
    if config.save_ckpt_path is not None:
        return config.save_ckpt_path
    return None if config.ckpt_every == "never" or config.benchmark else config.log_dir / "checkpoint.pth"


def make_parser() -> argparse.ArgumentParser:
    """The command line: every flag with its meaning and its default."""
    parser = _Parser(
        prog="main.py", fromfile_prefix_chars="@", allow_abbrev=False, description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    _add_io(parser.add_argument_group("input and output"))
    _add_run(parser.add_argument_group("run"))
    _add_optimizer(parser.add_argument_group("optimizer"))
    _add_network(parser.add_argument_group("network and the rest"))
    _add_prediction(parser.add_argument_group("prediction"))
    return parser


def _add_io(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    # The two variables are how the Docker image says where its volumes are mounted.
    add("--data_dir", type=Path, default=os.environ.get("UNET3D_DATA_DIR") or None,
        help="preprocessed volumes (required, but for --loader synthetic or where UNET3D_DATA_DIR is set)")  # fmt: skip
    add("--log_dir", type=Path, nargs="+", default=os.environ.get("UNET3D_LOG_DIR", "/tmp"), metavar="LOG_DIR",
        help="unet3d.log (MLPerf), log.jsonl, run.json, report.html; or UNET3D_LOG_DIR; several to compare their runs, "
        "with --exec_mode report")  # fmt: skip
    add("--save_ckpt_path", type=Path,
        help="where to keep the last and the best state, in one file (None: LOG_DIR/checkpoint.pth)")  # fmt: skip
    add("--load_ckpt_path", type=Path, nargs="+", default=(), metavar="FILE",
        help="train: go on from its last state; evaluate: score it; predict: the mean of all")  # fmt: skip
    add("--resume", action="store_true",
        help="go on from this run's newest good checkpoint; where it has none yet, start afresh")  # fmt: skip
    add("--ckpt_every", type=interval, default="10m",
        help="10m: every ten minutes, in the middle of an epoch too; 2e: every two epochs; never: only where "
        "--save_ckpt_path is given, and then for a new best and at the end")  # fmt: skip
    add("--ckpt_keep", type=number(int, 1), default=2, help="so many checkpoints are kept: FILE, FILE.1, …")
    add("--loader", default="pytorch",
        help="pytorch (crops read from disk by --num_workers processes), device (all volumes in device memory in 16 "
        "bit, samples made there), or synthetic (random volumes, no disk)")  # fmt: skip
    add(
        "--local_rank", type=number(int, 0), default=os.environ.get("LOCAL_RANK", "0"),
        help="this process's GPU on its machine (torchrun sets LOCAL_RANK)",
    )  # fmt: skip


def _add_run(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--exec_mode", choices=("train", "evaluate", "predict", "report"), default="train", help="what to do")
    add("--batch_size", type=number(int, 1), default=2, help="samples a rank and micro-batch")
    add("--ga_steps", type=number(int, 1), default=1, help="micro-batches accumulated to one step")
    add("--epochs", type=number(int, 1), default=1, help="at most so many epochs")
    add(
        "--evaluate_every", "--eval_every", type=number(int, 1),
        help="epochs from one evaluation to the next (None: 20 of 168 samples, by MLPerf's rule)",
    )  # fmt: skip
    add("--start_eval_at", type=number(int, 1), help="first epoch with an evaluation (None: 1000 of 168 samples)")
    add("--quality_threshold", type=number(float, 0, 1), default=0.908, help="mean Dice that ends the run")
    add("--layout", choices=("NCDHW", "NDHWC"), default="NCDHW", help="NDHWC: channels-last memory, same numbers")
    shape = {"type": number(int, 1), "nargs": 3, "metavar": ("D", "H", "W"), "default": (128, 128, 128)}
    add("--input_shape", **shape, help="voxels of a training crop")
    add("--val_input_shape", **shape, help="voxels of an evaluation window")
    add("--val_batch_size", type=number(int, 1), default=4, help="evaluation windows computed at once")
    add("--seed", type=number(int, -1, SEED_LIMIT - 1), default=-1, help="master seed; -1: from the operating system")
    add("--num_workers", type=number(int, 0), default=8, help="loader processes a rank")
    add("--benchmark", action="store_true", help="time every iteration, evaluate nothing, report samples/s and latency")
    add("--warmup_steps", type=number(int, 0), default=200, help="iterations before --benchmark's clock starts")
    add("--untimed_steps", type=number(int, 0), default=1,
        help="steps on made-up data before the clock starts, that leave no trace: compiling and tuning")  # fmt: skip
    add("--compile", action="store_true", help="torch.compile the network (minutes, before the clock starts)")
    add("--amp", action="store_true", help="16-bit arithmetic where it is safe, loss and statistics in fp32")
    add(
        "--amp_dtype", choices=("auto", "bf16", "fp16"), default="auto",
        help="auto: bf16 where the device computes in it, else fp16 with a loss scaler (on a CPU: else fp32)",
    )  # fmt: skip


def _add_optimizer(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--optimizer", choices=("sgd", "adam", "lamb"), default="sgd", help="sgd is Nesterov's")
    add("--learning_rate", type=number(float, 0), default=1.0, help="after warm-up")
    add("--momentum", type=number(float, 0, 1), default=0.9, help="of sgd")
    add("--init_learning_rate", type=number(float, 0), default=1e-4, help="where warm-up starts")
    add("--lr_warmup_epochs", type=number(int, 0), default=0, help="epochs of linear warm-up")
    add("--lr_decay_epochs", type=number(int, 1), nargs="*", default=(), help="epochs after which the rate decays")
    add("--lr_decay_factor", type=number(float, 0), default=1.0, help="what each decay multiplies the rate with")
    add("--lamb_betas", type=number(float, 0, 1, below=True), nargs=2, default=(0.9, 0.999), help="of lamb")
    add("--weight_decay", type=number(float, 0), default=0.0, help="L2 penalty (lamb: decoupled)")


def _add_network(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--model", default="unet3d", help="network spec, such as 'unet3d(filters=(16,32,64,128))'")
    add("--normalization", choices=("instancenorm", "batchnorm"), default="instancenorm", help="of unet3d")
    add("--activation", choices=("relu", "leaky_relu"), default="relu", help="of unet3d; leaky_relu: slope 0.01")
    add("--include_background", action="store_true", help="class 0 counts in the Dice term of the loss")
    add(
        "--verbose", "-v", action=argparse.BooleanOptionalAction, default=sys.stderr.isatty(),
        help="progress bars and a line an epoch (default: on a terminal)",
    )  # fmt: skip
    add("--no_report", action="store_true", help="write no LOG_DIR/report.html at the end of the run")
    add("--trackers", nargs="*", default=("mlperf", "jsonl"), metavar="TRACKER",
        help="who records the run beside run.json: mlperf, jsonl, tensorboard, wandb, mlflow, each with its arguments, "
        "such as 'wandb(project=\"kits\", mode=\"offline\")', or one's own package.module:name")  # fmt: skip
    add("--augment", default="mlperf",
        help="augmentation spec, such as \"mlperf(flips='HW')\" where a class has a direction along D")  # fmt: skip
    add("--oversampling", type=number(float, 0, 1), default=0.4, help="share of crops around the foreground")
    add("--overlap", type=number(float, 0, 1), default=0.5, help="of neighbouring evaluation windows, below 1")
    add("--cudnn_benchmark", action="store_true", help="let cuDNN time its algorithms")
    add("--cudnn_deterministic", action="store_true", help="the same bits from the same run on a GPU")
    add(
        "--division", choices=("auto", "closed", "open"), default="auto",
        help="MLPerf division; auto: closed where nothing departs from its rules, else open, with the reasons logged",
    )  # fmt: skip
    add(
        "--ruleset",
        choices=RULESETS,
        default=DEFAULT_RULESET,
        help="MLPerf's rules that the log follows: epochs are logged in epochs up to 3.0.0, in samples from 3.1.0 on",
    )
    add("--submission_org", default=PLACEHOLDER_ORG, help="who submits")
    add("--submission_platform", help="on what (None: the devices' own name)")
    add("--submission_status", choices=("onprem", "cloud", "preview", "research"), default="onprem", help="MLPerf's")


def _add_prediction(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--scan", type=Path, help="what to segment: a NIfTI file, a folder of them, or a folder of DICOM series")
    add("--output", type=Path,
        help="the mask: a .nii.gz file, a .dcm file (DICOM-SEG, of a DICOM series), or a folder, in which masks have "
        "their scans' names")  # fmt: skip
    add("--series", metavar="NAME", help="the DICOM series, by number, UID or description; all: each one")
    add("--checkpoint", choices=("best", "last"), default="best", help="which state evaluate and predict take")
    add("--test_time_flips", type=axes, default="", metavar="AXES",
        help="average over all flips of these axes, such as HW; of none along which a class has a way")  # fmt: skip
    add(
        "--save_probabilities", action="store_true", help="each class's probabilities too, in MASK_probabilities.nii.gz"
    )
    add("--max_memory_gb", type=number(float, 0.1),
        help="of the host and of the GPU, at most, in GiB (None: what is free)")  # fmt: skip
