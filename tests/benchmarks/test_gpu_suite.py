"""The GPU suite: a part that cannot run is skipped with its reason, one that fails ends no other, figures add up."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_checks, gpu_convolutions, gpu_speed
from benchmarks.gpu import PARTS, Part, unavailable
from benchmarks.harness import NOT_MEASURED, Options, Table
from common.errors import UserError
from model.unet3d import MLPERF_FILTERS, Unet3d
from runtime.warmup import training_flops

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def options_for(folder: Path, *parts: str, minutes: float = 60.0) -> Options:
    return Options(device=CPU, quick=True, work_dir=folder, parts=parts, deadline=time.monotonic() + 60 * minutes)


def run_parts(monkeypatch: pytest.MonkeyPatch, folder: Path, *parts: Part, **how: Any) -> list[Table]:
    monkeypatch.setattr(gpu, "PARTS", parts)
    return list(gpu.run(options_for(folder, **how)))


def done(options: Options) -> Table:
    return Table("Done", ["figure"], [[1]])


def fail(options: Options) -> Table:
    raise ValueError("no luck\nat all")


def test_a_part_that_fails_ends_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failed, after = run_parts(monkeypatch, tmp_path, Part("First", fail, needs_s=1), Part("Second", done, needs_s=1))
    assert failed.problem == "First: failed: ValueError: no luck at all"
    assert failed.rows == [["failed: ValueError: no luck at all"]]
    assert "Traceback" in capsys.readouterr().err
    assert (after.rows, after.problem) == ([[1]], "")
    assert after.notes[-1].startswith("Took ")


def test_after_a_lost_context_nothing_more_is_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def lose(options: Options) -> Table:
        raise torch.AcceleratorError("illegal memory access")

    _, after = run_parts(monkeypatch, tmp_path, Part("First", lose, needs_s=1), Part("Second", fail, needs_s=1))
    assert after.rows == [[f"{NOT_MEASURED}: the GPU's context was lost in 'First'"]]
    assert after.problem == ""


def test_a_part_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    part = Part("Part", done, needs_s=30, needs_gib=10, on_cpu="it is for CUDA")
    assert unavailable(part, CPU, 100.0) == "it is for CUDA"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (11 * 2**30, 80 * 2**30))
    assert unavailable(part, GPU, 30.0) == ""
    assert unavailable(part, GPU, 29.0) == "it takes about 30 s, and 29 s of --minutes are left"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (9 * 2**30, 80 * 2**30))
    assert unavailable(part, GPU, 30.0) == "it takes about 10 GiB of the GPU's memory, and 9 are free"


def test_only_the_chosen_parts_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "PARTS", (Part("First", fail, needs_s=1), Part("Second", done, needs_s=1)))
    (table,) = gpu.run(options_for(tmp_path, "Second"))
    assert table.rows == [[1]]
    with pytest.raises(UserError, match="--parts second: the parts are 'First', 'Second'"):
        next(gpu.run(options_for(tmp_path, "second")))


@pytest.mark.parametrize(
    "name", ["Six steps against the CPU", "Device loader", "Convolutions", "Samples per second", "A step by kernel"]
)
def test_a_part_runs_on_a_cpu(name: str, tmp_path: Path) -> None:
    (table,) = gpu.run(options_for(tmp_path, name))
    assert table.problem == ""
    assert table.rows
    assert all(len(row) == len(table.columns) for row in table.rows)


def test_what_needs_cuda_says_so(tmp_path: Path) -> None:
    names = [part.name for part in PARTS if part.on_cpu]
    tables = list(gpu.run(options_for(tmp_path, *names)))
    assert [table.rows[0][0] for table in tables] == [f"{NOT_MEASURED}: {part.on_cpu}" for part in PARTS if part.on_cpu]


def test_a_wrong_row_is_a_problem() -> None:
    rows: list[list[object]] = [["sum", 0.1, 0.2, "ok"], ["product", 0.3, 0.2, gpu_checks.verdict(0.3, 0.2)]]
    assert gpu_checks.checked("Operators", rows, []).problem == "Operators: wrong: product"
    assert gpu_checks.checked("Operators", rows[:1], []).problem == ""


def test_a_trace_that_differs_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    losses = iter([torch.tensor(1.0), torch.tensor(1.001)] * gpu_checks.TRACE_STEPS)
    monkeypatch.setattr(gpu_checks, "make_step", lambda *_: lambda: next(losses))
    assert gpu_checks.trace(options_for(tmp_path)).problem.startswith("Six steps against the CPU: wrong: step 1: 1.0")


def test_a_forbidden_wait_is_reported_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "syncs_forbidden", nullcontext)
    calls: list[int] = []

    def wait_at_the_third() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("called a synchronizing CUDA operation\nfile.cpp:1")

    assert gpu_checks.forbidden(wait_at_the_third, CPU) == ["called a synchronizing CUDA operation"]
    assert gpu_checks.forbidden(lambda: None, CPU) == ["ok"]


def test_the_layers_are_the_network_s_and_their_operations_add_up() -> None:
    filters = (4, 8, 16)
    found = gpu_convolutions.layers(filters, (16, 16, 16))
    assert [str(layer) for layer in found[:2]] == ["3^3 1 to 4, stride 1, at 16^3", "3^3 4 to 4, stride 1, at 16^3"]
    assert [layer.is_first for layer in found] == [True] + [False] * (len(found) - 1)
    assert str(found[-1]) == "1^3 4 to 3, stride 1, at 16^3"
    # Equal layers are listed once: the second convolutions of the decoder's blocks are those of the encoder's.
    twice = {str(layer) for layer in found} & {"3^3 4 to 4, stride 1, at 16^3", "3^3 8 to 8, stride 1, at 8^3"}
    assert len(twice) == 2
    forward = sum(gpu_convolutions.flops(layer) * (1 + (str(layer) in twice)) for layer in found)
    image = gpu_convolutions.flops(found[0])
    # Backward takes twice the operations, but for the image's gradient.
    counted = training_flops(lambda: Unet3d(1, 3, filters=filters), (1, 16, 16, 16))
    assert 3 * forward - image == pytest.approx(counted)


def test_half_of_the_operations_are_at_full_resolution() -> None:
    found = gpu_convolutions.layers(MLPERF_FILTERS, (128, 128, 128))
    flops = {str(layer): gpu_convolutions.flops(layer) for layer in found}
    at_full = 2 * flops["3^3 32 to 32, stride 1, at 128^3"] + flops["3^3 64 to 32, stride 1, at 128^3"]
    assert at_full / 0.955e12 == pytest.approx(0.49, abs=0.01)


def test_kernels_are_listed_by_time_and_by_kind() -> None:
    steps = gpu_speed.PROFILED_STEPS
    times = {"sm90_xmma_fprop": (6e3 * steps, steps), "_moments": (3e3 * steps, 2 * steps), "odd": (1e3 * steps, steps)}
    _, rows = gpu_speed.kernel_rows(times)
    assert rows[:3] == [
        ["sm90_xmma_fprop", 6.0, 1.0, 0.6],
        ["_moments", 3.0, 2.0, 0.3],
        ["odd", 1.0, 1.0, 0.1],
    ]
    assert gpu_speed.kind_of("_narrow_weight_gradient") == "convolution"
    assert [row[0] for row in rows[3:]] == ["all: convolution", "all: norm and activation", "all: other"]
