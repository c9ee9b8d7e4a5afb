"""Each convolution of the network on its own: whether cuDNN computes it right in 16 bit, and how fast."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor, nn

from benchmarks.harness import NOT_MEASURED, Options, Table
from benchmarks.step import CHANNELS, CLASSES
from model.unet3d import MLPERF_FILTERS, Unet3d
from runtime.convolution_probe import REPETITIONS, ROUNDINGS, Layer, error_of, times_of

SAMPLES = 4
# Seconds after which the layers that are left are not measured: autotuning takes a while for each.
LIMIT_S = 90
SLOW = 1.5
COLUMNS = [
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


def layers(filters: tuple[int, ...], window: tuple[int, int, int]) -> list[Layer]:
    """The distinct convolutions of the network, in order of the forward pass, found on the meta device."""
    found: dict[Layer, None] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        assert isinstance(module, nn.Conv3d | nn.ConvTranspose3d)
        _, c, d, h, w = inputs[0].shape
        layer = Layer(
            transposed=isinstance(module, nn.ConvTranspose3d),
            filters=module.out_channels,
            kernel=module.kernel_size[0],
            stride=module.stride[0],
            shape=(c, d, h, w),
            is_first=not found,
        )
        found[layer] = None

    with torch.device("meta"):
        network = Unet3d(CHANNELS, CLASSES, filters=filters)
        for module in network.modules():
            if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
                module.register_forward_hook(note)
        network(torch.empty(1, CHANNELS, *window))
    return list(found)


def flops(layer: Layer) -> float:
    """Operations of the forward pass for one sample."""
    channels, *size = layer.shape
    outputs = math.prod(size) / (1 if layer.transposed else layer.stride**3)
    return 2.0 * channels * layer.filters * layer.kernel**3 * outputs


def convolutions(options: Options) -> Table:
    """Errors against fp32 and times of each convolution, forward and backward."""
    device = options.device
    torch.backends.cudnn.benchmark = device.type == "cuda"
    filters, side, samples = ((4, 8), 16, 2) if options.quick else (MLPERF_FILTERS, 128, SAMPLES)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    started = time.perf_counter()
    rows: list[list[object]] = []
    wrong = []
    for layer in layers(filters, (side, side, side)):
        if time.perf_counter() - started > LIMIT_S:
            rows.append([str(layer), *[""] * 7, f"{NOT_MEASURED}: no time left"])
            continue
        errors = {kind: error_of(layer, kind, device, "NDHWC") for kind in (torch.bfloat16, torch.float16)}
        last, first = (times_of(layer, dtype, device, layout, samples=samples) for layout in ("NDHWC", "NCDHW"))
        work = (1, 1 if layer.is_first else 2)  # backward: the gradients of weight and input
        rates = [samples * flops(layer) * factor / t / 1e12 for factor, t in zip(work, last, strict=True)]
        slowdown = sum(last) / sum(first)
        is_right = all(error <= ROUNDINGS * torch.finfo(kind).eps for kind, error in errors.items())
        wrong += [] if is_right else [str(layer)]
        verdict = "WRONG" if not is_right else "slower than NCDHW" if slowdown > SLOW else "ok"
        rows.append([str(layer), *(1e3 * t for t in last), *rates, slowdown, *errors.values(), verdict])
    notes = [
        f"cuDNN's convolutions, {str(dtype).removeprefix('torch.')}, channels-last, {samples} samples, medians of "
        f"{REPETITIONS}; errors: the largest difference from fp32 on the same inputs, relative to the largest value, "
        "over output and gradients of one sample. Where Triton's kernels compute a layer, see the choices."
    ]
    problem = f"Convolutions: wrong: {', '.join(wrong)}" if wrong else ""
    return Table("Convolutions", COLUMNS, rows, notes, problem=problem)
