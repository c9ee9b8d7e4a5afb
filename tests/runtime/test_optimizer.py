"""Learning rates and optimizers against independent implementations of their formulas."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Parameter

from runtime.lr_schedule import learning_rate
from runtime.optimizer import Lamb, make_optimizer

Arrays = list[NDArray[np.float64]]


def test_a_constant_rate() -> None:
    assert {learning_rate(epoch, base=0.8) for epoch in (1, 2, 1000)} == {0.8}


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [(1, 0.2 + 1.8 / 5), (2, 0.2 + 1.8 * 2 / 5), (4, 0.2 + 1.8 * 4 / 5), (5, 2.0), (6, 2.0), (100, 2.0)],
)
def test_warm_up_is_linear_including_its_last_epoch(epoch: int, rate: float) -> None:
    assert learning_rate(epoch, base=2.0, initial=0.2, warmup_epochs=5) == pytest.approx(rate, rel=1e-12)


def test_warm_up_of_one_epoch_starts_at_the_base_rate() -> None:
    assert learning_rate(1, base=2.0, initial=0.2, warmup_epochs=1) == pytest.approx(2.0)


def test_warm_up_may_decrease() -> None:
    assert learning_rate(1, base=1.0, initial=3.0, warmup_epochs=2) == pytest.approx(2.0)


@pytest.mark.parametrize(("epoch", "rate"), [(1, 1.0), (3, 1.0), (4, 0.1), (6, 0.1), (7, 0.01), (50, 0.01)])
def test_decay_begins_after_its_epoch_has_ended(epoch: int, rate: float) -> None:
    assert learning_rate(epoch, base=1.0, decay_epochs=(3, 6), decay_factor=0.1) == pytest.approx(rate, rel=1e-12)


def test_a_decay_within_the_warm_up_applies_after_it() -> None:
    rates = [
        learning_rate(e, base=1.0, initial=0.0, warmup_epochs=4, decay_epochs=(2,), decay_factor=0.5)
        for e in range(1, 7)
    ]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.5, 0.5])


def test_a_decay_at_the_last_warm_up_epoch_applies_after_it() -> None:
    rates = [
        learning_rate(e, base=1.0, initial=0.0, warmup_epochs=2, decay_epochs=(2, 3), decay_factor=0.5)
        for e in range(1, 6)
    ]
    assert rates == pytest.approx([0.5, 1.0, 0.5, 0.25, 0.25])


@settings(max_examples=50, deadline=None)
@given(
    base=st.floats(1e-3, 10),
    factor=st.floats(0, 1),
    decays=st.lists(st.integers(1, 12), unique=True, max_size=4).map(sorted),
)
def test_decay_is_torchs_multi_step_stepped_at_each_epochs_end(base: float, factor: float, decays: list[int]) -> None:
    optimizer = torch.optim.SGD([Parameter(torch.zeros(1))], lr=base)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=decays, gamma=factor)
    for epoch in range(1, 15):
        used = optimizer.param_groups[0]["lr"]
        assert learning_rate(epoch, base=base, decay_epochs=decays, decay_factor=factor) == pytest.approx(
            used, rel=1e-9
        )
        optimizer.step()
        scheduler.step()


def quadratic_steps(optimizer: torch.optim.Optimizer, weights: list[Parameter], steps: int, scale: float) -> None:
    """Takes optimizer steps with gradients that depend on the weights and the step."""
    for step in range(steps):
        for index, weight in enumerate(weights):
            weight.grad = scale * gradient_of(weight.detach(), index, step)
        optimizer.step()


def gradient_of(weight: Tensor, index: int, step: int) -> Tensor:
    return weight * (0.5 + index) + torch.cos(torch.arange(weight.numel()) + step + index).view(weight.shape).to(weight)


def make_weights() -> list[Parameter]:
    generator = torch.Generator().manual_seed(4)
    return [Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (5,), (2, 1, 3))]


def numpy_gradients(weights: Arrays, step: int, scale: float) -> Arrays:
    return [scale * gradient_of(torch.from_numpy(w), index, step).numpy() for index, w in enumerate(weights)]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_sgd_uses_nesterov_momentum(momentum: float, weight_decay: float) -> None:
    """v = mu v + g; w -= lr (g + mu v), where g includes the L2 penalty; plain SGD without momentum."""
    weights = make_weights()
    optimizer = make_optimizer("sgd", weights, 0.05, momentum=momentum, weight_decay=weight_decay)
    ours: Arrays = [w.detach().double().numpy().copy() for w in weights]
    velocity = [np.zeros_like(w) for w in ours]
    for step in range(4):
        gradients = numpy_gradients(ours, step, 1.0)
        for index, gradient in enumerate(gradients):
            g = gradient + weight_decay * ours[index]
            velocity[index] = momentum * velocity[index] + g
            ours[index] = ours[index] - 0.05 * (g + momentum * velocity[index])
    quadratic_steps(optimizer, weights, 4, 1.0)
    for weight, expected in zip(weights, ours, strict=True):
        np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_adam_is_torchs_with_the_given_settings() -> None:
    weights, others = make_weights(), make_weights()
    optimizer = make_optimizer("adam", weights, 0.05, betas=(0.8, 0.99), weight_decay=0.1)
    reference = torch.optim.Adam(others, lr=0.05, betas=(0.8, 0.99), weight_decay=0.1)
    assert type(optimizer) is torch.optim.Adam
    for each, params in ((optimizer, weights), (reference, others)):
        quadratic_steps(each, params, 3, 1.0)
    for ours, theirs in zip(weights, others, strict=True):  # the fused kernel rounds differently
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_optimizers_are_fused_where_torch_supports_it(name: str) -> None:
    assert make_optimizer(name, make_weights(), 0.1).defaults["fused"] is True
    meta = [torch.nn.Parameter(w.to("meta")) for w in make_weights()]
    assert not make_optimizer(name, meta, 0.1).defaults["fused"]


def lamb_by_formula(
    weights: Arrays, steps: int, scale: float, rate: float, betas: tuple[float, float], decay: float
) -> tuple[Arrays, list[float]]:
    """You et al. 2020, algorithm 2, with FusedLAMB's clipping, epsilon and skipped ratio.

    Returns:
        The weights after the steps, and the gradient norm of each step.
    """
    first, second = ([np.zeros_like(w) for w in weights] for _ in range(2))
    norms = []
    for step in range(1, steps + 1):
        gradients = numpy_gradients(weights, step - 1, scale)
        norm = float(np.sqrt(sum((g**2).sum() for g in gradients)))
        norms.append(norm)
        following = []
        for index, (w, gradient) in enumerate(zip(weights, gradients, strict=True)):
            g = gradient / max(1.0, norm)
            first[index] = betas[0] * first[index] + (1 - betas[0]) * g
            second[index] = betas[1] * second[index] + (1 - betas[1]) * g**2
            m = first[index] / (1 - betas[0] ** step)
            v = second[index] / (1 - betas[1] ** step)
            u = m / (np.sqrt(v) + 1e-6) + decay * w
            ratio = np.linalg.norm(w) / np.linalg.norm(u) if decay else 1.0
            following.append(w - rate * ratio * u)
        weights = following
    return weights, norms


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(("scale", "clips"), [(0.01, False), (10.0, True)])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.7)])
def test_lamb_against_the_formula(decay: float, scale: float, clips: bool, betas: tuple[float, float]) -> None:
    weights = make_weights()
    start: Arrays = [w.detach().double().numpy().copy() for w in weights]
    expected, norms = lamb_by_formula(start, 6, scale, 0.02, betas, decay)
    assert all((norm > 1) is clips for norm in norms)
    quadratic_steps(Lamb(weights, lr=0.02, betas=betas, weight_decay=decay), weights, 6, scale)
    for weight, wanted in zip(weights, expected, strict=True):
        np.testing.assert_allclose(weight.detach().numpy(), wanted, rtol=2e-4, atol=2e-5)


def test_lamb_clips_by_the_norm_over_all_groups_and_uses_each_groups_settings() -> None:
    """One step of two groups: m / sqrt(v) = sign(g) after any clipping, which is visible only through epsilon, 1e-6."""
    a, b = Parameter(torch.tensor([1.0])), Parameter(torch.tensor([1.0]))
    optimizer = Lamb([{"params": [a], "lr": 0.5}, {"params": [b]}], lr=0.1, weight_decay=0.0)
    a.grad, b.grad = torch.tensor([4e-6]), torch.tensor([3e6])
    optimizer.step()
    clipped = 4e-6 / 3e6
    assert a.item() == pytest.approx(1 - 0.5 * clipped / (clipped + 1e-6), abs=1e-7)
    assert b.item() == pytest.approx(1 - 0.1, abs=1e-6)


@pytest.mark.parametrize("start", [0.0, 2.0])
def test_lamb_uses_a_ratio_of_1_for_zero_weights(start: float) -> None:
    weight = Parameter(torch.full((4,), start))
    weight.grad = torch.full((4,), 0.25)
    Lamb([weight], lr=0.1, weight_decay=0.5).step()
    update = 1 + 0.5 * start
    ratio = start / update if start else 1.0
    assert weight.tolist() == pytest.approx([start - 0.1 * ratio * update] * 4, rel=1e-4)


def test_lamb_leaves_parameters_without_a_gradient_alone() -> None:
    moved, still = Parameter(torch.ones(2)), Parameter(torch.ones(2))
    optimizer = Lamb([moved, still], lr=0.1)
    optimizer.step()
    assert torch.equal(moved, torch.ones(2)), "weights without gradients must not change"
    moved.grad = torch.ones(2)
    optimizer.step()
    assert not torch.equal(moved, torch.ones(2))
    assert torch.equal(still, torch.ones(2))
    assert still not in optimizer.state


def test_lamb_returns_the_closures_loss() -> None:
    weight = Parameter(torch.ones(2))
    optimizer = Lamb([weight], lr=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = (3 * weight).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 6.0
    assert (weight < 1).all()


def test_lamb_continues_from_its_state_dict() -> None:
    weights, others = make_weights(), make_weights()
    straight = Lamb(weights, lr=0.02)
    quadratic_steps(straight, weights, 4, 1.0)
    first = Lamb(others, lr=0.02)
    quadratic_steps(first, others, 2, 1.0)
    second = Lamb(others, lr=0.02)
    second.load_state_dict(first.state_dict())
    for step in (2, 3):
        for index, weight in enumerate(others):
            weight.grad = gradient_of(weight.detach(), index, step)
        second.step()
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


def other_apex(monkeypatch: pytest.MonkeyPatch, **contents: object) -> None:
    """Makes an `apex` importable, such as the unrelated package on PyPI, with `contents` in `apex.optimizers`."""
    apex, optimizers = types.ModuleType("apex"), types.ModuleType("apex.optimizers")
    for name, value in contents.items():
        setattr(optimizers, name, value)
    monkeypatch.setattr(apex, "optimizers", optimizers, raising=False)
    monkeypatch.setitem(sys.modules, "apex", apex)
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)


class FakeFused(Lamb):
    """Stand-in for apex's FusedLAMB."""


