"""The configuration of a run, made from the command line."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.registry import Spec
from runtime.flag_fields import Flag, flag_names, make_parser
from runtime.io_flags import NO_DATA, InputOutputFlags, LoggingFlags, PredictionFlags, SubmissionFlags
from runtime.training_flags import NetworkFlags, OptimizerFlags, SamplingFlags, TrainingFlags

DESCRIPTION = (
    "MLPerf's 3D U-Net training benchmark (KiTS19): trains to a target Dice, evaluates, predicts, reports, exports. "
    "@FILE reads arguments from a file: flags with their values, # comments."
)
# Former names of flags, as old checkpoints and run records hold them.
RENAMED_FLAGS = {"subset": "eval_split", "untimed_steps": "prewarm_steps"}
# Left out of `run.args`: they belong to one process or one start of a run.
NOT_REPEATED = ("exec_mode", "local_rank", "resume", "verbose")
# Suffixes of `--output` with --exec_mode export; "" is a folder.
EXPORT_SUFFIXES = (".onnx", ".safetensors", "")


@dataclass(frozen=True, kw_only=True)
class RunConfig(  # the last base's fields come first
    PredictionFlags,
    SubmissionFlags,
    SamplingFlags,
    LoggingFlags,
    NetworkFlags,
    OptimizerFlags,
    TrainingFlags,
    InputOutputFlags,
):
    """Every flag of `main.py` under its own name.

    A flag is described by its field alone: default, help, values, and how MLPerf's rules, a resume and other modes
    treat it. `compare` is not a flag: it holds the folders that `--log_dir` names after the first.
    """

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as plain Python values; paths and specs as text."""
        return {f.name: as_plain(getattr(self, f.name)) for f in fields(self)}


def as_plain(value: Any) -> Any:
    """Returns a field's value with paths and specs as text."""
    if isinstance(value, tuple):
        return tuple(map(as_plain, value))
    return str(value) if isinstance(value, Path | Spec) else value


def format_value(value: object) -> str:
    """Returns a flag's value as a user types it; "none" for an empty list."""
    return " ".join(map(str, value)) or "none" if isinstance(value, list | tuple) else str(value)


# Evaluation and prediction take these from the checkpoint unless they are given: the network is then scored as training
# scored it.
NETWORK_FLAGS = flag_names(RunConfig, network=True)


def with_checkpoint_network(config: RunConfig, given: frozenset[str], stored: dict[str, Any]) -> RunConfig:
    """Returns the configuration with a checkpoint's `NETWORK_FLAGS`, except those given on the command line.

    Specs among them are untrusted: they may not import whatever they name.
    """
    kept: dict[str, Any] = {name: stored[name] for name in NETWORK_FLAGS if name in stored and name not in given}
    kept = {name: tuple(value) if isinstance(value, list) else value for name, value in kept.items()}  # lists of JSON
    kept |= {name: Spec(kept[name]) for name in ("model", "loss") if name in kept}
    return replace(config, **kept)


