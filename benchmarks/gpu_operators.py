"""Triton's operators on a GPU, compared with what defines them: PyTorch's own operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_checks import FP32_LIMIT, checked, limit_of, normal, verdict
from benchmarks.harness import Options, Table
from model import losses, normalization
from model.losses import DiceSums
from model.normalization import NormState
from model.unet3d import MLPERF_FILTERS
from runtime.convolution_probe import exact_fp32, relative_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALF = DTYPES[1:]
# Every width of the benchmark's network, one channel, and widths that are no power of two.
WIDTHS = (1, 3, 20, *sorted(set(MLPERF_FILTERS)))
FEW_WIDTHS = (32, 320)
CLASS_COUNTS = (2, 3, 20)
EPS = 1e-5
# More elements than a 32-bit index reaches: several samples, and one sample.
LARGE_SHAPES = ((33, 32, 128, 128, 128), (1, 32, 512, 512, 257))
LAST = torch.channels_last_3d


def triton_operators(options: Options) -> Table:
    """Every operator, number format and width of the network."""
    from model.kernels import triton as kernels

    device = options.device
    rows: list[list[object]] = []

    def add(name: str, dtype: torch.dtype, errors: Sequence[tuple[float, float]], limit: float) -> None:
        forward, backward = (max(column) for column in zip(*errors, strict=True))
        kind = str(dtype).removeprefix("torch.")
        rows.append([f"{name} forward, {kind}", forward, limit, verdict(forward, limit)])
        limit = limit_of(dtype)
        rows.append([f"{name} backward, {kind}", backward, limit, verdict(backward, limit)])

    for dtype in DTYPES:
        # Each width is compiled anew, which takes a second or two.
        widths = FEW_WIDTHS if dtype == torch.float16 else WIDTHS
        errors = [norm_errors(kernels, norm_input(width, dtype, device)) for width in widths]
        add("norm", dtype, errors, limit_of(dtype))
        logits = [normal(2, classes, 33, 32, 31, device=device).mul(5).to(dtype) for classes in CLASS_COUNTS]
        layouts = (torch.contiguous_format, LAST)
        errors = [loss_errors(kernels, x.contiguous(memory_format=layout)) for x in logits for layout in layouts]
        add("loss", dtype, errors, FP32_LIMIT)
    for dtype in HALF:
        for name, errors in convolution_errors(kernels, dtype, device).items():
            add(name, dtype, errors, limit_of(dtype))
    notes = [
        f"Against PyTorch's operators on the same tensors; {WIDTHS} channels (fp16: {FEW_WIDTHS}), {CLASS_COUNTS} "
        "classes; convolutions against fp32. The error is the largest difference relative to the largest value."
    ]
    return checked("Triton operators", rows, notes)


def norm_input(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    side = 32 if width <= 64 else 8
    return (1 + normal(2, width, side, side, side + 3, device=device)).to(dtype).contiguous(memory_format=LAST)


def norm_errors(kernels: ModuleType, x: Tensor) -> tuple[float, float]:
    """The errors of norm and activation forward and backward, for x (N, C, D, H, W) channels-last."""
    weight, bias = (normal(x.shape[1], device=x.device, seed=seed) for seed in (1, 2))
    grad = normal(*x.shape, device=x.device, seed=3).to(x.dtype).contiguous(memory_format=LAST)
    results = []
    for module in (kernels, normalization):
        y, mean, inverse_std = module.norm_forward(x, weight, bias, eps=EPS, slope=0.0)
        state = NormState(x, y, weight=weight, bias=bias, mean=mean, inverse_std=inverse_std)
        results.append(((y, mean, inverse_std), module.norm_backward(grad, state, 0.0)))
    return largest_errors(results)


def loss_errors(kernels: ModuleType, logits: Tensor) -> tuple[float, float]:
    """The errors of the loss's sums and of their gradient, for logits (N, K, D, H, W)."""
    n, classes = logits.shape[:2]
    generator = torch.Generator(logits.device).manual_seed(4)
    labels = torch.randint(
        classes, (n, 1, *logits.shape[2:]), device=logits.device, generator=generator, dtype=torch.uint8
    )
    of_sample, of_class = (normal(*shape, device=logits.device, seed=5) for shape in ((n,), (n, classes)))
    results = []
    for module in (kernels, losses):
        sums = module.sums_forward(logits, labels)
        gradient = module.sums_backward(logits, labels, DiceSums(of_sample, of_class, -of_class, sums[3]))
        results.append((sums, (gradient,)))
    return largest_errors(results)


