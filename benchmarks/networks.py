"""A training step of this project's networks and of other libraries', with and without `--fuse_norms`.

Networks whose library is not installed are left out, with the reason. All have four resolutions, from the same number
of features; what they score, and why their sizes differ, is not the subject.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import NOT_MEASURED, Comparison, Options, Table, compare
from benchmarks.step import (
    CHANNELS,
    CLASSES,
    LEARNING_RATE,
    MOMENTUM,
    WARM_UP,
    Scale,
    largest_fitting_batch,
    number_format,
    training_step,
)
from common.errors import UserError, one_line
from common.registry import Spec
from model.deep_supervision import OutputsLoss
from model.fused_norms import fuse_norms
from model.losses import DiceCELoss
from model.registry import build_network
from runtime.memory_format import to_device
from runtime.optimizer import make_optimizer
from runtime.precision import choose_precision
from runtime.train_state import TrainState
from runtime.training import StepConfig
from runtime.warmup import dummy_batch

NNUNET = "dynamic_network_architectures.architectures.unet"
# FILTERS stands for the features of the four resolutions, WIDTH for the first of them.
ARGUMENTS = (
    "n_stages=4, features_per_stage=FILTERS, conv_op='torch.nn:Conv3d', kernel_sizes=3, strides=(1, 2, 2, 2), "
    "n_conv_per_stage_decoder=1, conv_bias=True, norm_op='torch.nn:InstanceNorm3d', norm_op_kwargs={'affine': True}, "
    "nonlin='torch.nn:LeakyReLU')"
)
NETWORKS = {
    "unet3d": "unet3d(filters=FILTERS)",
    "unet3d, three outputs": "unet3d(filters=FILTERS, deep_supervision=3)",
    "MONAI UNet": "monai.networks.nets:UNet(channels=FILTERS, strides=(2, 2, 2), num_res_units=2)",
    "MONAI DynUNet": (
        "monai.networks.nets:DynUNet(kernel_size=(3, 3, 3, 3), strides=(1, 2, 2, 2), upsample_kernel_size=(2, 2, 2), "
        "filters=FILTERS)"
    ),
    "MONAI DynUNet, three outputs": (
        "monai.networks.nets:DynUNet(kernel_size=(3, 3, 3, 3), strides=(1, 2, 2, 2), upsample_kernel_size=(2, 2, 2), "
        "filters=FILTERS, deep_supervision=True, deep_supr_num=2)"
    ),
    "MONAI SegResNet": "monai.networks.nets:SegResNet(init_filters=WIDTH)",
    "nnU-Net PlainConvUNet": f"{NNUNET}:PlainConvUNet(n_conv_per_stage=2, {ARGUMENTS}",
    "nnU-Net ResidualEncoderUNet": f"{NNUNET}:ResidualEncoderUNet(n_blocks_per_stage=(1, 2, 2, 2), {ARGUMENTS}",
}


def run(options: Options) -> list[Table]:
    """Runs the suite."""
    return [steps(options)]


def steps(options: Options) -> Table:
    """A row for each network: a step with the fused norms, without them, and the ratio of both."""
    torch.backends.cudnn.benchmark = options.device.type == "cuda"
    scale = scale_of(options)
    rows: list[list[object]] = []
    for name, spec in NETWORKS.items():
        text = spec.replace("FILTERS", str(scale.filters)).replace("WIDTH", str(scale.filters[0]))
        try:
            rows.append([name, *row_of(text, options.device, scale)])
        except UserError as error:
            rows.append([name, f"{NOT_MEASURED}: {one_line(error)}", *[""] * 5])
    precision = choose_precision(True, "auto", options.device)
    columns = ["network", "parameters", "norms fused", "batch", "ms per step", "ms with --no-fuse_norms", "ratio"]
    notes = [
        f"Filters {scale.filters}, windows of {' x '.join(map(str, scale.shape))}, {number_format(precision)}, "
        f"channels-last; medians, the ratio that of {scale.pairs} alternating pairs."
    ]
    return Table("Networks", columns, rows, notes)


def scale_of(options: Options) -> Scale:
    """The filters, window and batch that suit the device."""
    if options.quick:
        return Scale((8, 8, 8, 8), (16, 16, 16), 2, 1)
    if options.device.type == "cuda":
        return Scale((32, 64, 128, 256), (128, 128, 128), 2, 5)
    return Scale((16, 32, 64, 128), (64, 64, 64), 2, 5)


def row_of(spec: str, device: torch.device, scale: Scale) -> list[object]:
    """The cells after a network's name.

    Raises:
        UserError: its library is not installed, or not even one sample fits.
    """
    network = build(spec)
    parameters = sum(p.numel() for p in network.parameters())
    found = "its own" if spec.startswith("unet3d") else fuse_norms(network, CHANNELS, scale.shape) or "none to fuse"
    if found in ("its own", "none to fuse"):
        size, times = largest_fitting_batch(scale.batch_size, partial(alone, spec, device, scale))
        return [parameters, found, size, 1e3 * statistics.median(times.ours_s), "", ""]
    size, times = largest_fitting_batch(scale.batch_size, partial(pairs, spec, device, scale))
    milliseconds = [1e3 * statistics.median(values) for values in (times.ours_s, times.naive_s)]
    return [parameters, found, size, *milliseconds, times.ratio]


def pairs(spec: str, device: torch.device, scale: Scale, batch_size: int) -> Comparison:
    """Times steps with and without fused norms."""
    fused, plain = (make_step(spec, device, scale, batch_size, is_fused=is_fused) for is_fused in (True, False))
    return compare(plain, fused, pairs=scale.pairs, device=device, warm_up=WARM_UP)


def alone(spec: str, device: torch.device, scale: Scale, batch_size: int) -> Comparison:
    """Times steps of a network with nothing to switch off."""
    step = make_step(spec, device, scale, batch_size, is_fused=False)
    return compare(lambda: None, step, pairs=scale.pairs, device=device, warm_up=WARM_UP)


def build(spec: str) -> torch.nn.Module:
    """Builds a network with the same weights on every call."""
    torch.manual_seed(0)
    return build_network(Spec(spec, trusted=True), CHANNELS, CLASSES)


def make_step(
    spec: str, device: torch.device, scale: Scale, batch_size: int, *, is_fused: bool
) -> Callable[[], Tensor]:
    """Returns a function that computes one training step on dummy data and returns the loss."""
    network = build(spec)
    if is_fused:
        fuse_norms(network, CHANNELS, scale.shape)
    to_device(network, device, "NDHWC")
    precision = choose_precision(True, "auto", device)
    optimizer = make_optimizer("sgd", network.parameters(), LEARNING_RATE, MOMENTUM)
    state = TrainState(network=network, model=network, optimizer=optimizer, scaler=precision.make_scaler())
    config = StepConfig(loss=OutputsLoss(DiceCELoss()), precision=precision, ga_steps=1, layout="NDHWC")
    return training_step(state, config, dummy_batch((batch_size, CHANNELS, *scale.shape), CLASSES, device))
