"""What a run does on a GPU beside its steps: evaluation, checkpoints, memory, timing, and what it reports."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.compat import tree_leaves
from data_loading.device_loader import memory_budget
from model.kernels import dispatch
from runtime.checkpoint import format as checkpoints
from runtime.checkpoint.resume import restore
from runtime.distributed.step_sync import StepSync
from runtime.distributed.world import World
from runtime.environment import describe_environment, platform_name
from runtime.evaluation import CaseAssignment, Evaluator
from runtime.logging import events as ev
from runtime.logging.throughput import ThroughputTracker, peak_memory_bytes
from runtime.memory_checks import free_bytes
from runtime.precision import Precision
from runtime.scores import keep_if_best
from runtime.train_state import TrainState
from runtime.training import StepConfig
from runtime.warmup import seconds
from tests.fake_gpu import CPU, GPU, FakeGpu, GpuTensor
from tests.runtime.conftest import Batches
from tests.runtime.loop import run_epoch
from tests.runtime.scoring import CASES, SCORING, EvaluationCase, Thresholds, dummy_case, make_scorer
from tests.runtime.test_cuda_step import make_step, weights

ROOT = Path(__file__).resolve().parents[2]


def no_event(event: ev.Event) -> None: ...


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_an_evaluation_has_the_scores_of_a_cpu_and_transfers_one_table(dtype: torch.dtype | None, gpu: FakeGpu) -> None:
    results = []
    for device in (CPU, GPU):
        world = World(0, 1, device)
        loaded = {case: dummy_case(case) for case in CASES}
        loaded = {
            name: EvaluationCase(name, case.image.to(device), case.label.to(device)) for name, case in loaded.items()
        }
        windows = [SCORING.windows(case.image.shape[2:]) for case in loaded.values()]
        scorer = make_scorer(Thresholds(), Precision(device, dtype))
        assignment = CaseAssignment.make(CASES, windows, world)
        evaluate = Evaluator(
            scorer=scorer, assignment=assignment, load_case=loaded.__getitem__, world=world, emit=no_event
        )
        evaluate(1)  # makes the window's weights, once for a run
        gpu.waits.clear()
        results.append(replace(evaluate(2), seconds=0.0))
    assert gpu.waits == ["copy to the host in __call__"]
    assert results[0] == results[1]
    assert 0.4 < results[1].mean_dice < 1


def test_a_checkpoint_is_on_the_host_and_continues_on_a_gpu(gpu: FakeGpu, tmp_path: Path) -> None:
    def epoch(state: TrainState, config: StepConfig, number: int) -> None:
        world = World(0, 1, GPU)
        loader = Batches(4, 2, (8, 8, 8))
        run_epoch(state, loader, epoch=number, step=config, world=world, step_sync=StepSync(world))

    for optimizer, dtype in (("sgd", torch.float16), ("adam", None), ("lamb", None)):
        state, config = make_step(GPU, optimizer, dtype=dtype)
        epoch(state, config, 1)
        keep_if_best(state, ev.EvaluationStopped(epoch=1, mean_dice=0.5, dice=[0.5], loss=0.5, seconds=0.0))
        content = checkpoints.snapshot(state, [0.0], config={}, seed=1, data="")
        tensors = [value for value in tree_leaves(content) if isinstance(value, torch.Tensor)]
        assert len(tensors) > 40
        assert not any(isinstance(tensor, GpuTensor) for tensor in tensors)
        checkpoints.write_archive(content, tmp_path / f"{optimizer}.pth")

        resumed, _ = make_step(GPU, optimizer, dtype=dtype)
        restore(resumed, checkpoints.load(tmp_path / f"{optimizer}.pth"))
        moments = [value for value in tree_leaves(resumed.optimizer.state_dict()) if isinstance(value, torch.Tensor)]
        assert moments
        assert all(isinstance(tensor, GpuTensor) for tensor in moments)
        for one in (state, resumed):
            epoch(one, config, 2)
        for ours, theirs in zip(weights(resumed.network), weights(state.network), strict=True):
            assert torch.equal(ours, theirs)


# Memory


@pytest.fixture
def memory(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes that the driver and torch report; every call must name the GPU."""
    figures = {"free": 800, "reserved": 150, "allocated": 50, "peak": 120}

    def report(name: str, value: Callable[[], object]) -> None:
        def answer(device: torch.device) -> object:
            assert device == GPU
            return value()

        monkeypatch.setattr(torch.cuda, name, answer)

    report("mem_get_info", lambda: (figures["free"], 1000))
    report("memory_reserved", lambda: figures["reserved"])
    report("memory_allocated", lambda: figures["allocated"])
    report("max_memory_allocated", lambda: figures["peak"])
    return figures