def with_current_names(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a stored configuration with renamed flags under their present names."""
    return {RENAMED_FLAGS.get(name, name): value for name, value in stored.items()}


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[RunConfig, frozenset[str]]:
    """Returns the command line as a RunConfig, and the names of the flags that were given on it.

    Raises:
        UserError: an unknown flag, a bad value, or flags that contradict each other.
    """
    try:
        values = vars(make_parser(RunConfig, "main.py", DESCRIPTION).parse_args(argv))
    except RecursionError:
        raise UserError("an argument file includes itself") from None
    except UnicodeDecodeError:  # Windows' shell writes UTF-16
        raise UserError("an argument file is not UTF-8 text; save it as UTF-8") from None
    given = frozenset(values)
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    if "log_dir" in values:
        values["log_dir"], *more = values["log_dir"]
        values["compare"] = tuple(more)
    config = RunConfig(**values)
    if config.data_dir == NO_DATA and config.exec_mode in ("train", "evaluate"):
        if config.exec_mode != "train" or config.loader != "synthetic":
            raise UserError("--data_dir is required: the folder that preprocess_dataset.py wrote")
        config = replace(config, data_dir=Path("synthetic"))
    _check(config, given)
    return config, given


def to_argument_file(config: RunConfig, seed: int) -> str:
    """Returns a file with which `main.py @FILE` repeats a training run; flags with their default are comments.

    Args:
        seed: the run's master seed.
    """
    lines = ["# The flags of a run: python3 main.py @run.args repeats it. Those after a # have their default."]
    for f in fields(RunConfig):
        meta: Flag = f.metadata["flag"]
        value = seed if f.name == "seed" else getattr(config, f.name)
        if not meta.help or meta.mode or f.name in NOT_REPEATED or value is None or value is f.default is False:
            continue
        if config.loader == "synthetic" and f.name == "data_dir":
            continue
        values = [] if isinstance(value, bool) else value if isinstance(value, tuple) else [value]
        words = [str(one.absolute() if isinstance(one, Path) else one) for one in values]
        line = shlex.join([f"--{'no-' * (value is False)}{f.name}", *words])
        lines.append(f"# {line}" if value == f.default else line)
    return "\n".join(lines) + "\n"


def check_paths(config: RunConfig) -> None:
    """Refuses input paths that do not exist. The modules that read them import torch, which takes seconds."""
    reads_data = config.exec_mode == "evaluate" or (config.exec_mode == "train" and config.loader != "synthetic")
    if reads_data and not config.data_dir.is_dir():
        raise UserError(f"--data_dir {config.data_dir}: no such folder")
    if config.exec_mode == "export" and config.output is not None and config.output.exists():
        raise UserError(f"--output {config.output} exists already; remove it, or give another name")
    if config.exec_mode == "report" or config.resume:
        return  # a report goes on without its images; a resumed run has its own checkpoint
    named = {"--load_ckpt_path": config.load_ckpt_path, "--init_from": (config.init_from,)}
    for flag, paths in (named | {"--splits": (config.splits,)}).items():
        for path in paths:
            if path is not None and not path.exists():
                raise UserError(f"{flag} {path}: no such file")


def _check(config: RunConfig, given: frozenset[str]) -> None:
    """Refuses flags that contradict each other."""
    _check_mode(config, given)
    _check_folds(config, given)
    if config.eval_ranks:
        _check_eval_ranks(config)
    if "amp_dtype" in given and config.amp_dtype != "auto" and not config.amp:
        raise UserError(f"--amp_dtype {config.amp_dtype} has no effect without --amp; add --amp or drop it")
    if "lamb_betas" in given and config.optimizer != "lamb":
        raise UserError(f"--lamb_betas applies only to --optimizer lamb, not to {config.optimizer}")
    if config.lr_decay_epochs and list(config.lr_decay_epochs) != sorted(set(config.lr_decay_epochs)):
        raise UserError("--lr_decay_epochs must be in increasing order, without repetition")
    if config.cudnn_benchmark and config.cudnn_deterministic:
        raise UserError(
            "--cudnn_benchmark chooses algorithms by their time, which --cudnn_deterministic forbids; drop one of them"
        )
    if config.compile and config.ranks_per_sample > 1:
        raise UserError("--compile does not go with --ranks_per_sample, whose layers communicate; drop one of them")
    if not config.overlap < 1:
        raise UserError(f"--overlap {config.overlap:g}: windows must advance; use a value below 1 (MLPerf: 0.5)")
    if config.resume and checkpoint_path(config) is None:
        raise UserError("--resume needs checkpoints, but with --ckpt_every never or --benchmark this run writes none")
    if config.init_from is not None and config.load_ckpt_path:
        raise UserError(
            "--init_from takes only the weights of a checkpoint, --load_ckpt_path the whole state of a run; drop one "
            "of them"
        )
    for flag, specs in (("trackers", config.trackers), ("callbacks", config.callbacks)):
        if repeated := [spec for spec in specs if specs.count(spec) > 1]:
            raise UserError(f"--{flag} names {repeated[0]} twice")
    path = config.save_ckpt_path
    if path is not None and path.is_dir():
        raise UserError(f"--save_ckpt_path {path} is a folder; give a file, such as {path / 'checkpoint.pth'}")


def _check_mode(config: RunConfig, given: frozenset[str]) -> None:
    """Refuses flags that do not go with `--exec_mode`, and their absence where it needs them."""
    mode = config.exec_mode
    if mode in ("evaluate", "predict", "export") and not config.load_ckpt_path:
        raise UserError(f"--exec_mode {mode} needs --load_ckpt_path, the checkpoint to {mode}")
    if mode != "train" and config.benchmark:
        raise UserError(f"--benchmark measures training; it does not go with --exec_mode {mode}")
    if mode not in ("evaluate", "predict") and len(config.load_ckpt_path) > 1:
        raise UserError(
            "--load_ckpt_path: only --exec_mode evaluate and predict take several checkpoints, and average them"
        )
    if mode != "report" and config.compare:
        raise UserError("--log_dir: only --exec_mode report takes several folders, and compares their runs")
    for f in fields(RunConfig):
        modes = f.metadata["flag"].mode.split()
        if f.name in given and modes and mode not in modes:
            raise UserError(f"--{f.name} requires --exec_mode {' or '.join(modes)}, not {mode}")
    for name in {"predict": ("scan", "output"), "export": ("output",)}.get(mode, ()):
        if getattr(config, name) is None:
            raise UserError(f"--exec_mode {mode} needs --{name}")
    if mode == "export" and config.output is not None and config.output.suffix not in EXPORT_SUFFIXES:
        raise UserError(
            f"--output {config.output}: unknown format {config.output.suffix}; give a .onnx or .safetensors file, or a "
            "folder without a dot in its name for a MONAI bundle"
        )
    if "export_window" in given and config.output is not None and config.output.suffix == ".safetensors":
        raise UserError(
            "--export_window: a .safetensors file holds weights alone, for windows of any size; leave it out"
        )


def _check_folds(config: RunConfig, given: frozenset[str]) -> None:
    """Refuses flags of folds that contradict each other."""
    named = [f"--{name}" for name in ("folds", "splits", "fold", "folds_of") if name in given]
    if not named:
        return
    if config.exec_mode in ("predict", "report", "export") or config.loader == "synthetic":
        where = "--loader synthetic" if config.loader == "synthetic" else f"--exec_mode {config.exec_mode}"
        raise UserError(f"{named[0]} chooses cases of --data_dir; it does not go with {where}")
    if config.folds and config.splits is not None:
        raise UserError("--folds makes folds, --splits reads them from a file; drop one of them")
    if not config.folds and config.splits is None:
        raise UserError(f"{named[0]} needs --folds, the number of folds, or --splits, a file with them")
    if config.fold is None:
        raise UserError(f"{named[0]} needs --fold, the fold to evaluate, counted from 0")
    if config.folds and config.fold >= config.folds:
        raise UserError(
            f"--fold {config.fold}: folds are counted from 0, so the last of {config.folds} is {config.folds - 1}"
        )
    if config.splits is not None and "folds_of" in given:
        raise UserError("--folds_of applies only to --folds: the file of --splits names the cases")


def _check_eval_ranks(config: RunConfig) -> None:
    """Refuses what does not go with evaluations whose scores arrive while training goes on."""
    flag = f"--eval_ranks {config.eval_ranks}"
    if config.exec_mode != "train":
        raise UserError(f"{flag} applies only to training: with --exec_mode {config.exec_mode} all ranks do the same")
    if config.benchmark or config.loader == "synthetic":
        reason = "--benchmark" if config.benchmark else "--loader synthetic"
        raise UserError(f"{flag}: nothing is evaluated with {reason}; drop one of them")
    if config.lr_schedule.partition("(")[0] == "plateau":
        raise UserError(
            f"{flag}: the rates of --lr_schedule plateau would depend on when scores arrive; drop one of them"
        )
    for spec in config.callbacks:
        if spec.partition("(")[0] in ("top_k", "train_dice"):
            raise UserError(
                f"{flag}: --callbacks {spec} needs the weights of the evaluated epoch, but training has gone on when "
                "the scores arrive; drop one of them"
            )


def checkpoint_path(config: RunConfig) -> Path | None:
    """Returns the path of the checkpoints that this run writes; None if it writes none."""
    if config.save_ckpt_path is not None:
        return config.save_ckpt_path
    return None if config.ckpt_every == "never" or config.benchmark else config.log_dir / "checkpoint.pth"
