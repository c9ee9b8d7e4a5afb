"""The Triton kernels: their numbers in Triton's interpreter and, if available, on a GPU; compiled for Hopper."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import model.kernels
from model.kernels import allocations
from model.kernels import dispatch as kernels
from runtime.arguments import RunConfig

ROOT = Path(__file__).resolve().parents[3]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="no triton: it is made for Linux on x86_64, see requirements-dev"
)


def run_cases(name: str, cache: Path, interpret: bool, architecture: int = 90) -> None:
    """Runs a file of cases in its own process: whether Triton interprets or compiles is fixed when it is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/model/kernels/{name}.py"],
        cwd=ROOT,
        env={
            **os.environ,
            "TRITON_INTERPRET": str(int(interpret)),
            "TRITON_CACHE_DIR": str(cache),
            "ARCHITECTURE": str(architecture),
        },
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout or architecture != 90


@needs_triton
def test_numbers_by_the_interpreter(tmp_path: Path) -> None:
    run_cases("triton_numbers", tmp_path, interpret=True)


@needs_triton
@pytest.mark.parametrize(
    "architecture",
    [pytest.param(80, marks=pytest.mark.slow), 90, pytest.param(100, marks=pytest.mark.slow)],
    ids=["ampere", "hopper", "blackwell"],
)
def test_every_kernel_compiles_within_its_registers(tmp_path: Path, architecture: int) -> None:
    run_cases("triton_compilation", tmp_path, interpret=False, architecture=architecture)


@needs_triton
def test_what_the_operators_allocate(tmp_path: Path) -> None:
    run_cases("triton_allocations", tmp_path, interpret=False)


if torch.cuda.is_available():

    @needs_triton
    def test_numbers_on_the_gpu(tmp_path: Path) -> None:
        run_cases("triton_numbers", tmp_path, interpret=False)


@pytest.fixture
def _fresh_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_loaded", None)


@pytest.mark.usefixtures("_fresh_choice")
def test_only_cuda_tensors_get_kernels_and_only_with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cuda, stand_in = SimpleNamespace(is_cuda=True), SimpleNamespace()
    monkeypatch.setattr(kernels, "_launch", lambda module: None)
    monkeypatch.setattr(model.kernels, "triton", stand_in, raising=False)  # as an earlier import leaves it
    monkeypatch.setitem(sys.modules, "model.kernels.triton", stand_in)
    assert kernels.triton_for(on_cuda, "norm") is stand_in
    assert kernels.note(torch.device("cuda")) == kernels.note(torch.device("cpu")) == ""
    assert kernels.triton_for(torch.zeros(1), "norm") is None
    with kernels.plain(["norm"]):
        assert kernels.triton_for(on_cuda, "norm") is None
        assert kernels.triton_for(on_cuda, "loss") is stand_in
    assert kernels.triton_for(on_cuda, "norm") is stand_in


def test_the_flag_names_every_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    (choices,) = [f.metadata["flag"].choices for f in fields(RunConfig) if f.name == "plain_operators"]
    assert choices == (*kernels.OPERATORS, "all")
    monkeypatch.setattr(kernels, "_plain", frozenset())
    kernels.use_plain(["all"])
    assert kernels._plain == frozenset(kernels.OPERATORS)
    kernels.use_plain(["join"])
    assert kernels._plain == {"join"}


@pytest.mark.usefixtures("_fresh_choice")
@pytest.mark.parametrize(("major", "is_used"), [(8, False), (9, True), (10, False)])
def test_a_kernel_is_used_only_where_it_was_measured_to_be_faster(
    major: int, is_used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = SimpleNamespace()
    monkeypatch.setattr(kernels, "_launch", lambda module: None)
    monkeypatch.setattr(model.kernels, "triton", stand_in, raising=False)  # as an earlier import leaves it
    monkeypatch.setitem(sys.modules, "model.kernels.triton", stand_in)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    x = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    assert (kernels.triton_for(x, "narrow") is stand_in) == is_used
    assert kernels.triton_for(x, "norm") is stand_in


@pytest.mark.usefixtures("_fresh_choice")
def test_without_triton_pytorch_s_own_operators_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(model.kernels, "triton", raising=False)
    monkeypatch.setitem(sys.modules, "model.kernels.triton", None)
    assert kernels.triton_for(SimpleNamespace(is_cuda=True), "norm") is None
    assert "PyTorch's own operators" in kernels.note(torch.device("cuda"))


@pytest.mark.usefixtures("_fresh_choice")
def test_kernels_that_cannot_be_launched_are_not_used_and_the_reason_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(module: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify one")

    monkeypatch.setattr(model.kernels, "triton", SimpleNamespace(), raising=False)
    monkeypatch.setitem(sys.modules, "model.kernels.triton", SimpleNamespace())
    monkeypatch.setattr(kernels, "_launch", fail)
    assert kernels.triton_for(SimpleNamespace(is_cuda=True), "norm") is None
    assert "(Failed to find C compiler.)" in kernels.note(torch.device("cuda"))
    assert kernels.note(torch.device("cpu")) == ""


def test_allocations_stand_in_for_the_kernels_only_when_asked() -> None:
    x = torch.zeros(1)
    with kernels.allocating_only(as_triton=True):
        assert kernels.triton_for(x, "norm") is allocations
        with kernels.allocating_only(as_triton=False):
            assert kernels.triton_for(x, "norm") is None
        assert kernels.triton_for(x, "norm") is allocations
    assert kernels.triton_for(x, "norm") is None
    assert not kernels.uses_triton(torch.device("cpu"))
