"""The Triton kernels against the PyTorch functions; `test_triton.py` runs this file in a process of its own.

With TRITON_INTERPRET=1, which must be set before anything imports Triton, they run in Triton's interpreter on the CPU;
otherwise compiled, on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import convolutions, losses, normalization
from model.kernels import triton as triton_kernels
from model.kernels.triton import loss, norm, tiles
from model.slabs import SlabConv3d
from model.unet3d import Unet3d
from runtime.memory_format import to_device

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
LAYOUTS = {"ncdhw": torch.contiguous_format, "last": torch.channels_last_3d}
EPS = 1e-5
# A full window of 128^3 voxels takes the interpreter 28 s and meets the same bounds.
LARGE = (32, 64, 128) if DEVICE == "cpu" else (128, 128, 128)


@pytest.fixture(params=["as_it_is", "cut"])
def _tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tile and one program, or several of both with the last ones partly empty."""
    if request.param == "cut":
        monkeypatch.setattr(norm, "TILE", 512)
        monkeypatch.setattr(norm, "MOMENTS_TILE", 512)
        monkeypatch.setattr(norm, "GRADIENT_TILE", 512)
        monkeypatch.setattr(loss, "SOFTMAX_TILE", 512)
        monkeypatch.setattr(tiles, "PROGRAMS", 3)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def assert_same(found: Tensor, expected: Tensor, digits: float = 2e-6) -> None:
    """Compares type, shape, layout, and values to within `digits` of the largest or half a 16-bit digit of each."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    for layout in LAYOUTS.values():
        assert found.is_contiguous(memory_format=layout) == expected.is_contiguous(memory_format=layout)
    atol = digits * expected.abs().max().item()
    rtol = 0.0 if expected.dtype == torch.float32 else torch.finfo(expected.dtype).eps
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize(("dtype", "layout"), [(torch.float32, "ncdhw"), (torch.bfloat16, "last")])
@pytest.mark.parametrize(
    ("shape", "slope"),
    [((2, 1, 5, 6, 7), 0.01), ((2, 3, 7, 9, 11), 0.0), ((3, 32, 4, 4, 4), 0.01), ((1, 320, 1, 3, 5), 0.0)],
    ids=str,
)
def test_norm(shape: tuple[int, ...], slope: float, dtype: torch.dtype, layout: str) -> None:
    """`layout` is the memory format of the incoming gradient."""
    x = (1 + normal(*shape)).to(dtype).contiguous(memory_format=torch.channels_last_3d)
    weight, bias = normal(shape[1], seed=1), normal(shape[1], seed=2)
    expected = normalization.norm_forward(x, weight, bias, eps=EPS, slope=slope)
    for found, right in zip(triton_kernels.norm_forward(x, weight, bias, eps=EPS, slope=slope), expected, strict=True):
        assert_same(found, right)
    y, mean, inverse = expected
    grad = normal(*shape, seed=3).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    arguments = (grad, normalization.NormState(x, y, weight, bias, mean, inverse), slope)
    # The PyTorch version rounds a 16-bit gradient before the activation, the kernel does not.
    digits = 2e-6 if slope == 0 or dtype == torch.float32 else slope * torch.finfo(dtype).eps
    for found, right in zip(
        triton_kernels.norm_backward(*arguments), normalization.norm_backward(*arguments), strict=True
    ):
        assert_same(found, right, digits)


class OneOfTwo:
    """A `Slabs` of which the other rank's sums are a function of this one's."""

    count = 2

    def gather(self, tensor: Tensor) -> Tensor:
        return torch.stack((tensor, 1.5 * tensor + 1))

    def exchange(self, to_previous: Tensor | None, to_next: Tensor | None) -> tuple[Tensor, Tensor]:
        raise AssertionError("a norm has no halo")


@pytest.mark.usefixtures("_tiles")
def test_norm_of_a_slab() -> None:
    x = (1 + normal(2, 3, 7, 9, 11)).contiguous(memory_format=torch.channels_last_3d)
    weight, bias, slabs = normal(3, seed=1), normal(3, seed=2), OneOfTwo()
    expected = normalization.norm_forward(x, weight, bias, eps=EPS, slope=0.01, slabs=slabs)
    found = triton_kernels.norm_forward(x, weight, bias, eps=EPS, slope=0.01, slabs=slabs)
    for one, right in zip(found, expected, strict=True):
        assert_same(one, right)
    alone = normalization.norm_forward(x, weight, bias, eps=EPS, slope=0.01)
    assert not torch.allclose(expected[0], alone[0], atol=0.1)
    y, mean, inverse = expected
    grad = normal(*x.shape, seed=3).contiguous(memory_format=torch.channels_last_3d)
    arguments = (grad, normalization.NormState(x, y, weight, bias, mean, inverse), 0.01, slabs)
    for one, right in zip(
        triton_kernels.norm_backward(*arguments), normalization.norm_backward(*arguments), strict=True
    ):
        assert_same(one, right)


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("classes", "side"), [(2, 11), (3, 9), (5, 7), (20, 4)])
def test_loss_sums(classes: int, side: int, layout: str, dtype: torch.dtype) -> None:
    shape = (2, classes, side, side, side + 1)
    logits = (5 * normal(*shape)).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    labels = (normal(2, 1, *shape[2:], seed=1).abs() * classes / 3).clamp(max=classes - 1).to(torch.uint8)
    found, expected = triton_kernels.sums_forward(logits, labels), losses.sums_forward(logits, labels)
    for one, right in zip(found[:3], expected[:3], strict=True):
        assert_same(one, right)
    assert torch.equal(found[3], expected[3])
    above = losses.DiceSums(normal(2, seed=2), normal(2, classes, seed=3), normal(2, classes, seed=4), found[3])
    assert_same(triton_kernels.sums_backward(logits, labels, above), losses.sums_backward(logits, labels, above))


def test_far_logits_and_any_labels_and_any_strides() -> None:
    """Logits of 1e4 do not overflow; int64 labels, sliced inputs and expanded gradients work."""
    whole = 1e4 * normal(2, 3, 4, 5, 12)
    logits, labels = whole[..., ::2], (normal(2, 1, 4, 5, 12) > 0).long()[..., ::2]
    for one, right in zip(
        triton_kernels.sums_forward(logits, labels), losses.sums_forward(logits, labels), strict=True
    ):
        assert_same(one, right)
    above = losses.DiceSums(normal(1).expand(2), normal(1, 1).expand(2, 3), normal(1, 3).expand(2, 3), torch.empty(0))
    found, right = (module.sums_backward(logits, labels, above) for module in (triton_kernels, losses))
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)


def test_the_operators_take_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules call the kernels, forward and backward, in bfloat16 with fp32 parameters."""

    def step() -> list[Tensor]:
        norm = normalization.InstanceNormActivation(3, 0.01).to(DEVICE)
        x = normal(2, 3, 4, 5, 6).bfloat16().contiguous(memory_format=torch.channels_last_3d).requires_grad_()
        labels = (normal(2, 1, 4, 5, 6, seed=1) > 0).to(torch.uint8)
        loss = losses.DiceCELoss()(norm(x), labels)
        loss.backward()
        gradients = [tensor.grad for tensor in (x, *norm.parameters())]
        return [loss.detach(), *(gradient for gradient in gradients if gradient is not None)]

    calls = []
    for name in ("norm_forward", "norm_backward", "sums_forward", "sums_backward"):
        kernel = getattr(triton_kernels, name)
        monkeypatch.setattr(
            triton_kernels,
            name,
            lambda *args, name=name, kernel=kernel, **options: (calls.append(name), kernel(*args, **options))[1],
        )
    results = []
    for module in (None, triton_kernels):
        for importer in (normalization, losses):
            monkeypatch.setattr(importer, "triton_for", lambda x, operator, module=module: module)
        results.append(step())
    assert calls == ["norm_forward", "sums_forward", "sums_backward", "norm_backward"]
    plain, fused = results
    assert len(plain) == 4
    for one, other in zip(fused, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0.01, atol=1e-4)


