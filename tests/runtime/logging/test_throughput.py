"""`--benchmark`'s figures: rates, latencies, where the time went, and the verdict."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from runtime.logging import events as ev
from runtime.logging import throughput as module
from runtime.logging.throughput import ThroughputTracker, breakdown, efficiency, throughput, verdict

CPU = torch.device("cpu")


def test_throughput_is_samples_over_time_and_no_mean_of_rates() -> None:
    """Nine steps of 10 ms and one of 1 s: 20 samples in 1.09 s; a mean of rates would be 182."""
    figures = throughput([10.0] * 9 + [1000.0], [2] * 10, groups=1)
    assert figures["samples_per_s"] == pytest.approx(20 / 1.09)
    assert figures["latency_mean_ms"] == pytest.approx(109)
    assert figures["iterations"] == 10


def test_throughput_counts_every_rank_and_each_batchs_own_samples() -> None:
    assert throughput([100.0, 100.0], [4, 2], groups=3)["samples_per_s"] == pytest.approx(3 * 6 / 0.2)


def test_latency_percentiles() -> None:
    figures = throughput([float(n) for n in range(1, 102)], [1] * 101, groups=1)
    percentiles = [figures[f"latency_p{p}_ms"] for p in (90, 95, 99)]
    assert percentiles == pytest.approx([91, 96, 100])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that `time.perf_counter` returns, set by the test."""
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


Phases = tuple[float, float, float]


def iterate(tracker: ThroughputTracker, clock: list[float], iterations: list[Phases], samples: int = 2) -> None:
    """Iterations whose waiting, computing and stepping take that many seconds."""
    tracker.on(ev.EpochStarted(1, 0.1, len(iterations)))
    for index, (data, compute, step) in enumerate(iterations):
        clock[0] += data
        tracker.on(ev.PhaseEnd("data"))
        clock[0] += compute
        tracker.on(ev.PhaseEnd("forward and backward"))
        clock[0] += step
        tracker.on(ev.MicroBatchEnd(1, index, samples))


def end(tracker: ThroughputTracker, folder: Path) -> dict[str, float | str]:
    tracker.on(ev.RunStopped(status="aborted", reason="", epoch=1, seconds=60.0))
    figures: dict[str, float | str] = json.loads((folder / "benchmark.json").read_text())
    return figures


def test_the_warm_up_is_not_timed(tmp_path: Path, clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    tracker = ThroughputTracker(CPU, warmup_steps=2, ranks=2, log_dir=tmp_path)
    iterate(tracker, clock, [(0, 50.0, 0), (9.0, 0, 0), (0, 0.5, 0), (0.05, 0.15, 0.05), (0, 0.2, 0.05)])
    figures = end(tracker, tmp_path)
    assert figures["samples_per_s"] == pytest.approx(2 * 6 / 1.0)
    assert figures["iterations"] == 3
    assert figures["latency_mean_ms"] == pytest.approx(1000 / 3)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(figures)
    assert lines[0] == "samples_per_s 12"


def test_the_phases_of_an_iteration_add_up(tmp_path: Path, clock: list[float]) -> None:
    tracker = ThroughputTracker(CPU, warmup_steps=1, ranks=1, log_dir=tmp_path)
    tracker.on(ev.Calibrated(flops_per_sample=3e12, peak_flops=40e12, communication_ms=100.0))
    iterate(tracker, clock, [(7, 7, 7), (0.1, 0.7, 0.2), (0.3, 0.5, 0.2)])
    figures = end(tracker, tmp_path)
    assert figures["data_wait_ms"] == pytest.approx(200)
    assert figures["communication_ms"] == pytest.approx(100)
    assert figures["forward_backward_ms"] == pytest.approx(500), "without what waits for other ranks"
    assert figures["optimizer_ms"] == pytest.approx(200)
    assert figures["samples_per_s"] == pytest.approx(2.0)
    assert figures["tflops_per_s"] == pytest.approx(6.0)
    assert figures["share_of_peak"] == pytest.approx(6 / 40)
    assert figures["verdict"] == "input-bound"
    assert 0.01 < float(figures["peak_memory_gib"]) < 1000


def test_efficiency_is_of_one_rank_and_unknown_without_a_peak() -> None:
    figures = efficiency(76.05, ev.Calibrated(2.86e12, 990e12, 0.0))
    assert figures["tflops_per_s"] == pytest.approx(217.5, rel=1e-3)
    assert figures["share_of_peak"] == pytest.approx(0.2197, rel=1e-3)
    assert efficiency(76.05, ev.Calibrated(2.86e12, 0.0, 0.0)) == {}


def test_communication_never_exceeds_the_backward_pass_it_is_part_of() -> None:
    figures = breakdown({"data": 1.0, "forward and backward": 5.0, "optimizer": 1.0}, communication_ms=8.0)
    assert (figures["forward_backward_ms"], figures["communication_ms"]) == (0.0, 5.0)


@pytest.mark.parametrize(
    ("data", "communication", "expected"),
    [
        (5.0, 5.0, "compute-bound"),
        (10.0, 0.0, "compute-bound"),
        (10.1, 0.0, "input-bound"),
        (0.0, 11.0, "communication-bound"),
        (20.0, 30.0, "communication-bound"),
        (30.0, 20.0, "input-bound"),
    ],
)
def test_verdict(data: float, communication: float, expected: str) -> None:
    figures = {"data_wait_ms": data, "communication_ms": communication, "latency_mean_ms": 100.0}
    assert verdict(figures) == expected


def test_the_time_between_epochs_counts_as_waiting_for_data(tmp_path: Path, clock: list[float]) -> None:
    tracker = ThroughputTracker(CPU, warmup_steps=0, ranks=1, log_dir=tmp_path)
    iterate(tracker, clock, [(0.0, 1.0, 0.0)])
    clock[0] += 3.0  # the loader starts over
    iterate(tracker, clock, [(0.0, 1.0, 0.0)])
    figures = end(tracker, tmp_path)
    assert figures["samples_per_s"] == pytest.approx(4 / 5.0)
    assert (figures["iterations"], figures["latency_mean_ms"]) == (2, pytest.approx(2500))
    assert figures["data_wait_ms"] == pytest.approx(1500)


def test_nothing_to_report_within_the_warm_up(
    tmp_path: Path, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = ThroughputTracker(CPU, warmup_steps=5, ranks=1, log_dir=tmp_path)
    iterate(tracker, clock, [(0.0, 1.0, 0.0)] * 5)
    tracker.on(ev.RunStopped(status="aborted", reason="", epoch=1, seconds=60.0))
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "benchmark.json").exists()
