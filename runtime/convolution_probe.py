"""Whether this PyTorch and cuDNN compute 16-bit 3-D convolutions right, and in channels-last at full speed.

Some pairs do not: with torch 2.9 and cuDNN 9.8 to 9.15 they were several times slower, or wrong in silence (PyTorch's
issues 163539 and 166122). Two layers like the network's take a second, so every run on a GPU tries them first.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.check_table import Check
from runtime.memory_format import MEMORY_FORMATS
from runtime.precision import Precision
from runtime.warmup import seconds

# Output and gradients are rounded to 16 bit once; cuDNN adds partial sums in an order of its own.
ROUNDINGS = 2
# Above this, channels-last is broken and not slow by chance.
SLOWDOWN = 3.0
REPETITIONS = 5
SAMPLES = 2


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A convolution.

    Attributes:
        transposed: whether it is a transposed one, without padding.
        filters: F, the output's channels.
        kernel, stride: along each axis; the padding is half the kernel.
        shape: (C, D, H, W) of its input.
        is_first: whether its input is the image, which needs no gradient.
    """

    transposed: bool
    filters: int
    kernel: int
    stride: int
    shape: tuple[int, int, int, int]
    is_first: bool = False

    def __str__(self) -> str:
        channels, depth, _, _ = self.shape
        arrow = "up to" if self.transposed else "to"
        return f"{self.kernel}^3 {channels} {arrow} {self.filters}, stride {self.stride}, at {depth}^3"

    def weight_shape(self) -> tuple[int, ...]:
        """Shape of its weight: (C, F, k, k, k) if it is transposed, else (F, C, k, k, k)."""
        ends = (self.shape[0], self.filters) if self.transposed else (self.filters, self.shape[0])
        return (*ends, self.kernel, self.kernel, self.kernel)

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.transposed:
            return F.conv_transpose3d(x, weight, stride=self.stride)
        return F.conv3d(x, weight, stride=self.stride, padding=self.kernel // 2)


PROBED = (
    Layer(transposed=False, filters=64, kernel=3, stride=1, shape=(64, 32, 32, 32)),
    Layer(transposed=False, filters=128, kernel=3, stride=2, shape=(64, 32, 32, 32)),
)


def check_convolutions(precision: Precision, layout: str) -> Check:
    """Tries 16-bit convolutions on this device. The verdict is "fail" if they are wrong, "warn" if they are slow."""
    dtype = precision.dtype
    assert dtype is not None, "only 16-bit convolutions are tried"
    pair = f"torch {torch.__version__} with cuDNN {torch.backends.cudnn.version()}"
    kind = str(dtype).removeprefix("torch.")
    error = max(error_of(layer, dtype, precision.device, layout) for layer in PROBED)
    if not error <= ROUNDINGS * torch.finfo(dtype).eps:
        found = f"{pair} computes {kind} convolutions wrong: off by {error:.2g} of the largest value"
        return Check("convolutions", found, "fail", "use another version of either, or run without --amp")
    found = f"{kind} agrees with fp32 to {error:.2g} of the largest value"
    if layout == "NCDHW":
        return Check("convolutions", found)
    last, first = (
        sum(sum(times_of(layer, dtype, precision.device, name, samples=SAMPLES)) for layer in PROBED)
        for name in (layout, "NCDHW")
    )
    found += f"; channels-last takes {last / first:.2g} times as long as NCDHW"
    if last > SLOWDOWN * first:
        return Check("convolutions", f"{found} with {pair}", "warn", "use another version of either, or --layout NCDHW")
    return Check("convolutions", found)


def error_of(layer: Layer, dtype: torch.dtype, device: torch.device, layout: str) -> float:
    """Returns the largest error of output and gradients of one sample, compared with fp32 on the same rounded tensors.

    It is relative to the largest value, and infinite if a value is not finite.
    """
    results: list[list[Tensor]] = []
    with exact_fp32():
        for order, compute in ((layout, dtype), ("NCDHW", torch.float32)):
            forward, backward = passes(layer, dtype, device, order, compute=compute)
            results.append([*forward(), *backward()])
    return max(relative_error(found.detach(), right.detach()) for found, right in zip(*results, strict=True))


def times_of(
    layer: Layer, dtype: torch.dtype, device: torch.device, layout: str, *, samples: int
) -> tuple[float, float]:
    """Returns the seconds of the forward and of the backward pass, medians."""
    works = passes(layer, dtype, device, layout, samples=samples)
    forward, backward = (
        statistics.median([seconds(work, device) for _ in range(REPETITIONS + 2)][2:]) for work in works
    )
    return forward, backward


def passes(
    layer: Layer,
    dtype: torch.dtype,
    device: torch.device,
    layout: str,
    *,
    compute: torch.dtype | None = None,
    samples: int = 1,
) -> tuple[Callable[[], Sequence[Tensor]], Callable[[], Sequence[Tensor]]]:
    """Returns the forward pass, which returns the output, and the backward pass, which returns the gradients.

    Args:
        dtype: the format to which input, weight and the output's gradient are rounded.
        compute: the format of the arithmetic, if not `dtype`.
    """
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        values = torch.randn(shape, device=device, generator=generator).to(dtype).to(compute or dtype)
        return values.contiguous(memory_format=MEMORY_FORMATS[layout])

    x = random(samples, *layer.shape).requires_grad_(not layer.is_first)
    weight = random(*layer.weight_shape()).requires_grad_()
    output = layer(x, weight)
    gradient = random(*output.shape)
    wanted = [tensor for tensor in (x, weight) if tensor.requires_grad]
    return (
        lambda: [layer(x, weight)],
        lambda: torch.autograd.grad(output, wanted, gradient, retain_graph=True),
    )


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Returns the largest difference, relative to the largest expected value; infinite if a value is not finite."""
    if not found.isfinite().all():
        return float("inf")
    scale = expected.float().abs().max().clamp(min=1e-30)
    return ((found.float() - expected.float()).abs().max() / scale).item()


@contextmanager
def exact_fp32() -> Iterator[None]:
    """Computes fp32 convolutions in fp32 inside the block, not in TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # that of matrix products is off unless asked for
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