def test_sums_over_many_voxels_hold_their_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean 100 and standard deviation 1, in many tiles, several per program."""
    monkeypatch.setattr(tiles, "PROGRAMS", 32)
    shape = (1, 2, *LARGE)
    x = (100 + normal(*shape)).contiguous(memory_format=torch.channels_last_3d)
    weight, bias = normal(2, seed=1), normal(2, seed=2)
    _, mean, inverse = triton_kernels.norm_forward(x, weight, bias, eps=EPS, slope=1.0)
    values, exact_weight = x.double().flatten(2), weight.double()
    exact_mean = values.mean(2)
    exact_inverse = (values.var(2, correction=0) + EPS).rsqrt()
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(inverse.double(), exact_inverse, rtol=1e-6, atol=0)
    # With a slope of 1 there is no kink, and the sums do not cancel where grad follows x.
    grad = (x - 99 + normal(*shape, seed=3)).contiguous(memory_format=torch.channels_last_3d)
    state = normalization.NormState(x, x, weight, bias, mean, inverse)
    dx, dweight, dbias = triton_kernels.norm_backward(grad, state, 1.0)
    g, z = grad.double().flatten(2), (values - exact_mean[..., None]) * exact_inverse[..., None]
    g_mean, gz_mean = g.mean(2, keepdim=True), (g * z).mean(2, keepdim=True)
    right = (exact_weight * exact_inverse)[..., None] * (g - g_mean - z * gz_mean)
    torch.testing.assert_close(dbias.double(), g.sum((0, 2)), rtol=1e-6, atol=0)
    torch.testing.assert_close(dweight.double(), (g * z).sum((0, 2)), rtol=5e-6, atol=0)
    assert (dx.double().flatten(2) - right).abs().max() < 2e-5 * right.abs().max()


def test_loss_sums_over_many_voxels_hold_their_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "PROGRAMS", 32)
    logits = normal(1, 2, *LARGE)
    labels = (normal(1, 1, *LARGE, seed=1) > 1).to(torch.uint8)
    cross_entropy, intersection, predicted, true = triton_kernels.sums_forward(logits, labels)
    logarithms, truth = logits.double().log_softmax(1), torch.cat((labels == 0, labels == 1), 1)
    space = (2, 3, 4)
    torch.testing.assert_close(cross_entropy.double(), -(logarithms * truth).sum((1, *space)), rtol=1e-6, atol=0)
    torch.testing.assert_close(intersection.double(), (logarithms.exp() * truth).sum(space), rtol=1e-6, atol=0)
    torch.testing.assert_close(predicted.double(), logarithms.exp().sum(space), rtol=1e-6, atol=0)
    assert torch.equal(true.long(), truth.sum(space))


# Triton's interpreter has no matrix products of bfloat16.
HALF = [torch.float16] if DEVICE == "cpu" else [torch.float16, torch.bfloat16]


def last(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).contiguous(memory_format=LAYOUTS["last"])


def assert_close_to_exact(found: Sequence[Tensor], exact: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Compares with fp32 on the same inputs: fp32 results to rounding, others to half a digit of the largest value."""
    for one, right in zip(found, exact, strict=True):
        assert one.shape == right.shape
        digits = 1e-5 if one.dtype == torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(one.float(), right, rtol=0, atol=digits * right.abs().max().item())


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("channels", "filters", "size"), [(1, 32, (5, 6, 7)), (2, 20, (4, 4, 9)), (4, 16, (1, 8, 8))])
def test_the_convolution_of_an_image(
    channels: int, filters: int, size: tuple[int, int, int], dtype: torch.dtype
) -> None:
    x = normal(2, channels, *size).contiguous(memory_format=LAYOUTS["last"])
    weight = last(normal(filters, channels, 3, 3, 3, seed=1), dtype)
    exact = weight.float().requires_grad_()
    expected = F.conv3d(x.to(dtype).float(), exact, padding=1)
    grad = last(normal(*expected.shape, seed=2), dtype)
    expected.backward(grad.float())
    found = triton_kernels.image_forward(x, weight), triton_kernels.image_weight_gradient(x, grad)
    assert found[0].is_contiguous(memory_format=LAYOUTS["last"])
    assert_close_to_exact(found, [expected.detach(), exact.grad], dtype)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("channels", "size"), [(32, (3, 4, 8)), (64, (2, 3, 16)), (32, (2, 2, 128))])
