"""The command line: every flag with its meaning and its default. `@FILE` anywhere reads arguments from a file."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from common.cli import Parser
from common.errors import UserError
from runtime.flags import PLACEHOLDER_ORG, SEED_LIMIT, axes, interval, number, trusted_spec
from runtime.mlperf.rulesets import DEFAULT_RULESET, RULESETS


class _FileParser(Parser):
    """Reads `@FILE` with # comments."""

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        try:
            return shlex.split(arg_line, comments=True)
        except ValueError as error:
            raise UserError(f"an argument file has a line {arg_line!r} with {error}") from None


def make_parser() -> argparse.ArgumentParser:
    """The command line: every flag with its meaning and its default."""
    parser = _FileParser(
        prog="main.py",
        fromfile_prefix_chars="@",
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_io(parser.add_argument_group("input and output"))
    _add_run(parser.add_argument_group("run"))
    _add_optimizer(parser.add_argument_group("optimizer"))
    _add_network(parser.add_argument_group("network and the rest"))
    _add_prediction(parser.add_argument_group("prediction"))
    return parser


def _add_io(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    # The two variables are how the Docker image says where its volumes are mounted.
    add(
        "--data_dir",
        type=Path,
        default=os.environ.get("UNET3D_DATA_DIR") or None,
        help="preprocessed volumes (required, but for --loader synthetic or where UNET3D_DATA_DIR is set)",
    )
    add(
        "--log_dir",
        type=Path,
        nargs="+",
        default=os.environ.get("UNET3D_LOG_DIR", "/tmp"),
        metavar="LOG_DIR",
        help="unet3d.log (MLPerf), log.jsonl, run.json, report.html; or UNET3D_LOG_DIR; several to compare their runs, "
        "with --exec_mode report",
    )
    add(
        "--save_ckpt_path",
        type=Path,
        help="file of the newest checkpoint, with the last and the best state (None: LOG_DIR/checkpoint.pth); without "
        "--resume, an earlier run's checkpoints are renamed (checkpoint.1.pth)",
    )
    add(
        "--load_ckpt_path",
        type=Path,
        nargs="+",
        default=(),
        metavar="FILE",
        help="train: go on from its last state; evaluate: score it; predict: the mean of all",
    )
    add(
        "--init_from",
        type=Path,
        metavar="FILE",
        help="start from these weights alone, where the run has no state of its own to go on from; the output layer "
        "may be of other classes",
    )
    add(
        "--freeze",
        nargs="+",
        default=(),
        metavar="REGEX",
        help="parameters that are not trained, by expressions that match a whole name; or all_but_output",
    )
    add(
        "--resume",
        action="store_true",
        help="go on from this run's newest good checkpoint; where it has none yet, start afresh",
    )
    add(
        "--ckpt_every",
        type=interval,
        default="10m",
        help="10m: every ten minutes, in the middle of an epoch too; 2e: every two epochs; never: only where "
        "--save_ckpt_path is given, and then for a new best and at the end",
    )
    add(
        "--ckpt_keep",
        type=number(int, 1),
        default=2,
        help="number of checkpoints to keep: the newest at --save_ckpt_path, earlier ones named by their step "
        "(checkpoint_000123.pth)",
    )
    add(
        "--loader",
        default="pytorch",
        help="pytorch (crops read from disk by --num_workers processes), device (all volumes in device memory in 16 "
        "bit, samples made there), or synthetic (random volumes, no disk)",
    )
    add(
        "--local_rank",
        type=number(int, 0),
        default=os.environ.get("LOCAL_RANK", "0"),
        help="this process's GPU on its machine (torchrun sets LOCAL_RANK)",
    )


def _add_run(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--exec_mode", choices=("train", "evaluate", "predict", "report"), default="train", help="what to do")
    add(
        "--subset",
        choices=("train", "evaluation", "test"),
        default="evaluation",
        help="which part of the data set's split --exec_mode evaluate scores",
    )
    add("--batch_size", type=number(int, 1), default=2, help="samples a rank and micro-batch")
    add("--ga_steps", type=number(int, 1), default=1, help="micro-batches accumulated to one step")
    add("--epochs", type=number(int, 1), default=1, help="at most so many epochs")
    add(
        "--steps_per_epoch",
        type=number(int, 1),
        help="an epoch is so many steps, whatever the data set's size (None: each case once)",
    )
    add(
        "--evaluate_every",
        "--eval_every",
        type=number(int, 1),
        help="epochs from one evaluation to the next (None: 20 of 168 samples, by MLPerf's rule)",
    )
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
    add(
        "--untimed_steps",
        type=number(int, 0),
        default=1,
        help="steps on made-up data before the clock starts, that leave no trace: compiling and tuning",
    )
    add("--compile", action="store_true", help="torch.compile the network (minutes, before the clock starts)")
    add("--amp", action="store_true", help="16-bit arithmetic where it is safe, loss and statistics in fp32")
    add(
        "--amp_dtype",
        choices=("auto", "bf16", "fp16"),
        default="auto",
        help="auto: bf16 where the device computes in it, else fp16 with a loss scaler (on a CPU: else fp32)",
    )


def _add_optimizer(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--optimizer", choices=("sgd", "adam", "lamb"), default="sgd", help="sgd is Nesterov's")
    add("--learning_rate", type=number(float, 0), default=1.0, help="after warm-up")
    add("--momentum", type=number(float, 0, 1), default=0.9, help="of sgd")
    add("--init_learning_rate", type=number(float, 0), default=1e-4, help="where warm-up starts")
    add("--lr_warmup_epochs", type=number(int, 0), default=0, help="epochs of linear warm-up")
    add("--lr_decay_epochs", type=number(int, 1), nargs="*", default=(), help="epochs after which the rate decays")
    add("--lr_decay_factor", type=number(float, 0), default=1.0, help="what each decay multiplies the rate with")
    add(
        "--lr_schedule",
        default="multistep",
        help="after warm-up: multistep (--lr_decay_epochs), 'cosine', 'polynomial(power=0.9)', 'plateau(factor=0.5, "
        "patience=5)'",
    )
    add("--lamb_betas", type=number(float, 0, 1, below=True), nargs=2, default=(0.9, 0.999), help="of lamb")
    add("--weight_decay", type=number(float, 0), default=0.0, help="L2 penalty (lamb: decoupled)")


def _add_network(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--model",
        type=trusted_spec,
        default="unet3d",
        help="network: 'unet3d(filters=(16,32,64,128))', 'monai.networks.nets:SegResNet(init_filters=16)', "
        "'slicewise(network=\"package.module:Net2d\", context=3)', or one's own package.module:name",
    )
    add("--normalization", choices=("instancenorm", "batchnorm"), default="instancenorm", help="of unet3d")
    add("--activation", choices=("relu", "leaky_relu"), default="relu", help="of unet3d; leaky_relu: slope 0.01")
    add(
        "--loss",
        type=trusted_spec,
        default="dice_ce",
        help="dice_ce (MLPerf's), dice, 'monai.losses:GeneralizedDiceLoss' or one's own",
    )
    add("--include_background", action="store_true", help="class 0 counts in the Dice term of the loss")
    add(
        "--verbose",
        "-v",
        action=argparse.BooleanOptionalAction,
        default=sys.stderr.isatty(),
        help="progress bars and a line an epoch (default: on a terminal)",
    )
    add("--no_report", action="store_true", help="write no LOG_DIR/report.html at the end of the run")
    add(
        "--trackers",
        nargs="*",
        default=("mlperf", "jsonl"),
        metavar="TRACKER",
        help="who records the run beside run.json: mlperf, jsonl, tensorboard, wandb, mlflow, each with its arguments, "
        'such as \'wandb(project="kits", mode="offline")\', or one\'s own package.module:name',
    )
    add(
        "--callbacks",
        nargs="*",
        default=(),
        metavar="CALLBACK",
        help="who may end the run or keep something of it: 'early_stopping(patience=20)', 'top_k(k=3)', lr_monitor, "
        "train_dice, or one's own package.module:name",
    )
    add(
        "--augment",
        type=trusted_spec,
        nargs="*",
        default=(trusted_spec("mlperf"),),
        metavar="SPEC",
        help="augmentations, one after the other: \"mlperf(flips='HW')\" where a class has a direction along D, "
        "'flips(p=0.5)', 'rot90', 'torchio:RandomGamma(p=0.3)', 'monai.transforms:RandGaussianNoise(prob=0.2)', "
        "'mixup(alpha=0.2)', 'manifold_mixup(alpha=0.2)', or one's own package.module:name",
    )
    add("--oversampling", type=number(float, 0, 1), default=0.4, help="share of crops around the foreground")
    add("--overlap", type=number(float, 0, 1), default=0.5, help="of neighbouring evaluation windows, below 1")
    add("--cudnn_benchmark", action="store_true", help="let cuDNN time its algorithms")
    add("--cudnn_deterministic", action="store_true", help="the same bits from the same run on a GPU")
    add(
        "--division",
        choices=("auto", "closed", "open"),
        default="auto",
        help="MLPerf division; auto: closed where nothing departs from its rules, else open, with the reasons logged",
    )
    add(
        "--ruleset",
        choices=RULESETS,
        default=DEFAULT_RULESET,
        help="MLPerf's rules that the log follows: epochs are in epochs up to 3.0.0, in samples from 3.1.0 on",
    )
    add("--submission_org", default=PLACEHOLDER_ORG, help="who submits")
    add("--submission_platform", help="on what (None: the devices' own name)")
    add("--submission_status", choices=("onprem", "cloud", "preview", "research"), default="onprem", help="MLPerf's")


def _add_prediction(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--scan", type=Path, help="what to segment: a NIfTI file, a folder of them, or a folder of DICOM series")
    add(
        "--output",
        type=Path,
        help="the mask: a .nii.gz file, a .dcm file (DICOM-SEG, of a DICOM series), or a folder, in which masks have "
        "their scans' names",
    )
    add("--series", metavar="NAME", help="the DICOM series, by number, UID or description; all: each one")
    add("--checkpoint", choices=("best", "last"), default="best", help="which state evaluate and predict take")
    add(
        "--test_time_flips",
        type=axes,
        default="",
        metavar="AXES",
        help="average over all flips of these axes, such as HW; of none along which a class has a way",
    )
    add(
        "--save_probabilities", action="store_true", help="each class's probabilities too, in MASK_probabilities.nii.gz"
    )
    add(
        "--max_memory_gb",
        type=number(float, 0.1),
        help="of the host and of the GPU, at most, in GiB (None: what is free)",
    )