@pytest.fixture
def cuda_looking() -> list[Parameter]:
    class OnGpu(Parameter):
        is_cuda = property(lambda self: True)  # type: ignore[assignment]

    return [OnGpu(torch.ones(2))]


def test_an_unrelated_apex_is_not_used(monkeypatch: pytest.MonkeyPatch, cuda_looking: list[Parameter]) -> None:
    other_apex(monkeypatch)
    assert type(make_optimizer("lamb", cuda_looking, 0.1)) is Lamb


def test_an_apex_that_fails_to_import_is_not_used(
    monkeypatch: pytest.MonkeyPatch, cuda_looking: list[Parameter]
) -> None:
    class Breaks(types.ModuleType):
        def __getattr__(self, name: str) -> object:
            raise OSError("libcudart.so.11: cannot open shared object file")

    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", Breaks("apex.optimizers"))
    assert type(make_optimizer("lamb", cuda_looking, 0.1)) is Lamb


def test_without_apex(monkeypatch: pytest.MonkeyPatch, cuda_looking: list[Parameter]) -> None:
    monkeypatch.setitem(sys.modules, "apex", None)
    assert type(make_optimizer("lamb", cuda_looking, 0.1)) is Lamb


def test_nvidias_apex_is_used_on_a_gpu_and_only_there(
    monkeypatch: pytest.MonkeyPatch, cuda_looking: list[Parameter]
) -> None:
    other_apex(monkeypatch, FusedLAMB=FakeFused)
    fused = make_optimizer("lamb", cuda_looking, 0.3, betas=(0.8, 0.9), weight_decay=0.2)
    assert type(fused) is FakeFused
    group = fused.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.3, (0.8, 0.9), 0.2)
    assert type(make_optimizer("lamb", make_weights(), 0.3)) is Lamb


@pytest.mark.parametrize("name", ["sgd", "adam", "lamb"])
def test_settings_reach_the_optimizer(name: str) -> None:
    group = make_optimizer(
        name, iter(make_weights()), 0.3, momentum=0.7, betas=(0.6, 0.8), weight_decay=0.01
    ).param_groups[0]
    assert (group["lr"], group["weight_decay"], len(group["params"])) == (0.3, 0.01, 3)
    if name == "sgd":
        assert (group["momentum"], group["nesterov"], group["dampening"]) == (0.7, True, 0)
    else:
        assert group["betas"] == (0.6, 0.8)


def test_lamb_never_makes_the_host_wait(forbid_reading: Callable[[], list[str]]) -> None:
    weights = make_weights()
    optimizer = make_optimizer("lamb", weights, 0.1, weight_decay=0.1)
    reads = forbid_reading()
    quadratic_steps(optimizer, weights, 2, 10.0)
    assert reads == []