def test_a_convolution_to_few_channels(channels: int, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, weight = last(normal(2, channels, *size), dtype), last(normal(32, channels, 3, 3, 3, seed=1), dtype)
    exact = [tensor.float().requires_grad_() for tensor in (x, weight)]
    expected = F.conv3d(*exact, padding=1)
    grad = last(normal(*expected.shape, seed=2), dtype)
    expected.backward(grad.float())
    found = [triton_kernels.narrow_forward(x, weight), triton_kernels.narrow_weight_gradient(x, grad)]
    assert_close_to_exact(found, [expected.detach(), exact[1].grad], dtype)
    if channels == 32:
        assert_close_to_exact([triton_kernels.narrow_input_gradient(grad, weight)], [exact[0].grad], dtype)
    assert triton_kernels.takes_rows(size[2])
    assert not triton_kernels.takes_rows(96)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    ("channels", "filters", "size"), [(64, 32, (3, 4, 5)), (20, 12, (2, 3, 4)), (72, 136, (1, 2, 2))]
)
def test_upsampling_into_a_joined_tensor(
    channels: int, filters: int, size: tuple[int, int, int], dtype: torch.dtype
) -> None:
    x, weight = last(normal(2, channels, *size), dtype), last(normal(channels, filters, 2, 2, 2, seed=1), dtype)
    bias, doubled = normal(filters, seed=2), [2 * n for n in size]
    skip = last(normal(2, filters, *doubled, seed=3), dtype)
    exact = [tensor.float().requires_grad_() for tensor in (x, weight, bias)]
    expected = torch.cat((F.conv_transpose3d(*exact, stride=2), skip.float()), 1)
    grad = last(normal(*expected.shape, seed=4), dtype)
    expected.backward(grad.float())
    joined = triton_kernels.join_forward(x, skip, weight, bias)
    found = [joined, *triton_kernels.join_backward(grad, x, weight)]
    assert_close_to_exact(found, [expected.detach(), *(tensor.grad for tensor in exact)], dtype)
    assert torch.equal(joined[:, filters:], skip)
    encoder, decoder = last(normal(*skip.shape, seed=5), dtype), grad[:, filters:]
    assert torch.equal(triton_kernels.add_part(encoder, decoder), encoder + decoder)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("channels", "classes", "size"), [(32, 3, (5, 6, 7)), (20, 2, (4, 4, 4)), (64, 20, (3, 4, 5))])
