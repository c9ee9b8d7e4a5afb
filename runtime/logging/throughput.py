"""`--benchmark`: times each iteration after the warm-up, by phase, and compares it with the device's peak."""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runtime.logging import events as ev

PHASES = ("data", "forward and backward", "optimizer")
# A wait is reported as the bottleneck above this share of the step; below it, it is jitter.
NOTABLE_SHARE = 0.1


class ThroughputTracker:
    """Writes `LOG_DIR/benchmark.json` and prints each figure as a `name value` line.

    On a GPU the timestamps are CUDA events, so that the host never waits for the device between iterations.

    Args:
        warmup_steps: iterations that are not counted.
        ranks: number of ranks, all of which do the same work.
        ranks_per_sample: number of ranks that share each sample; samples/s is this rank's rate times the number of
            such groups.
    """

    def __init__(
        self, device: torch.device, warmup_steps: int, ranks: int, log_dir: Path, ranks_per_sample: int = 1
    ) -> None:
        self._device = device
        self._warmup_steps = warmup_steps
        self._ranks = ranks
        self._groups = ranks // ranks_per_sample
        self._path = log_dir / "benchmark.json"
        # A timestamp before the first iteration, then one per phase, `len(PHASES)` per iteration.
        self._timestamps: list[Any] = []
        self._samples: list[int] = []
        self._limits = ev.Calibrated(0.0, 0.0, 0.0)

    def on(self, event: ev.Event) -> None:
        if isinstance(event, ev.Calibrated):
            self._limits = event
        if isinstance(event, ev.EpochStarted) and not self._timestamps:
            self._add_timestamp()
        if isinstance(event, ev.PhaseEnd | ev.MicroBatchEnd):
            self._add_timestamp()
        if isinstance(event, ev.MicroBatchEnd):
            self._samples.append(event.samples)
        if isinstance(event, ev.RunStopped):
            self._report()

    def _add_timestamp(self) -> None:
        if self._device.type == "cuda":
            timestamp = torch.cuda.Event(enable_timing=True)
            timestamp.record()
            self._timestamps.append(timestamp)
        else:
            self._timestamps.append(time.perf_counter())

    def _milliseconds(self) -> list[float]:
        """Returns the duration of each phase in ms, in the order of execution."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the only wait, once the run is over
            return [first.elapsed_time(second) for first, second in pairwise(self._timestamps)]
        return [1e3 * (second - first) for first, second in pairwise(self._timestamps)]

    def _report(self) -> None:
        phases = np.array(self._milliseconds()).reshape(-1, len(PHASES))[self._warmup_steps :]
        if not len(phases):
            return
        figures = throughput(phases.sum(1).tolist(), self._samples[self._warmup_steps :], self._groups)
        figures |= breakdown(dict(zip(PHASES, phases.mean(0).tolist(), strict=True)), self._limits.communication_ms)
        figures |= efficiency(figures["samples_per_s"] / self._ranks, self._limits)
        figures["peak_memory_gib"] = peak_memory_bytes(self._device) / 2**30
        report: dict[str, float | str] = {**figures, "verdict": verdict(figures)}
        for name, value in report.items():
            print(f"{name} {value if isinstance(value, str) else format(value, '.4g')}", flush=True)
        self._path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def measured_samples_per_s(log_dir: Path) -> float | None:
    """Returns the rate that `--benchmark` last measured in this log folder, or None."""
    try:
        newest = max(log_dir.glob("benchmark*.json"), key=lambda path: path.stat().st_mtime)
        rate = float(json.loads(newest.read_text(encoding="utf-8"))["samples_per_s"])
    except (OSError, ValueError, TypeError, KeyError):  # missing or damaged: the rate is only a hint
        return None
    return rate if math.isfinite(rate) and rate > 0 else None


def throughput(latencies_ms: Sequence[float], samples: Sequence[int], groups: int) -> dict[str, float]:
    """Returns samples per second (total over total: one slow step distorts a mean of rates) and latencies in ms."""
    p90, p95, p99 = np.percentile(latencies_ms, (90, 95, 99)).tolist()
    return {
        "samples_per_s": 1e3 * sum(samples) * groups / sum(latencies_ms),
        "iterations": len(latencies_ms),
        "latency_mean_ms": sum(latencies_ms) / len(latencies_ms),
        "latency_p90_ms": p90,
        "latency_p95_ms": p95,
        "latency_p99_ms": p99,
    }


def breakdown(phases_ms: Mapping[str, float], communication_ms: float) -> dict[str, float]:
    """Returns the parts of a mean iteration in ms, with communication separate from the backward pass."""
    communication = min(communication_ms, phases_ms["forward and backward"])
    return {
        "data_wait_ms": phases_ms["data"],
        "forward_backward_ms": phases_ms["forward and backward"] - communication,
        "optimizer_ms": phases_ms["optimizer"],
        "communication_ms": communication,
    }


def efficiency(samples_per_s: float, limits: ev.Calibrated) -> dict[str, float]:
    """Returns TFLOP/s of one rank, and its share of what the device reaches in a large matrix product."""
    if not limits.peak_flops:
        return {}
    rate = samples_per_s * limits.flops_per_sample
    return {
        "tflops_per_s": rate / 1e12,
        "peak_tflops_per_s": limits.peak_flops / 1e12,
        "share_of_peak": rate / limits.peak_flops,
    }


def verdict(figures: Mapping[str, float]) -> str:
    """Returns the run's bottleneck: its input, its communication, or else its arithmetic."""
    waits = {"input-bound": figures["data_wait_ms"], "communication-bound": figures["communication_ms"]}
    worst = max(waits, key=lambda name: waits[name])
    return worst if waits[worst] > NOTABLE_SHARE * figures["latency_mean_ms"] else "compute-bound"


def peak_memory_bytes(device: torch.device) -> int:
    """Returns this process's peak memory use, of the GPU or else of the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux reports KiB