def test_memory_that_torch_has_reserved_and_does_not_use_is_free(memory: dict[str, int]) -> None:
    assert free_bytes(GPU) == 900
    assert peak_memory_bytes(GPU) == 120


def test_volumes_get_no_memory_that_activations_had(memory: dict[str, int]) -> None:
    assert memory_budget(GPU, 0.25) == 200


# Time


def test_timing_does_not_wait_before_the_end_of_the_run(
    gpu: FakeGpu, memory: dict[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`FakeEvent` counts events as ms: each of an iteration's three phases takes one."""
    tracker = ThroughputTracker(GPU, 1, 1, tmp_path)
    tracker.on(ev.EpochStarted(1, 0.1, 3))
    for index in range(3):
        tracker.on(ev.PhaseEnd("data"))
        tracker.on(ev.PhaseEnd("forward and backward"))
        tracker.on(ev.MicroBatchEnd(1, index, 2))
    assert gpu.waits == []
    tracker.on(ev.RunStopped(status="aborted", reason="", epoch=1, seconds=60.0))
    assert gpu.waits == ["synchronize in _milliseconds"]
    figures = json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8"))
    assert (figures["latency_mean_ms"], figures["samples_per_s"]) == (3.0, pytest.approx(2 / 3e-3))
    assert figures["peak_memory_gib"] == 120 / 2**30


def test_a_duration_includes_what_the_device_computes(gpu: FakeGpu) -> None:
    assert seconds(lambda: gpu.waits.append("work"), GPU) >= 0
    assert gpu.waits == ["synchronize in synchronize", "work", "synchronize in synchronize"]


# The rest


def test_the_environment_names_the_gpu(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Accelerator {device.index}")
    assert describe_environment(GPU, 8)["device"] == "Accelerator 0"
    assert platform_name(GPU, 8) == "8xAccelerator 0"


def test_kernels_are_for_tensors_on_a_gpu_and_what_they_lack_is_noted(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def launch(kernels: object) -> None:
        tried.append("launched")
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(dispatch, "_loaded", None)
    monkeypatch.setattr(dispatch, "_launch", launch)
    assert dispatch.triton_for(torch.zeros(1), "norm") is None
    assert (tried, dispatch.note(CPU)) == ([], "")
    assert dispatch.triton_for(torch.zeros(1, device=GPU), "norm") is None
    assert "PyTorch's own operators are slower" in dispatch.note(GPU)
    assert len(tried) <= 1, "decided once"


def test_importing_a_module_touches_no_gpu() -> None:
    """Loader workers are forked, and `--help` must be quick: only functions may name `torch.cuda`."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        if path.relative_to(ROOT).parts[0].startswith(("tests", ".", "build")):  # tests, environments, copies
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inside = {
            id(node)
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef | ast.Lambda)
            for statement in (function.body if isinstance(function, ast.FunctionDef) else [function.body])
            for node in ast.walk(statement)
        }
        names = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "cuda"]
        found += [f"{path}:{node.lineno}" for node in names if id(node) not in inside]
    assert found == []
