"""Instance norm with its activation, against PyTorch's own formula and its autograd in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import normalization
from model.normalization import InstanceNormActivation, instance_norm_activation, norm_forward

EPS = 1e-5
CHANNELS_LAST = torch.channels_last_3d
# One channel, the benchmark's 32 and 320, not a power of two, more than a folded row, odd voxel counts.
SHAPES = [
    (1, 1, 4, 5, 6),
    (2, 3, 5, 7, 9),
    (1, 7, 11, 13, 1),
    (3, 20, 3, 1, 7),
    (2, 32, 8, 8, 8),
    (1, 320, 2, 3, 4),
    (1, 1500, 2, 1, 3),
]


def volume(shape: tuple[int, ...], seed: int = 0, mean: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (mean + torch.randn(shape, generator=generator)).to(dtype).contiguous(memory_format=CHANNELS_LAST)


def affine(channels: int) -> tuple[Tensor, Tensor]:
    """Weights and biases of both signs."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(channels, generator=generator) + 0.1, torch.randn(channels, generator=generator)


def run(x: Tensor, weight: Tensor, bias: Tensor, slope: float, grad: Tensor) -> list[Tensor]:
    """The output, and the gradients of x, weight and bias."""
    leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
    y = instance_norm_activation(leaves[0], leaves[1], leaves[2], eps=EPS, slope=slope)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def run_float64(x: Tensor, weight: Tensor, bias: Tensor, slope: float, grad: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().double().requires_grad_() for tensor in (x, weight, bias)]
    y = F.leaky_relu(F.instance_norm(leaves[0], weight=leaves[1], bias=leaves[2], eps=EPS), slope)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.double())]


def largest_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected value."""
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("slope", [0.0, 0.01])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients_are_the_formula_s(shape: tuple[int, ...], slope: float) -> None:
    arguments = (volume(shape), *affine(shape[1]), slope, volume(shape, seed=2))
    for name, found, expected in zip(
        ("y", "dx", "dweight", "dbias"), run(*arguments), run_float64(*arguments), strict=True
    ):
        assert found.dtype == torch.float32
        assert found.shape == expected.shape
        assert largest_error(found, expected) < 3e-6, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("slope", [0.0, 0.01])
def test_16_bit_input_is_rounded_at_the_end(dtype: torch.dtype, slope: float) -> None:
    """Where the activation is below zero, the gradient before it is rounded too: slope times half a digit."""
    shape = (2, 20, 5, 7, 9)
    arguments = (volume(shape, dtype=dtype), *affine(20), slope, volume(shape, seed=2, dtype=dtype))
    (y, dx, dweight, dbias), expected = run(*arguments), run_float64(*arguments)
    half_a_digit = torch.finfo(dtype).eps / 2
    below_zero = slope * half_a_digit
    for found, right, atol in ((y, expected[0], 1e-5), (dx, expected[1], 1e-5 + 6 * below_zero)):
        assert found.dtype == dtype
        assert ((found.double() - right).abs() <= 1.01 * half_a_digit * right.abs() + atol).all()
    assert dweight.dtype == dbias.dtype == torch.float32
    assert largest_error(dweight, expected[2]) < 3e-6 + below_zero
    assert largest_error(dbias, expected[3]) < 3e-6 + below_zero


def test_a_large_mean_costs_few_digits() -> None:
    """Mean 100, standard deviation 1: fp32 resolves such x to 4e-6; E[x^2] - E[x]^2 is off by 1e-3."""
    shape = (2, 6, 20, 21, 22)
    arguments = (volume(shape, mean=100), *affine(6), 0.01, volume(shape, seed=2))
    found, expected = run(*arguments), run_float64(*arguments)
    assert (found[0] - expected[0]).abs().max() < 2e-5
    assert largest_error(found[2], expected[2]) < 1e-4  # sum(g * x) - mean * sum(g)
    assert largest_error(found[3], expected[3]) < 1e-5
    # Where rounding may change the sign of the activation, the gradient differs.
    clear = expected[0].abs() > 1e-6
    assert clear.double().mean() > 0.999
    assert ((found[1] - expected[1]).abs()[clear]).max() < 1e-4


def test_statistics_of_a_large_window_hold_their_digits() -> None:
    """A million voxels per channel: a naive fp32 sum is wrong in the third digit."""
    x = 3 + volume((1, 2, 128, 128, 64))
    _, mean, inverse = norm_forward(x, *affine(2), eps=EPS, slope=0.0)
    values = x.double().flatten(2)
    torch.testing.assert_close(mean.double(), values.mean(2), rtol=1e-6, atol=0)
    torch.testing.assert_close(inverse.double(), (values.var(2, correction=0) + EPS).rsqrt(), rtol=1e-6, atol=0)


def test_samples_know_nothing_of_each_other() -> None:
    x = volume((3, 5, 4, 5, 6))
    norm = InstanceNormActivation(5, 0.01)
    together = norm(x)
    for sample in range(3):
        torch.testing.assert_close(norm(x[sample : sample + 1]), together[sample : sample + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stays_in_channels_last_whatever_comes_from_above(dtype: torch.dtype) -> None:
    shape = (2, 6, 4, 5, 3)
    x = volume(shape, dtype=dtype).requires_grad_()
    y = InstanceNormActivation(6)(x)
    assert normalization.is_channels_last(y)
    above = volume(shape, seed=2, dtype=dtype)
    gradients = []
    for grad in (above, above.contiguous(), above[:, :, :, :, :1].expand(shape)):
        (dx,) = torch.autograd.grad(y, x, grad, retain_graph=True)
        assert dx.is_contiguous(memory_format=CHANNELS_LAST)
        gradients.append(dx)
    assert torch.equal(gradients[0], gradients[1])


def test_unfused_is_the_same() -> None:
    x, grad = volume((2, 6, 4, 5, 3)), volume((2, 6, 4, 5, 3), seed=2)
    weight, bias = affine(6)
    results = []
    for fused in (True, False):
        norm = InstanceNormActivation(6, 0.01, fused)
        norm.load_state_dict({"weight": weight, "bias": bias})
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = norm(leaf)
        results.append([y.detach(), *torch.autograd.grad(y, [leaf, *norm.parameters()], grad)])
    for fused_one, other in zip(*results, strict=True):
        torch.testing.assert_close(fused_one, other, rtol=1e-5, atol=1e-5)


def test_other_layouts_take_pytorch_s_own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCDHW tensors, and tensors with one channel, which are in both orders."""

    def refuse(*_: object, **__: object) -> Tensor:
        raise AssertionError("the operator for channels-last")

    x = volume((2, 3, 4, 5, 6))
    expected = InstanceNormActivation(3)(x)
    monkeypatch.setattr(normalization, "instance_norm_activation", refuse)
    found = InstanceNormActivation(3)(x.contiguous())
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert InstanceNormActivation(1)(volume((2, 1, 4, 5, 6))).is_contiguous()
    InstanceNormActivation(3, fused=False)(x)
    with pytest.raises(AssertionError, match="for channels-last"):
        InstanceNormActivation(3)(x)


