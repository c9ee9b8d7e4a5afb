"""A training step: the gain of each choice, and the share of the device's peak that it reaches.

Every choice is switched off on its own from the full set, so a ratio is what leaving it out would cost.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import NOT_MEASURED, Comparison, Options, Table, compare
from common.errors import UserError
from data_loading.base_loader import Batch
from model.kernels import dispatch as kernels
from model.losses import DiceCELoss
from model.metrics import SMOOTHING, SPATIAL
from model.unet3d import MLPERF_FILTERS, Unet3d
from runtime.logging.throughput import peak_memory_bytes
from runtime.memory_format import to_device
from runtime.optimizer import make_optimizer
from runtime.precision import Precision, choose_precision
from runtime.seeding import seed_process
from runtime.train_state import TrainState
from runtime.training import StepConfig, forward_backward, optimizer_step
from runtime.warmup import dummy_batch, peak_flops, seconds, training_flops

T = TypeVar("T")

CHANNELS, CLASSES = 1, 3
# Speed does not depend on it; it is so small that weights stay finite on random labels.
LEARNING_RATE = 1e-3
MOMENTUM = 0.9
# cuDNN tries its algorithms in the first step, the allocator settles in the second.
WARM_UP = 2
# On one H200: the best published figure (NVIDIA's MXNet code, MLPerf v4.0), and the arithmetic and memory limit of
# convolutions with a fused norm and ReLU.
PUBLISHED = {"samples/s": "published 76.05, limit 231"}


@dataclass(frozen=True)
class Scale:
    """The size of the computation.

    Attributes:
        batch_size: tried first; halved until it fits.
        pairs: number of times that both variants are timed.
    """

    filters: tuple[int, ...]
    shape: tuple[int, int, int]
    batch_size: int
    pairs: int


@dataclass(frozen=True, kw_only=True)
class StepVariant:
    """How a step is computed. The default is the full set of choices."""

    layout: str = "NDHWC"
    fused_norm: bool = True
    one_pass_loss: bool = True
    fused_optimizer: bool = True
    amp: bool = True
    plain: tuple[str, ...] = ()
    compiled: bool = False


@dataclass(frozen=True)
class Choice:
    """A choice and its baseline, the full set without it; `on` is for a choice that is not part of the set."""

    name: str
    baseline: str
    off: dict[str, Any] = field(default_factory=dict)
    on: dict[str, Any] = field(default_factory=dict)


CHOICES = (
    Choice("channels-last layout", "NCDHW; the fused norm needs channels-last and is off as well", {"layout": "NCDHW"}),
    Choice("norm and activation as one operator", "PyTorch's two", {"fused_norm": False}),
    Choice("loss in one pass", "softmax and a one-hot tensor", {"one_pass_loss": False}),
    Choice("fused optimizer", "torch.optim.SGD's default", {"fused_optimizer": False}),
    Choice("AMP", "fp32 (a GPU's convolutions in TF32, PyTorch's default)", {"amp": False}),
    Choice("Triton: all kernels", "the same operators in PyTorch's terms", {"plain": kernels.OPERATORS}),
    Choice("Triton: norm and activation", "the same in PyTorch's terms", {"plain": ("norm",)}),
    Choice("Triton: the loss", "the same in PyTorch's terms", {"plain": ("loss",)}),
    Choice("Triton: the image's convolution", "cuDNN", {"plain": ("image",)}),
    Choice("Triton: convolutions to 32 channels", "cuDNN", {"plain": ("narrow",)}),
    Choice("Triton: transposed convolution and concatenation", "cuDNN and torch.cat", {"plain": ("join",)}),
    Choice("Triton: the output's convolution", "cuDNN", {"plain": ("output",)}),
    Choice("torch.compile (--compile)", "the full set, which does not compile", on={"compiled": True}),
)


def run(options: Options) -> list[Table]:
    """Runs the suite: the share of the device's peak, and the gain of each choice."""
    device = options.device
    scale = scale_of(options)
    seed_process(0, deterministic=False, autotune=device.type == "cuda")
    # First, because peak memory on a CPU is that of the whole process, and the baselines would raise it.
    return [share_of_peak(device, scale), gains(device, scale)]