def convolution_errors(
    kernels: ModuleType, dtype: torch.dtype, device: torch.device
) -> dict[str, list[tuple[float, float]]]:
    """The errors of the convolutions that Triton computes, in several shapes."""

    def tensor(*shape: int, seed: int = 0) -> Tensor:
        scaled = normal(*shape, device=device, seed=seed)
        return scaled.to(dtype).contiguous(memory_format=LAST) if len(shape) == 5 else scaled

    def image(channels: int, filters: int) -> tuple[float, float]:
        x, weight = tensor(2, channels, 33, 40, 47), tensor(filters, channels, 3, 3, 3, seed=1)
        return compare(
            lambda grad: (kernels.image_forward(x, weight), (kernels.image_weight_gradient(x, grad),)),
            lambda w: F.conv3d(x.float(), w, padding=1),
            [weight],
        )

    def narrow(channels: int, width: int) -> tuple[float, float]:
        x, weight = tensor(2, channels, 20, 33, width), tensor(32, channels, 3, 3, 3, seed=1)

        def ours(grad: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            # From 64 channels the gradient of x is cuDNN's.
            dx = [kernels.narrow_input_gradient(grad, weight)] if channels == 32 else []
            return kernels.narrow_forward(x, weight), (*dx, kernels.narrow_weight_gradient(x, grad))

        inputs = [x, weight] if channels == 32 else [weight]
        return compare(
            ours, lambda *given: F.conv3d(given[0] if len(given) == 2 else x.float(), given[-1], padding=1), inputs
        )

    def join(channels: int, filters: int, side: int) -> tuple[float, float]:
        x, skip = (
            tensor(2, channels, side, side, side + 1),
            tensor(2, filters, 2 * side, 2 * side, 2 * side + 2, seed=1),
        )
        weight, bias = tensor(channels, filters, 2, 2, 2, seed=2), tensor(filters, seed=3)
        return compare(
            lambda grad: (kernels.join_forward(x, skip, weight, bias), kernels.join_backward(grad, x, weight)),
            lambda x, w, b: torch.cat((F.conv_transpose3d(x, w, b, stride=2), skip.float()), 1),
            [x, weight, bias],
        )

    def output(channels: int, classes: int) -> tuple[float, float]:
        x, weight, bias = (
            tensor(2, channels, 33, 40, 47),
            tensor(classes, channels, 1, 1, 1, seed=1),
            tensor(classes, seed=2),
        )
        return compare(
            lambda grad: (kernels.output_forward(x, weight, bias), kernels.output_backward(grad, x, weight)),
            F.conv3d,
            [x, weight, bias],
        )

    with exact_fp32():
        return {
            "image": [image(channels, filters) for channels, filters in ((1, 32), (2, 20), (4, 16))],
            "narrow": [narrow(channels, width) for channels in (32, 64) for width in (32, 128)],
            "join": [
                join(*shape) for shape in ((64, 32, 20), (128, 64, 16), (320, 256, 8), (320, 320, 4), (20, 12, 5))
            ],
            "output": [output(channels, classes) for channels, classes in ((32, 3), (20, 2), (64, 20))],
        }


def compare(
    ours: Callable[[Tensor], tuple[Tensor, tuple[Tensor, ...]]],
    plain: Callable[..., Tensor],
    inputs: Sequence[Tensor],
) -> tuple[float, float]:
    """The largest errors of output and gradients compared with autograd of a plain function in fp32.

    Args:
        ours: the output's gradient -> the output and the gradients of the inputs.
        plain: the same output, of the inputs in fp32.
    """
    exact = [tensor.float().requires_grad_() for tensor in inputs]
    output = plain(*exact)
    dtype = next(tensor.dtype for tensor in inputs if tensor.dim() == 5)
    grad = normal(*output.shape, device=output.device, seed=9).to(dtype).contiguous(memory_format=LAST)
    found = ours(grad)
    return largest_errors([((found[0],), found[1]), ((output,), torch.autograd.grad(output, exact, grad.float()))])


def largest_errors(results: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> tuple[float, float]:
    """The largest errors of what the first of two implementations returned forward and backward."""
    forward, backward = (max(map(relative_error, *pair)) for pair in zip(*results, strict=True))
    return forward, backward


def large_tensors(options: Options) -> Table:
    """Norm and activation on tensors with more than 2^31 elements, compared on their last sample."""
    from model.kernels import triton as kernels

    rows: list[list[object]] = []
    for shape in LARGE_SHAPES:
        x = torch.empty(shape, device=options.device, dtype=torch.bfloat16, memory_format=LAST)
        x.normal_(generator=torch.Generator(options.device).manual_seed(0))
        weight, bias = (normal(shape[1], device=options.device, seed=seed) for seed in (1, 2))
        y, mean, inverse_std = kernels.norm_forward(x, weight, bias, eps=EPS, slope=0.0)
        state = NormState(x, y, weight=weight, bias=bias, mean=mean, inverse_std=inverse_std)
        dx, _, _ = kernels.norm_backward(x, state, 0.0)
        # The last sample lies beyond 2^31 elements, or its own last voxels do.
        last = x[-1:].contiguous(memory_format=LAST)
        right, right_mean, right_std = normalization.norm_forward(last, weight, bias, eps=EPS, slope=0.0)
        error = max(relative_error(y[-1:], right), relative_error(mean[-1:], right_mean))
        state = NormState(last, right, weight=weight, bias=bias, mean=right_mean, inverse_std=right_std)
        error_back = relative_error(dx[-1:], normalization.norm_backward(last, state, 0.0)[0])
        name, limit = " x ".join(map(str, shape)), limit_of(x.dtype)
        rows += [
            [f"norm forward, {name}", error, limit, verdict(error, limit)],
            [f"norm backward, {name}", error_back, limit, verdict(error_back, limit)],
        ]
        del x, y, dx, last, right, state
        torch.cuda.empty_cache()
    return checked("Large tensors", rows, ["bfloat16, channels-last; compared on the last sample."])
