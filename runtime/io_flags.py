"""Flags of `main.py`: input and output, logging and callbacks, MLPerf submission, prediction."""

from __future__ import annotations

import argparse
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from common.cli import number, renamed_values
from common.errors import UserError
from runtime.flag_fields import COUNT, POSITIVE, flag
from runtime.mlperf.rulesets import DEFAULT_RULESET, RULESETS

# The default of --data_dir: predict and report need none.
NO_DATA = Path("none")
# The default of --submission_org; no result may have it.
PLACEHOLDER_ORG = "SUBMISSION_ORG_PLACEHOLDER"
# Former names of callbacks.
RENAMED_CALLBACKS = {"rate_monitor": "lr_monitor", "training_dice": "train_dice"}


def axes(text: str) -> str:
    """Checks for some of D, H and W, each at most once."""
    if not set(text) <= set("DHW") or len(set(text)) != len(text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected some of D, H and W, such as HW")
    return text


def interval(text: str) -> str:
    """Checks `10m`, `2e` or `never`; the text is kept, so that the log states what was typed."""
    parse_interval(text)
    return text


def parse_interval(text: str) -> tuple[float, int]:
    """Returns `--ckpt_every` as (minutes, epochs): the one that is not given is 0, and both are with `never`."""
    if text == "never":
        return 0.0, 0
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([me])", text)
    if match is None or not float(match[1]) or (match[2] == "e" and "." in match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is neither minutes (10m), nor epochs (2e), nor never")
    return (float(match[1]), 0) if match[2] == "m" else (0.0, int(match[1]))


def _launched_rank() -> int:
    """Returns the rank on this machine, which torchrun sets."""
    try:
        return int(COUNT(os.environ.get("LOCAL_RANK", "0")))
    except argparse.ArgumentTypeError as error:
        raise UserError(f"argument --local_rank: {error} (from the variable LOCAL_RANK)") from None


@dataclass(frozen=True, kw_only=True)
class InputOutputFlags:
    """Folders, checkpoints and the source of samples."""

    # The Docker image sets UNET3D_DATA_DIR and UNET3D_LOG_DIR to the mount points of its volumes.
    data_dir: Path = flag(
        lambda: Path(os.environ.get("UNET3D_DATA_DIR") or NO_DATA),
        "folder of preprocessed volumes; required to train (except with --loader synthetic) and to evaluate "
        "(default: $UNET3D_DATA_DIR)",
        group="input and output",
        metavar="DIR",
        resume="incidental",
    )
    exclude: tuple[str, ...] = flag(
        (),
        "cases to leave out of training and evaluation; 23 stands for KiTS19's case_00023",
        nargs="+",
        metavar="CASE",
        closed=True,
        resume="structural",
    )
    folds: int = flag(
        0,
        "cross-validation: divide all labelled cases, those that train and those that evaluate, into N folds as "
        "nnU-Net does, and train on all but that of --fold, which is evaluated; 0: the data set's own split",
        type=number(int, 2),
        closed=True,
        resume="structural",
    )
    fold: int | None = flag(None, "the fold to evaluate, counted from 0", type=COUNT, resume="structural")
    folds_of: str = flag(
        "all",
        "cases that --folds divides: all, or those that train alone, so that the evaluation cases stay held back "
        "(--eval_split test)",
        choices=("all", "train"),
        resume="structural",
    )
    splits: Path | None = flag(
        None, "the folds as a file, nnU-Net's splits_final.json, in place of --folds", closed=True, resume="incidental"
    )
    log_dir: Path = flag(
        lambda: Path(os.environ.get("UNET3D_LOG_DIR", "/tmp")),
        "folder for unet3d.log (MLPerf), log.jsonl, run.json and report.html; with --exec_mode report several, whose "
        "runs are compared, and whose folds are joined (default: $UNET3D_LOG_DIR, else /tmp)",
        nargs="+",
        metavar="DIR",
        resume="incidental",
    )
    compare: tuple[Path, ...] = flag((), "", resume="incidental")
    save_ckpt_path: Path | None = flag(
        None,
        "file of the newest checkpoint, with the last and the best state; without --resume, the checkpoints of an "
        "earlier run are renamed (checkpoint.1.pth) (default: DIR/checkpoint.pth, with the DIR of --log_dir)",
        resume="incidental",
    )
    load_ckpt_path: tuple[Path, ...] = flag(
        (),
        "checkpoint to continue training from, to evaluate or to predict with; with --exec_mode evaluate or predict "
        "several, whose probabilities are averaged",
        nargs="+",
        closed=True,
        resume="incidental",
    )
    init_from: Path | None = flag(
        None,
        "checkpoint whose weights a new run starts from; its output layer may have other classes, its input "
        "layer other channels",
        closed=True,
        resume="incidental",
    )
    freeze: tuple[str, ...] = flag(
        (),
        "parameters to leave untrained: regular expressions that match a whole name, or all_but_output",
        nargs="+",
        metavar="REGEX",
        closed=True,
        resume="structural",
    )
    resume: bool = flag(
        False, "continue from this run's newest intact checkpoint; start afresh if it has none", resume="incidental"
    )
    ckpt_every: str = flag(
        "10m",
        "time between checkpoints: 10m is ten minutes, also within an epoch; 2e is two epochs; never saves only with "
        "--save_ckpt_path, at a new best score and at the end",
        type=interval,
        metavar="INTERVAL",
        resume="incidental",
    )
    ckpt_keep: int = flag(
        2,
        "number of checkpoints to keep: the newest at --save_ckpt_path, earlier ones named by their step "
        "(checkpoint_000123.pth)",
        type=POSITIVE,
        resume="incidental",
    )
    loader: str = flag(
        "pytorch",
        "source of training samples: pytorch (crops read from disk by --num_workers processes), device (volumes held "
        "in device memory in 16 bits, samples made there) or synthetic (random volumes, no disk)",
        resume="order",
    )
    local_rank: int = flag(
        _launched_rank,
        "index of this process's GPU on its machine (default: $LOCAL_RANK, else 0; torchrun sets it)",
        type=COUNT,
        resume="incidental",
    )


@dataclass(frozen=True, kw_only=True)
class LoggingFlags:
    """What a run prints and records, and what may end it."""

    verbose: bool = flag(
        lambda: sys.stderr.isatty(),
        "show progress bars and one line per epoch (default: on a terminal)",
        group="logging and callbacks",
        action=argparse.BooleanOptionalAction,
        aliases=("-v",),
        resume="incidental",
    )
    no_report: bool = flag(False, "do not write report.html at the end of the run", resume="incidental")
    trackers: tuple[str, ...] = flag(
        ("mlperf", "jsonl"),
        "records of the run in addition to run.json: mlperf, jsonl, tensorboard, wandb, mlflow, with arguments such as "
        '\'wandb(project="kits", mode="offline")\', or your own package.module:name',
        metavar="SPEC",
        resume="incidental",
    )
    callbacks: tuple[str, ...] = flag(
        (),
        "callbacks: 'early_stopping(patience=20)', 'top_k(k=3)', lr_monitor, train_dice or your own "
        "package.module:name",
        type=renamed_values("--callbacks", RENAMED_CALLBACKS),
        metavar="SPEC",
        closed=True,
    )


@dataclass(frozen=True, kw_only=True)
class SubmissionFlags:
    """Division, rules and submitter of a result."""

    division: str = flag(
        "auto",
        "MLPerf division; auto is closed if the run follows the closed division's rules, else open, with the "
        "violations logged",
        group="MLPerf submission",
        choices=("auto", "closed", "open"),
        resume="incidental",
    )
    ruleset: str = flag(
        DEFAULT_RULESET,
        "MLPerf rules that the log follows; they count in epochs up to 3.0.0 and in samples from 3.1.0",
        choices=RULESETS,
    )
    submission_org: str = flag(PLACEHOLDER_ORG, "submitting organization", resume="incidental")
    submission_platform: str | None = flag(None, "system name (default: the devices' own name)", resume="incidental")
    submission_status: str = flag(
        "onprem",
        "MLPerf's status of the system",
        choices=("onprem", "cloud", "preview", "research"),
        resume="incidental",
    )


@dataclass(frozen=True, kw_only=True)
class PredictionFlags:
    """Scans to segment, and the state to predict with or to evaluate."""

    scan: Path | None = flag(
        None,
        "scans to segment: a NIfTI file, a folder of NIfTI files, or a folder of DICOM series",
        group="prediction",
        mode="predict",
    )
    output: Path | None = flag(
        None,
        "masks to write: a .nii.gz file, a .dcm file (DICOM-SEG, for a DICOM series), or a folder, where masks have "
        "the names of their scans; with --exec_mode export the network: a .onnx or .safetensors file, or a folder for "
        "a MONAI bundle",
        mode="predict export",
    )
    series: str | None = flag(None, "DICOM series by number, UID or description, or all", mode="predict")
    checkpoint: str = flag(
        "best",
        "which state of a checkpoint to use for evaluation, prediction or --init_from",
        choices=("best", "last"),
        resume="incidental",
    )
    test_time_flips: str = flag(
        "",
        "average over all flips of these axes, such as HW, in evaluation and prediction; leave out axes along which a "
        "class has a direction",
        type=axes,
        metavar="AXES",
        closed=True,
        network=True,
    )
    save_probabilities: bool = flag(
        False, "also write each class's probabilities, to MASK_probabilities.nii.gz", mode="predict"
    )
    max_memory_gb: float | None = flag(
        None,
        "maximum memory to use, on the host and on the GPU each, in GiB (default: all that is free)",
        type=number(float, 0.1),
        metavar="GIB",
        mode="predict",
    )
    export_window: str = flag(
        "fixed",
        "windows that an exported network takes: those of --val_input_shape alone, or of any shape that it can halve "
        "often enough",
        choices=("fixed", "dynamic"),
        mode="export",
    )