def scale_of(options: Options) -> Scale:
    """The network, window and batch that suit the device."""
    if options.quick:
        return Scale((4, 8), (16, 16, 16), 2, 1)
    if options.device.type == "cuda":
        return Scale(MLPERF_FILTERS, (128, 128, 128), 28, 10)
    return Scale(MLPERF_FILTERS, (64, 64, 64), 2, 3)


def share_of_peak(device: torch.device, scale: Scale) -> Table:
    """The full step compared with a large matrix product in the same number format."""
    precision = choose_precision(True, "auto", device)

    def measure(batch_size: int) -> float:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # a batch that did not fit has left its peak
        step = make_step(StepVariant(), device, scale, batch_size)
        return statistics.median([seconds(step, device) for _ in range(WARM_UP + scale.pairs)][WARM_UP:])

    batch_size, step_s = largest_fitting_batch(scale.batch_size, measure)
    memory = peak_memory_bytes(device)
    flops = training_flops(lambda: Unet3d(CHANNELS, CLASSES, filters=scale.filters), (CHANNELS, *scale.shape))
    rate, peak = batch_size / step_s, peak_flops(precision)
    figures = {
        "samples/s": rate,
        "ms per step": 1e3 * step_s,
        "TFLOP/s": rate * flops / 1e12,
        "GEMM peak, TFLOP/s": peak / 1e12,
        "share of the GEMM peak": rate * flops / peak,
        "peak memory, GiB": memory / 2**30,
    }
    # They apply to the benchmark's network on a GPU.
    published = PUBLISHED if device.type == "cuda" and scale.filters == MLPERF_FILTERS else {}
    notes = [
        describe(scale, precision, batch_size),
        "Peak memory: of tensors on a GPU; on a CPU of the whole process, since its start.",
    ]
    rows = [[name, value, published.get(name, "")] for name, value in figures.items()]
    return Table("Share of the peak", ["figure", "value", "published (H200)"], rows, notes)


def gains(device: torch.device, scale: Scale, choices: Sequence[Choice] = CHOICES) -> Table:
    """Each choice, switched off on its own from the full set."""
    rows: list[list[Any]] = []
    for choice in choices:
        reason = unmeasurable(choice, device)
        if reason:
            rows.append([choice.name, choice.baseline, "", f"{NOT_MEASURED}: {reason}", "", ""])
            continue
        batch_size, times = largest_fitting_batch(scale.batch_size, partial(measure, choice, device, scale))
        milliseconds = [1e3 * statistics.median(values) for values in (times.ours_s, times.naive_s)]
        rows.append([choice.name, choice.baseline, batch_size, *milliseconds, times.ratio])
    columns = ["choice", "without it", "samples per step", "ms per step with", "ms per step without", "ratio"]
    notes = [
        describe(scale, choose_precision(True, "auto", device), scale.batch_size),
        f"Each choice switched off on its own from the full set; ratio: the median over {scale.pairs} alternating "
        "pairs of the time without it divided by the time with it.",
    ]
    return Table("A training step", columns, rows, notes)


def measure(choice: Choice, device: torch.device, scale: Scale, batch_size: int) -> Comparison:
    """Times a step with and without a choice."""
    without = make_step(replace(StepVariant(), **choice.off), device, scale, batch_size)
    step = make_step(replace(StepVariant(), **choice.on), device, scale, batch_size)
    return compare(without, step, pairs=scale.pairs, device=device, warm_up=WARM_UP)