def test_the_convolution_to_the_classes(
    channels: int, classes: int, size: tuple[int, int, int], dtype: torch.dtype
) -> None:
    x, weight = last(normal(2, channels, *size), dtype), last(normal(classes, channels, 1, 1, 1, seed=1), dtype)
    bias = normal(classes, seed=2)
    exact = [tensor.float().requires_grad_() for tensor in (x, weight, bias)]
    expected = F.conv3d(*exact)
    grad = last(normal(*expected.shape, seed=3), dtype)
    expected.backward(grad.float())
    found = [triton_kernels.output_forward(x, weight, bias), *triton_kernels.output_backward(grad, x, weight)]
    assert_close_to_exact(found, [expected.detach(), *(tensor.grad for tensor in exact)], dtype)


def test_a_network_of_kernels_has_the_plain_network_s_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole U-Net in fp16, whose modules call every kernel: within twice the error of PyTorch's own operators."""
    calls: set[str] = set()
    for name in triton_kernels.__all__:
        kernel = getattr(triton_kernels, name)
        monkeypatch.setattr(
            triton_kernels,
            name,
            lambda *args, name=name, kernel=kernel, **options: (calls.add(name), kernel(*args, **options))[1],
        )
    results = []
    for module, dtype in ((None, torch.float32), (None, torch.float16), (triton_kernels, torch.float16)):
        for user in (normalization, convolutions):
            monkeypatch.setattr(user, "triton_for", lambda x, operator, module=module: module)
        torch.manual_seed(0)
        network = to_device(Unet3d(1, 3, filters=(32, 64, 64)), torch.device(DEVICE), "NDHWC")
        for layer in network.modules():
            if type(layer) is SlabConv3d:  # which on a CPU leaves channels-last in 16 bit
                layer.register_forward_hook(lambda layer, inputs, output: last(output, output.dtype))
        with torch.autocast(DEVICE, dtype=dtype, enabled=dtype == torch.float16):
            logits = network(normal(1, 1, 8, 8, 16))
        (1e4 * logits.float().square().mean()).backward()  # above fp16's smallest numbers
        results.append([logits.detach().float(), *(p.grad for p in network.parameters())])
    # On a CPU the gradient of a 16-bit convolution with stride 2 may not be channels-last: PyTorch then adds it.
    assert calls | {"add_part"} == set(triton_kernels.__all__) - {"sums_forward", "sums_backward"}
    errors = [
        [float((tensor - right).norm() / right.norm()) for tensor in (plain, found)]
        for right, plain, found in zip(*results, strict=True)
    ]
    # A small network in fp16 is off by some percent; a wrong kernel, by all of it.
    assert sum(found for _, found in errors) <= 2 * sum(plain for plain, _ in errors)
    assert max(found for _, found in errors) <= 4 * max(plain for plain, _ in errors)
