"""The step suite: the naive loss equals the project's, each optimization is switched off, and tables are complete."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import step
from benchmarks.harness import NOT_MEASURED, Options, Table
from benchmarks.step import CHOICES, NaiveDiceCE, Scale, StepVariant, largest_fitting_batch, make_step
from common.errors import UserError
from model.kernels import dispatch as kernels
from model.losses import DiceCELoss
from runtime.precision import choose_precision

CPU = torch.device("cpu")
SMALL = Scale((4, 8), (8, 8, 8), 2, 1)


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Table]:
    """Tables of the quick suite by title."""
    options = Options(device=CPU, quick=True, work_dir=tmp_path_factory.mktemp("step"))
    return {table.title: table for table in step.run(options)}


@pytest.mark.parametrize("absent", [None, 2])
def test_the_naive_loss_is_the_projects_loss_and_gradient(absent: int | None) -> None:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(3, (2, 1, 5, 6, 7), generator=generator, dtype=torch.uint8)
    labels[labels == absent] = 0
    results = []
    for loss in (NaiveDiceCE(), DiceCELoss()):
        logits = torch.randn(2, 3, 5, 6, 7, generator=torch.Generator().manual_seed(4)).mul(3).requires_grad_()
        value = loss(logits, labels)
        value.backward()
        results.append((value.item(), logits.grad))
    (naive, naive_gradient), (ours, our_gradient) = results
    assert naive == pytest.approx(ours, abs=1e-6)
    torch.testing.assert_close(naive_gradient, our_gradient, atol=1e-7, rtol=1e-4)


def test_one_row_per_choice_with_values_or_a_reason(tables: dict[str, Table]) -> None:
    table = tables["A training step"]
    assert [row[0] for row in table.rows] == [choice.name for choice in CHOICES]
    triton = {choice.name for choice in CHOICES if "plain" in choice.off}
    missing = triton | {"torch.compile (--compile)"} | ({"AMP"} if choose_precision(True, "auto", CPU).note else set())
    for row in table.rows:
        assert len(row) == len(table.columns)
        if row[0] in missing:
            assert row[3].startswith(f"{NOT_MEASURED}: ")
            assert len(row[3]) > len(NOT_MEASURED) + 10
        else:
            assert all(math.isfinite(figure) and figure > 0 for figure in row[2:])


def test_the_peak_performance_values_are_consistent(tables: dict[str, Table]) -> None:
    figures = {row[0]: row[1] for row in tables["Share of the peak"].rows}
    assert all(math.isfinite(figure) and figure > 0 for figure in figures.values())
    assert figures["samples/s"] * figures["ms per step"] / 1e3 == pytest.approx(2)  # the quick suite's batch
    assert figures["TFLOP/s"] / figures["GEMM peak, TFLOP/s"] == pytest.approx(figures["share of the GEMM peak"])
    assert all(mark == "" for *_, mark in tables["Share of the peak"].rows)  # marks are for GPUs


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: choice.name)
def test_a_step_without_a_choice_has_the_same_loss(choice: step.Choice) -> None:
    full, without = (make_step(StepVariant(**off), CPU, SMALL, 2) for off in ({}, choice.off))
    for _ in range(2):  # the second depends on the first update
        assert without().item() == pytest.approx(full().item(), abs=2e-3 if "amp" in choice.off else 1e-4)


def test_each_choice_switches_off_what_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def spy(state: Any, batch: Any, settings: Any, *, communicate: bool) -> torch.Tensor:
        seen.append(
            {
                "layout": settings.layout,
                "fused_norm": any(getattr(module, "fused", False) for module in state.network.modules()),
                "one_pass_loss": not isinstance(settings.loss, NaiveDiceCE),
                "fused_optimizer": bool(state.optimizer.defaults["fused"]),
                "plain": tuple(sorted(kernels._plain)),
            }
        )
        return torch.zeros(())

    monkeypatch.setattr(step, "forward_backward", spy)
    monkeypatch.setattr(step, "optimizer_step", lambda state: None)
    full = {"layout": "NDHWC", "fused_norm": True, "one_pass_loss": True, "fused_optimizer": True, "plain": ()}
    for choice in CHOICES:
        make_step(StepVariant(**choice.off), CPU, SMALL, 1)()
        off = {name: value for name, value in choice.off.items() if name in full}
        assert seen.pop() == full | off | {"plain": tuple(sorted(off.get("plain", ())))}


def test_the_operators_are_restored_after_a_failed_step() -> None:
    def fail() -> None:
        with kernels.plain(["norm"]):
            raise ValueError(f"plain: {set(kernels._plain)}")

    with pytest.raises(ValueError, match=r"plain: \{'norm'\}"):
        fail()
    assert kernels._plain == frozenset()


def test_the_batch_is_halved_until_it_fits() -> None:
    tried = []

    def work(batch_size: int) -> str:
        tried.append(batch_size)
        if batch_size > 7:
            raise torch.cuda.OutOfMemoryError
        return "done"

    assert largest_fitting_batch(28, work) == (7, "done")
    assert tried == [28, 14, 7]


def test_a_gpu_too_small_for_one_sample_is_a_user_error() -> None:
    def work(batch_size: int) -> None:
        raise torch.cuda.OutOfMemoryError

    with pytest.raises(UserError, match="no step of one sample"):
        largest_fitting_batch(2, work)


def test_the_quick_suite_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "gains", lambda device, scale: Table("", [], []))
    step.run(Options(device=CPU, quick=True, work_dir=tmp_path))
    assert list(tmp_path.iterdir()) == []
