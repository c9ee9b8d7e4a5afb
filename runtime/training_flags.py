"""Flags of `main.py`: the run, optimizer, network, sampling and arithmetic."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from common.cli import number
from common.registry import Spec
from runtime.flag_fields import COUNT, NONNEGATIVE, POSITIVE, SHARE, flag, trusted_spec

# Master seeds are below this.
SEED_LIMIT = 2**31


@dataclass(frozen=True, kw_only=True)
class TrainingFlags:
    """Mode, length of the run, evaluation, shapes, precision."""

    exec_mode: str = flag(
        "train",
        "what to do",
        group="run",
        choices=("train", "evaluate", "predict", "report", "export"),
        resume="incidental",
    )
    eval_split: str = flag(
        "evaluation",
        "part of the data set that --exec_mode evaluate scores",
        choices=("train", "evaluation", "test"),
        old="--subset",
        mode="evaluate",
    )
    batch_size: int = flag(2, "samples per rank per micro-batch", type=POSITIVE, resume="order")
    ranks_per_sample: int = flag(
        1,
        "ranks that share each sample: its crop is cut along D, a slab for each rank, which changes no result; "
        "--batch_size then counts the samples of such a group of ranks",
        type=POSITIVE,
        resume="order",
    )
    ga_steps: int = flag(1, "micro-batches accumulated per optimizer step", type=POSITIVE, resume="order")
    epochs: int = flag(1, "maximum number of epochs", type=POSITIVE)
    steps_per_epoch: int | None = flag(
        None,
        "optimizer steps per epoch, independent of the data set's size (default: each case once)",
        type=POSITIVE,
        closed=True,
        resume="order",
    )
    evaluate_every: int | None = flag(
        None,
        "epochs between evaluations (default: MLPerf's rule: 20 epochs of 168 samples)",
        type=POSITIVE,
        metavar="EPOCHS",
        aliases=("--eval_every",),
    )
    start_eval_at: int | None = flag(
        None,
        "epoch of the first evaluation (default: MLPerf's rule: 1000 epochs of 168 samples)",
        type=POSITIVE,
        metavar="EPOCH",
    )
    eval_ranks: int = flag(
        0,
        "number of ranks, the last ones, that only evaluate, while the others train on; with 0 all ranks do both",
        type=COUNT,
        resume="incidental",
    )
    quality_threshold: float = flag(
        0.908, "mean Dice at which training stops successfully", type=SHARE, metavar="DICE", closed=True
    )
    layout: str = flag(
        "NCDHW",
        "memory layout; NDHWC is channels-last, which changes no result",
        choices=("NCDHW", "NDHWC"),
        network=True,
    )
    input_shape: tuple[int, int, int] = flag(
        (128, 128, 128), "size of a training crop in voxels", type=POSITIVE, metavar=("D", "H", "W"), closed=True
    )
    val_input_shape: tuple[int, int, int] = flag(
        (128, 128, 128),
        "size of an evaluation window in voxels",
        type=POSITIVE,
        metavar=("D", "H", "W"),
        closed=True,
        network=True,
    )
    val_batch_size: int = flag(4, "evaluation windows per forward pass", type=POSITIVE, resume="incidental")
    seed: int = flag(
        -1,
        "master seed; -1 takes one from the operating system",
        type=number(int, -1, SEED_LIMIT - 1),
        resume="incidental",
    )
    num_workers: int = flag(8, "loader processes per rank", type=COUNT, resume="incidental")
    worker_timeout: int = flag(
        40,
        "seconds without a batch from a loader process after which the run ends; raise it for a slow network disk",
        type=POSITIVE,
        metavar="SECONDS",
        resume="incidental",
    )
    stall_timeout: int = flag(
        40,
        "seconds without progress of a rank in training after which the run ends; at least --worker_timeout and five "
        "times the slowest step are always allowed",
        type=POSITIVE,
        metavar="SECONDS",
        resume="incidental",
    )
    benchmark: bool = flag(
        False, "measure training: time each iteration, skip evaluation, report samples/s and latency", closed=True
    )
    warmup_steps: int = flag(200, "iterations before --benchmark starts its clock", type=COUNT)
    prewarm_steps: int = flag(
        1,
        "steps on dummy data before the clock starts, to compile and tune kernels; the run's state is unchanged",
        type=COUNT,
        old="--untimed_steps",
        resume="incidental",
    )
    compile: bool = flag(False, "compile the network with torch.compile before the clock starts; takes minutes")
    plain_operators: tuple[str, ...] = flag(
        (),
        "operators that PyTorch computes on a GPU in place of Triton's kernels, for comparison or if a kernel fails: "
        "norm, loss, image, narrow, join, output (docs/performance.md), or all",
        choices=("norm", "loss", "image", "narrow", "join", "output", "all"),
        nargs="+",
        metavar="NAME",
    )
    amp: bool = flag(
        False, "compute in 16-bit precision where it is safe; the loss and statistics stay in fp32", network=True
    )
    amp_dtype: str = flag(
        "auto",
        "16-bit format of --amp; auto is bf16 where the device supports it, else fp16 with loss scaling (on a "
        "CPU: fp32)",
        choices=("auto", "bf16", "fp16"),
        network=True,
    )


@dataclass(frozen=True, kw_only=True)
class OptimizerFlags:
    """Optimizer and learning rate."""

    optimizer: str = flag(
        "sgd",
        "optimizer; sgd uses Nesterov momentum",
        group="optimizer",
        choices=("sgd", "adam", "lamb"),
        closed=True,
        resume="structural",
    )
    learning_rate: float = flag(1.0, "learning rate after warm-up", type=NONNEGATIVE, metavar="LR")
    momentum: float = flag(0.9, "momentum of sgd", type=SHARE)
    init_learning_rate: float = flag(1e-4, "learning rate at the start of warm-up", type=NONNEGATIVE, metavar="LR")
    lr_warmup_epochs: int = flag(0, "epochs of linear warm-up", type=COUNT, metavar="EPOCHS")
    lr_decay_epochs: tuple[int, ...] = flag(
        (), "epochs after which --lr_schedule multistep decays the learning rate", type=POSITIVE, metavar="EPOCH"
    )
    lr_decay_factor: float = flag(
        1.0, "factor by which each decay multiplies the learning rate", type=NONNEGATIVE, metavar="FACTOR"
    )
    lr_schedule: str = flag(
        "multistep",
        "learning rate after warm-up: multistep, cosine, 'polynomial(power=0.9)' or 'plateau(factor=0.5, patience=5)'",
        metavar="SPEC",
        closed=True,
    )
    lamb_betas: tuple[float, float] = flag(
        (0.9, 0.999),
        "averaging coefficients of lamb",
        type=number(float, 0, 1, open_ended=True),
        metavar=("BETA1", "BETA2"),
    )
    weight_decay: float = flag(0.0, "L2 penalty (decoupled weight decay with lamb)", type=NONNEGATIVE)
    max_grad_norm: float | None = flag(
        None,
        "largest norm of a step's gradients, over all parameters; larger ones are scaled down to it",
        type=number(float, 1e-6),
        closed=True,
    )
    ema_decay: float | None = flag(
        None,
        "decay per step of an exponential moving average of the weights, such as 0.999; the averages are evaluated and "
        "saved as the best state",
        type=number(float, 0, 1, open_ended=True),
        metavar="X",
        closed=True,
    )


@dataclass(frozen=True, kw_only=True)
class NetworkFlags:
    """Network and loss."""

    model: Spec = flag(
        trusted_spec("unet3d"),
        "network: 'unet3d(filters=(16,32,64,128))', 'monai.networks.nets:SegResNet(init_filters=16)', "
        "'slicewise(network=\"package.module:Net2d\", context=3)' or your own package.module:name",
        group="network",
        closed=True,
        network=True,
        resume="structural",
    )
    normalization: str = flag(
        "instancenorm",
        "normalization of unet3d",
        choices=("instancenorm", "batchnorm"),
        closed=True,
        network=True,
        resume="structural",
    )
    activation: str = flag(
        "relu",
        "activation of unet3d; leaky_relu has slope 0.01",
        choices=("relu", "leaky_relu"),
        closed=True,
        network=True,
        resume="structural",
    )
    loss: Spec = flag(
        trusted_spec("dice_ce"),
        "loss: dice_ce (MLPerf), dice, 'monai.losses:GeneralizedDiceLoss' or your own package.module:name",
        closed=True,
        network=True,
    )
    include_background: bool = flag(False, "include class 0 in the Dice term of the loss", closed=True, network=True)


@dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """Augmentation, crops, evaluation windows, cuDNN."""

    augment: tuple[Spec, ...] = flag(
        (trusted_spec("mlperf"),),
        "augmentations in order: mlperf, \"mlperf(flips='HW')\" if a class depends on the direction of D, "
        "'flips(p=0.5)', rot90, nnunet, 'torchio:RandomGamma(p=0.3)', 'monai.transforms:RandGaussianNoise(prob=0.2)', "
        "'mixup(alpha=0.2)', 'manifold_mixup(alpha=0.2)' or your own package.module:name",
        group="sampling and arithmetic",
        closed=True,
    )
    oversampling: float = flag(
        0.4, "share of training crops around foreground", type=SHARE, metavar="SHARE", closed=True
    )
    class_sampling_weights: tuple[float, ...] = flag(
        (),
        "weights with which the classes 1, 2, ... are drawn for crops around foreground, among those in a case "
        "(default: equal)",
        type=NONNEGATIVE,
        nargs="+",
        closed=True,
    )
    overlap: float = flag(
        0.5,
        "overlap of neighboring evaluation windows, as a share of their size; below 1",
        type=SHARE,
        metavar="SHARE",
        closed=True,
        network=True,
    )
    cudnn_benchmark: bool = flag(False, "let cuDNN time its algorithms and choose the fastest")
    cudnn_deterministic: bool = flag(False, "make runs on a GPU reproducible bit for bit")
    fuse_norms: bool = flag(
        True,
        "with --layout NDHWC, compute the instance norms of other libraries' networks, and the (leaky) ReLU behind "
        "them, by unet3d's channels-last operator, which changes no result; --no-fuse_norms leaves them to PyTorch",
        action=argparse.BooleanOptionalAction,
    )
    checkpoint_activations: bool = flag(
        False,
        "for a small GPU: keep the inputs of unet3d's blocks alone and compute the blocks again in the backward pass; "
        "less memory, a longer step, the same gradients",
        resume="incidental",
    )