@pytest.mark.parametrize("memory_format", [CHANNELS_LAST, torch.contiguous_format])
def test_changes_nothing_in_place(memory_format: torch.memory_format) -> None:
    norm = InstanceNormActivation(4, 0.01)
    x, grad = (volume((2, 4, 3, 4, 5), seed).contiguous(memory_format=memory_format) for seed in (0, 2))
    inputs = [x.requires_grad_(), grad, *norm.parameters()]
    before = [tensor.detach().clone() for tensor in inputs]
    norm(x).backward(grad)
    for tensor, old in zip(inputs, before, strict=True):
        assert torch.equal(tensor, old)
        assert tensor._version == 0 or tensor is norm.weight or tensor is norm.bias  # reset_parameters fills those


@pytest.mark.parametrize("slope", [0.0, 0.01])
def test_a_constant_channel_gives_the_bias_s_activation(slope: float) -> None:
    x = volume((2, 3, 4, 5, 6))
    x[:, 1] = -7.5
    weight, bias = torch.tensor([1.0, 2.0, 1.0]), torch.tensor([0.5, -3.0, 0.5])
    y, *gradients = run(x, weight, bias, slope, volume((2, 3, 4, 5, 6), seed=2))
    torch.testing.assert_close(y[:, 1], torch.full((2, 4, 5, 6), -3.0 * slope), rtol=1e-4, atol=1e-6)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_autocast_changes_nothing() -> None:
    """Statistics stay in fp32 and the output keeps the input's type."""
    norm = InstanceNormActivation(6)
    for dtype in (torch.float32, torch.bfloat16):
        x = volume((1, 6, 4, 5, 3), dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            inside = norm(x)
        assert inside.dtype == dtype
        assert torch.equal(inside, norm(x))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_folded_rows_are_whole_voxels(shape: tuple[int, ...]) -> None:
    x = volume(shape)
    rows, repeats = normalization._fold(x, x)
    assert rows.shape == (shape[0], math.prod(shape[2:]) // repeats, repeats * shape[1])
    assert rows.shape[2] <= max(normalization.ROW, shape[1])
    assert torch.equal(normalization._unfold(rows, x), x)
