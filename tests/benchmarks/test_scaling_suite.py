"""The performance model against published runs and its own logic; measured rows from real processes."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import paper, scaling
from benchmarks.harness import NOT_MEASURED, Options, Table
from benchmarks.paper import H200, Layout, Links, best, forecast, launch, layouts, samples_to_converge
from common.errors import UserError
from model.unet3d import Unet3d
from runtime.arguments import parse_arguments

CPU = torch.device("cpu")
SLOWER = dataclasses.replace(H200, samples_per_s=H200.samples_per_s / 2, windows_per_s=H200.windows_per_s / 2)


@pytest.mark.parametrize("run", paper.PUBLISHED, ids=lambda run: run.name)
def test_the_model_is_near_the_published_runs(run: paper.Published) -> None:
    minutes = forecast(run.device, run.layout, Links()).total / 60
    assert minutes == pytest.approx(run.minutes, rel=0.15)


def test_the_minimum_step_time_is_that_of_the_largest_run() -> None:
    run = paper.LARGEST
    assert run.layout.samples_per_gpu == 1 / 8
    assert forecast(run.device, run.layout, Links()).total / 60 == pytest.approx(run.minutes, rel=0.02)


def test_the_published_rate_is_reproduced() -> None:
    instant = Links(overlap=1.0)
    assert 56 / 8 / forecast(H200, Layout(56, 8), instant).step == pytest.approx(76.05)
    # With fewer samples per GPU, the minimum step time has more weight.
    assert 28 / 28 / forecast(H200, Layout(28, 28), instant).step < 60


def test_the_parameters_are_the_networks() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in Unet3d(1, 3).parameters()) == paper.PARAMETERS


def test_evaluations_share_of_the_work_is_the_known_one() -> None:
    assert paper.evaluation_share_of_work() == pytest.approx(0.207, abs=0.001)


def test_samples_to_converge_pass_through_the_reference_points() -> None:
    assert [samples_to_converge(batch) for batch in (7, 28, 56, 84)] == [345_167, 345_167, 357_404, 416_640]
    assert samples_to_converge(42) == pytest.approx((345_167 + 357_404) / 2)
    assert samples_to_converge(112) == pytest.approx(416_640 + 59_236)  # assumed: linear extrapolation
    figures = [samples_to_converge(batch) for batch in range(1, 200)]
    assert figures == sorted(figures)


def test_an_all_reduce_by_hand() -> None:
    links = Links(within_node=100e9, between_nodes=10e9)
    assert links.all_reduce_s(1) == 0
    assert links.all_reduce_s(8) == pytest.approx(62_380_486 * 2 * 7 / 8 / 100e9)
    assert links.all_reduce_s(16) == pytest.approx(62_380_486 * (2 * 7 / 8 / 100e9 + 2 * 1 / 2 / 10e9))


def test_an_exchange_of_planes_by_hand() -> None:
    """36 MB a step, at a tenth of a millisecond per 36 MB."""
    links = Links(within_node=362e9)
    assert links.exchange_s(1) == 0
    assert links.exchange_s(2) == links.exchange_s(8) == pytest.approx(1e-4, rel=2e-3)
    shared, own = (forecast(H200, layout, Links(overlap=1.0)) for layout in (Layout(28, 56), Layout(56, 56)))
    assert shared.step == pytest.approx(own.step - H200.sample_s / 2 + shared.exchange)
    assert (own.exchange, shared.exchange) == (0, Links().exchange_s(2))


def test_a_forecast_by_hand() -> None:
    # 100 ms per sample, of which 7.5 ms are the minimum step time.
    device = paper.Device("", samples_per_s=10, batch=1, windows_per_s=100)
    given = forecast(device, Layout(28, 1), Links())
    assert given.step == pytest.approx(0.0075 + 28 * 0.0925)
    assert given.evaluation == pytest.approx(26.36)
    assert given.evaluations == pytest.approx((345_167 - 168_000) / 3360 + 1)
    assert given.total == pytest.approx(345_167 / 28 * given.step + given.evaluations * 26.36)
    assert given.share == pytest.approx(26.36 / (26.36 + 120 * given.step))


def test_concurrent_evaluation_costs_the_last_one_and_the_excess_over_the_interval() -> None:
    beside, pausing = (forecast(H200, Layout(56, 56, aside), Links()) for aside in (56, 0))
    assert beside.share == 0
    assert pausing.total - beside.total == pytest.approx((pausing.evaluations - 1) * pausing.evaluation)
    # One GPU evaluates in 13 s, while 60 steps take 1.2 s.
    slow = forecast(H200, Layout(56, 56, 1), Links())
    assert slow.total > pausing.total


@pytest.mark.parametrize("beyond_main", [False, True])
def test_more_gpus_are_never_slower_and_cost_more(beyond_main: bool) -> None:
    totals = [best(H200, gpus, Links(), beyond_main)[1].total for gpus in scaling.GPUS]
    assert totals == sorted(totals, reverse=True)
    gpu_seconds = [gpus * total for gpus, total in zip(scaling.GPUS, totals, strict=True)]
    assert gpu_seconds == sorted(gpu_seconds)


@pytest.mark.parametrize("layout", [Layout(56, 8), Layout(84, 84), Layout(84, 672, 96)])
def test_a_faster_gpu_a_wider_link_and_more_overlap_are_each_faster(layout: Layout) -> None:
    base = forecast(H200, layout, Links()).total
    assert forecast(SLOWER, layout, Links()).total > base
    assert forecast(H200, layout, Links(within_node=36e9)).total > base
    assert forecast(H200, layout, Links(overlap=0.5)).total > base
    across = forecast(H200, layout, Links(between_nodes=20e9)).total
    assert across > base if layout.training > 8 else across == base


@pytest.mark.parametrize("gpus", [1, 8, 16, 100, 1024])
def test_layouts_can_be_launched(gpus: int) -> None:
    found = list(layouts(gpus))
    assert found
    for layout in found:
        assert layout.training <= gpus
        assert layout.evaluating == 0
        assert layout.batch * layout.ranks_per_sample % layout.training == 0
        Unet3d(1, 3).check_slabs(128, layout.ranks_per_sample, "--ranks_per_sample")
        assert 168 % layout.batch == 0
        assert layout.samples_per_gpu <= paper.MAX_SAMPLES_PER_GPU
        nodes = paper.nodes_for(layout.training, gpus)
        assert layout.training == nodes * (layout.training // nodes)
        assert layout.training // nodes <= 8
        assert layout.training // nodes % layout.ranks_per_sample == 0, "GPUs that share a sample are in one node"


def test_beyond_main_evaluates_concurrently() -> None:
    found = list(layouts(768, beyond_main=True))
    assert Layout(84, 672, 96) in found
    assert Layout(84, 336) in set(layouts(768)) < set(found)
    assert all(layout.training + layout.evaluating <= 768 for layout in found)


@pytest.mark.parametrize(("gpus", "nodes", "a_node"), [(8, 1, 8), (16, 2, 7), (128, 14, 8)])
def test_main_py_accepts_the_suggested_settings(gpus: int, nodes: int, a_node: int) -> None:
    layout, _ = best(H200, gpus, Links())
    words = launch(layout, gpus).split()
    assert words[0] == "torchrun"
    assert int(words[words.index("--nproc_per_node") + 1]) == a_node
    assert ("--nnodes" in words) == (nodes > 1)
    if nodes > 1:
        assert int(words[words.index("--nnodes") + 1]) == nodes
    arguments = words[words.index("main.py") + 1 :]
    arguments[0] = f"@{scaling.PROJECT / arguments[0].removeprefix('@')}"
    config, _ = parse_arguments(arguments)
    reference = paper.nearest_reference(layout.batch)
    assert config.ranks_per_sample == (2 if gpus == 128 else 1)
    assert config.batch_size * config.ga_steps * nodes * a_node == layout.batch * config.ranks_per_sample
    assert (config.learning_rate, config.lr_warmup_epochs) == (reference.learning_rate, reference.warmup_epochs)


@pytest.mark.parametrize(("batch", "point"), [(7, 28), (56, 56), (84, 84), (168, 84)])
def test_the_nearest_reference_point(batch: int, point: int) -> None:
    assert paper.nearest_reference(batch).batch == point


def test_the_modelled_tables_are_complete_and_mark_extrapolations() -> None:
    for table in (scaling.compared_with_published(), scaling.on_paper(), scaling.launches(), scaling.beyond_main()):
        for row in table.rows:
            assert len(row) == len(table.columns)
            assert all(math.isfinite(cell) and cell >= 0 for cell in row if isinstance(cell, int | float))
    rows = scaling.on_paper().rows
    assert [row[0] for row in rows] == list(scaling.GPUS)
    assert all(row[2].endswith("*") == (int(row[2].removesuffix(" *")) > 84) for row in rows)
    assert [row[0] for row in scaling.compared_with_published().rows] == [
        run.name for run in (*paper.PUBLISHED, paper.LARGEST)
    ]


@pytest.mark.slow
def test_the_measured_rows_come_from_one_and_two_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # With one core, the row of a process with all threads is the same as the first.
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    table = scaling.processes(Options(device=CPU, quick=True, work_dir=tmp_path))
    assert [row[:2] for row in table.rows] == [[1, 1], [2, 1]]
    for row in table.rows:
        assert len(row) == len(table.columns)
        assert math.isfinite(row[2])
        assert row[2] > 0
    (_, _, one, *_), (_, _, two, weak, strong) = table.rows
    assert weak == pytest.approx(two / one / 2)
    assert strong == pytest.approx(two / one)


def recorded(monkeypatch: pytest.MonkeyPatch, returncode: int = 0, stderr: str = "") -> list[dict[str, Any]]:
    """Replaces `subprocess.run`: records the started processes, each of which reports 7 samples/s."""
    started: list[dict[str, Any]] = []

    def start(command: list[str], **settings: Any) -> subprocess.CompletedProcess[str]:
        started.append({"command": command, **settings})
        folder = Path(command[command.index("--log_dir") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "benchmark.json").write_text('{"samples_per_s": 7}')
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    monkeypatch.setattr(subprocess, "run", start)
    return started


def test_processes_share_the_cores_and_hide_a_launchers_variables(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    started = recorded(monkeypatch)
    table = scaling.processes(Options(device=CPU, quick=True, work_dir=tmp_path))
    threads = [run["env"]["OMP_NUM_THREADS"] for run in started]
    ranks = [2 if "torch.distributed.run" in run["command"] else 1 for run in started]
    assert list(zip(ranks, threads, strict=True)) == [(1, "4"), (2, "4"), (1, "8")]
    assert all("RANK" not in run["env"] for run in started)
    assert table.rows == [[1, 4, 7.0, "", ""], [2, 4, 7.0, 0.5, 1.0], [1, 8, 7.0, "", ""]]
    assert len({run["command"][run["command"].index("--log_dir") + 1] for run in started}) == 3


def test_a_failed_process_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recorded(monkeypatch, returncode=2, stderr="first\nmain.py: error: why\nof the launcher")
    with pytest.raises(UserError, match=r"exited with 2: main.py: error: why"):
        scaling.processes(Options(device=CPU, quick=True, work_dir=tmp_path))


def test_one_gpu_measures_no_second_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started = recorded(monkeypatch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    table: Table = scaling.processes(Options(device=torch.device("cuda", 0), quick=True, work_dir=tmp_path))
    assert started == []
    assert table.rows[0][2].startswith(NOT_MEASURED)