def unmeasurable(choice: Choice, device: torch.device) -> str:
    """Why a choice makes no difference on this device; "" if it does."""
    if "amp" in choice.off:
        return choose_precision(True, "auto", device).note
    if "compiled" in choice.on and device.type != "cuda":
        return "compiling takes a CPU minutes"
    if "plain" in choice.off and kernels.triton_for(torch.empty(0, device=device), "norm") is None:
        return "Triton's kernels are for CUDA" if device.type != "cuda" else "Triton is not installed"
    return ""


def make_state(variant: StepVariant, precision: Precision, filters: tuple[int, ...]) -> TrainState:
    """Returns a new network, the same on every call, and its optimizer."""
    torch.manual_seed(0)
    network = to_device(
        Unet3d(CHANNELS, CLASSES, filters=filters, fused=variant.fused_norm), precision.device, variant.layout
    )
    if variant.compiled:
        network.compile()
    optimizer = (
        make_optimizer("sgd", network.parameters(), LEARNING_RATE, MOMENTUM)
        if variant.fused_optimizer
        else torch.optim.SGD(network.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, nesterov=True)
    )
    return TrainState(network=network, model=network, optimizer=optimizer, scaler=precision.make_scaler())


def make_step(variant: StepVariant, device: torch.device, scale: Scale, batch_size: int) -> Callable[[], Tensor]:
    """Returns a function that computes one training step on dummy data and returns the loss."""
    precision = choose_precision(variant.amp, "auto", device)
    state = make_state(variant, precision, scale.filters)
    loss = DiceCELoss() if variant.one_pass_loss else NaiveDiceCE()
    config = StepConfig(loss=loss, precision=precision, ga_steps=1, layout=variant.layout)
    batch = dummy_batch((batch_size, CHANNELS, *scale.shape), CLASSES, device)

    work = training_step(state, config, batch)

    def step() -> Tensor:
        with kernels.plain(variant.plain):
            return work()

    return step


def training_step(state: TrainState, config: StepConfig, batch: Batch) -> Callable[[], Tensor]:
    """Returns a function that computes one training step on this batch and returns the loss."""

    def work() -> Tensor:
        loss = forward_backward(state, batch, config, communicate=True)
        optimizer_step(state)
        return loss

    return work


def largest_fitting_batch(batch_size: int, work: Callable[[int], T]) -> tuple[int, T]:
    """The largest batch size, halved from the given one, that fits the device's memory, and the result of `work`.

    Raises:
        UserError: not even one sample fits.
    """
    while True:
        try:
            return batch_size, work(batch_size)
        except torch.cuda.OutOfMemoryError:
            if batch_size == 1:
                raise UserError("the GPU's memory holds no step of one sample; is another program on it?") from None
        # Outside the handler: while it runs, the exception's frames hold the tensors.
        torch.cuda.empty_cache()
        batch_size //= 2


def describe(scale: Scale, precision: Precision, batch_size: int) -> str:
    """The network, window, batch and number format, for a table's notes."""
    window, numbers = " x ".join(map(str, scale.shape)), number_format(precision)
    return f"unet3d with filters {scale.filters}, windows of {window}, batches of {batch_size}, {numbers}."


def number_format(precision: Precision) -> str:
    """The name of the format in which a network computes."""
    return str(precision.dtype or torch.float32).removeprefix("torch.")


class NaiveDiceCE(nn.Module):
    """The baseline of `DiceCELoss`: PyTorch's cross-entropy, then softmax times one-hot labels, all held in memory."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits (N, K, D, H, W), labels (N, 1, D, H, W) -> scalar; the Dice term excludes the background."""
        logits, values = logits.float(), labels[:, 0].long()
        probabilities = logits.softmax(dim=1)
        truth = F.one_hot(values, logits.shape[1]).movedim(-1, 1).float()
        intersection = (probabilities * truth).sum(SPATIAL)
        total = probabilities.sum(SPATIAL) + truth.sum(SPATIAL)
        dice = 1 - (2 * intersection + SMOOTHING) / (total + SMOOTHING)
        return (F.cross_entropy(logits, values) + dice[:, 1:].mean()) / 2
