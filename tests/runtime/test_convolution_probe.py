"""Convolutions that are wrong or slow in 16 bit are found before the clock; right ones pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime import convolution_probe
from runtime.convolution_probe import Layer, check_convolutions, error_of, passes
from runtime.precision import Precision

CPU = torch.device("cpu")
# On a CPU only fp16 is computed right everywhere (see `compat.bf16_gradients_are_sound`).
HALF = Precision(CPU, torch.float16)
SMALL = (
    Layer(transposed=False, filters=4, kernel=3, stride=1, shape=(3, 4, 4, 6)),
    Layer(transposed=True, filters=2, kernel=2, stride=2, shape=(4, 2, 3, 2)),
)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution_probe, "PROBED", SMALL)


def set_times(monkeypatch: pytest.MonkeyPatch, channels_last: float) -> None:
    def times(layer: Layer, dtype: torch.dtype, device: torch.device, layout: str, **_: Any) -> tuple[float, float]:
        return (channels_last, channels_last) if layout == "NDHWC" else (1.0, 1.0)

    monkeypatch.setattr(convolution_probe, "times_of", times)


@pytest.mark.parametrize("layout", ["NCDHW", "NDHWC"])
def test_right_convolutions_pass(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_times(monkeypatch, 2.9)
    check = check_convolutions(HALF, layout)
    assert (check.what, check.verdict) == ("convolutions", "ok")
    assert "float16 agrees with fp32" in check.found
    assert ("2.9 times as long as NCDHW" in check.found) == (layout == "NDHWC")


@pytest.mark.parametrize(
    ("damage", "size"),
    [
        (lambda output: output * 1.01, "0.01"),
        (lambda output: output + torch.nan, "inf"),
        (lambda output: output.roll(1, 4), ""),
    ],
    ids=["scaled", "nan", "shifted"],
)
def test_wrong_convolutions_fail_with_the_versions(
    damage: Callable[[Tensor], Tensor], size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = Layer.__call__

    def damaged(self: Layer, x: Tensor, weight: Tensor) -> Tensor:
        output = compute(self, x, weight)
        return damage(output) if x.dtype == torch.float16 else output

    monkeypatch.setattr(Layer, "__call__", damaged)
    check = check_convolutions(HALF, "NDHWC")
    assert check.verdict == "fail"
    assert f"torch {torch.__version__} with cuDNN" in check.found
    assert f"float16 convolutions wrong: off by {size}" in check.found
    assert "without --amp" in check.remedy


def test_a_wrong_gradient_alone_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    backward = torch.autograd.grad

    def damaged(*args: Any, **options: Any) -> list[Tensor]:
        first, *others = backward(*args, **options)
        return [*others[:0], first * (1.1 if first.dtype == torch.float16 else 1.0), *others]

    monkeypatch.setattr(torch.autograd, "grad", damaged)
    assert check_convolutions(HALF, "NCDHW").verdict == "fail"


def test_slow_convolutions_are_a_warning_that_names_the_other_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    set_times(monkeypatch, 4.0)
    check = check_convolutions(HALF, "NDHWC")
    assert check.verdict == "warn"
    assert "channels-last takes 4 times as long as NCDHW" in check.found
    assert "--layout NCDHW" in check.remedy


@pytest.mark.parametrize("layer", SMALL, ids=str)
def test_passes_compute_pytorch_s_convolution(layer: Layer) -> None:
    forward, backward = passes(layer, torch.float32, CPU, "NDHWC", samples=2)
    (output,) = forward()
    scale = 2 if layer.transposed else 1
    assert output.shape == (2, layer.filters, *(scale * n for n in layer.shape[1:]))
    assert [tuple(gradient.shape) for gradient in backward()] == [(2, *layer.shape), layer.weight_shape()]
    assert error_of(layer, torch.float32, CPU, "NDHWC") < 1e-5


def test_the_image_needs_no_gradient() -> None:
    layer = Layer(transposed=False, filters=4, kernel=3, stride=1, shape=(1, 4, 4, 4), is_first=True)
    _, backward = passes(layer, torch.float32, CPU, "NCDHW")
    assert [tuple(gradient.shape) for gradient in backward()] == [(4, 1, 3, 3, 3)]


def test_the_probe_leaves_the_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    check_convolutions(HALF, "NDHWC")
    assert torch.equal(torch.get_rng_state(), before)
