"""Each convolution of the network on its own: whether cuDNN computes it right in 16 bit, and how fast in which layout.

Some pairs of PyTorch and cuDNN (torch 2.9) ran 16-bit 3-D convolutions several times slower, or wrong in silence.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.gpu_checks import checked, exact_fp32, limit_of, normal, relative_error
from benchmarks.harness import NOT_MEASURED, Options, Table
from benchmarks.step import CHANNELS, CLASSES
from model.unet3d import MLPERF_FILTERS, Unet3d
from runtime.memory_format import MEMORY_FORMATS
from runtime.warmup import seconds

BATCH = 4
REPETITIONS = 5
# Seconds after which the layers that are left are not measured: autotuning takes a while for each.
LIMIT_S = 90
# cuDNN's gradient of the weights is rounded to 16 bit after sums in fp32 in an order of its own.
ROUNDINGS = 2
# Above this, channels-last counts as broken rather than slow by chance.
SLOWDOWN_LIMIT = 1.5


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A convolution of the network.

    Attributes:
        shape: (C, D, H, W) of its input.
    """

    name: str
    transposed: bool
    filters: int
    kernel: int
    stride: int
    shape: tuple[int, int, int, int]

    def flops(self) -> float:
        """Operations of the forward pass for one sample."""
        channels, *size = self.shape
        voxels = size[0] * size[1] * size[2]
        if not self.transposed:
            voxels //= self.stride**3
        return 2.0 * channels * self.filters * self.kernel**3 * voxels

    def build(self, device: torch.device) -> nn.Conv3d | nn.ConvTranspose3d:
        torch.manual_seed(0)
        if self.transposed:
            return nn.ConvTranspose3d(self.shape[0], self.filters, self.kernel, self.stride).to(device)
        return nn.Conv3d(self.shape[0], self.filters, self.kernel, self.stride, padding=self.kernel // 2).to(device)


def layers(filters: tuple[int, ...], window: tuple[int, int, int]) -> list[Layer]:
    """The distinct convolutions of the network, in order of the forward pass, found on the meta device."""
    found: dict[Layer, None] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        assert isinstance(module, nn.Conv3d | nn.ConvTranspose3d)
        transposed = isinstance(module, nn.ConvTranspose3d)
        _, c, d, h, w = inputs[0].shape
        shape = (c, d, h, w)
        kernel, stride = module.kernel_size[0], module.stride[0]
        arrow = "up to" if transposed else "to"
        name = f"{kernel}^3 {shape[0]} {arrow} {module.out_channels}, stride {stride}, at {shape[1]}^3"
        layer = Layer(
            name=name, transposed=transposed, filters=module.out_channels, kernel=kernel, stride=stride, shape=shape
        )
        found[layer] = None

    with torch.device("meta"):
        network = Unet3d(CHANNELS, CLASSES, filters=filters)
        for module in network.modules():
            if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
                module.register_forward_hook(note)
        network(torch.empty(1, CHANNELS, *window))
    return list(found)


def passes(
    layer: Layer, x: Tensor, dtype: torch.dtype, layout: str, *, compute: torch.dtype | None = None
) -> tuple[Callable[[], Sequence[Tensor]], Callable[[], Sequence[Tensor]]]:
    """The forward pass, which returns the output, and the backward pass, which returns the gradients.

    Args:
        x: (N, C, D, H, W), rounded to `dtype` as the weights and the output's gradient are.
        compute: the format of the arithmetic, if not `dtype`.
    """
    memory_format = MEMORY_FORMATS[layout]

    def prepared(tensor: Tensor) -> Tensor:
        return tensor.to(dtype).to(compute or dtype).contiguous(memory_format=memory_format)

    module = layer.build(x.device)
    for p in module.parameters():
        p.data = prepared(p.data) if p.dim() == 5 and layer.kernel > 1 else p.data.to(dtype).to(compute or dtype)
    # The first layer's input needs no gradient.
    inputs = prepared(x).requires_grad_(layer.shape[0] > CHANNELS)
    output = module(inputs)
    gradient = prepared(normal(*output.shape, device=x.device, seed=7))
    wanted = [tensor for tensor in (inputs, module.weight) if tensor.requires_grad]
    return (
        lambda: [module(inputs)],
        lambda: torch.autograd.grad(output, wanted, gradient, retain_graph=True),
    )


def convolutions(options: Options) -> Table:
    """Errors against fp32 and times of each convolution, forward and backward."""
    device = options.device
    filters, side, batch = ((4, 8), 16, 2) if options.quick else (MLPERF_FILTERS, 128, BATCH)
    started = time.perf_counter()
    torch.backends.cudnn.benchmark = device.type == "cuda"
    rows: list[list[object]] = []
    for layer in layers(filters, (side, side, side)):
        if time.perf_counter() - started > LIMIT_S:
            rows.append([layer.name, *[""] * 7, f"{NOT_MEASURED}: no time left"])
            continue
        with exact_fp32():
            errors = {dtype: error_of(layer, dtype, device) for dtype in (torch.bfloat16, torch.float16)}
        x = normal(batch, *layer.shape, device=device)
        last = times_of(layer, x, "NDHWC")
        first = times_of(layer, x, "NCDHW")
        rates = [
            batch * layer.flops() * factor / t / 1e12 for factor, t in zip(backward_work(layer), last, strict=True)
        ]
        slowdown = sum(last) / sum(first)
        problems = [
            *(
                f"wrong in {str(t).removeprefix('torch.')}"
                for t, e in errors.items()
                if not e <= ROUNDINGS * limit_of(t)
            ),
            *(["slower than NCDHW"] if slowdown > SLOWDOWN_LIMIT else []),
        ]
        milliseconds = [1e3 * t for t in last]
        rows.append([layer.name, *milliseconds, *rates, slowdown, *errors.values(), ", ".join(problems) or "ok"])
    columns = [
        "convolution",
        "ms forward",
        "ms backward",
        "TFLOP/s forward",
        "TFLOP/s backward",
        "time / NCDHW",
        "error, bf16",
        "error, fp16",
        "verdict",
    ]
    notes = [
        f"bfloat16, channels-last, {batch} samples, medians of {REPETITIONS}; errors: the largest difference from fp32 "
        "on the same inputs, relative to the largest value, over output and gradients of one sample."
    ]
    return checked("Convolutions", rows, notes, columns)


def backward_work(layer: Layer) -> tuple[int, int]:
    """Forward passes' worth of operations, forward and backward."""
    return 1, 1 if layer.shape[0] <= CHANNELS else 2


def times_of(layer: Layer, x: Tensor, layout: str) -> tuple[float, float]:
    """Seconds of the forward and of the backward pass in 16 bit, medians."""
    dtype = torch.bfloat16 if x.is_cuda else torch.float32
    works = passes(layer, x, dtype, layout)
    forward, backward = (
        statistics.median([seconds(work, x.device) for _ in range(REPETITIONS + 2)][2:]) for work in works
    )
    return forward, backward


def error_of(layer: Layer, dtype: torch.dtype, device: torch.device) -> float:
    """The largest error of output and gradients of one sample, compared with fp32 on the same rounded tensors."""
    x = normal(1, *layer.shape, device=device)
    results: list[list[Tensor]] = []
    for layout, compute in (("NDHWC", dtype), ("NCDHW", torch.float32)):
        forward, backward = passes(layer, x, dtype, layout, compute=compute)
        results.append([*forward(), *backward()])
    return max(relative_error(found.detach(), right.detach()) for found, right in zip(*results, strict=True))
