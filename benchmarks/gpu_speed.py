"""How fast one GPU trains and evaluates the benchmark's network, and where the time goes."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

from benchmarks import step
from benchmarks.evaluate import PUBLISHED as WINDOWS_PUBLISHED
from benchmarks.evaluate import ConfidentNetwork, check_same, scoring
from benchmarks.harness import NOT_MEASURED, Options, Table, compare
from benchmarks.step import CHANNELS, CLASSES, PUBLISHED, Scale, StepVariant, make_state, make_step, training_step
from data_loading.data_loader import EvaluationCase
from model.losses import DiceCELoss
from model.unet3d import MLPERF_FILTERS, Unet3d
from runtime.distributed.world import World
from runtime.evaluation import CaseScorer
from runtime.logging.throughput import peak_memory_bytes
from runtime.precision import choose_precision
from runtime.training import StepConfig
from runtime.warmup import dummy_batch, peak_flops, seconds, synchronize, training_flops

BATCHES = (1, 2, 7, 14, 28)
WINDOW_BATCHES = (1, 2, 4, 8, 16)
GRAPH_BATCHES = (1, 2, 7)
REPETITIONS = 10
WARM_UP = 3
PROFILED_STEPS = 3
PROFILED_BATCH = 14
LARGEST_KERNELS = 10
# Triton's kernels by the start of their names, all others by a part of it; the first match counts.
TRITON_KINDS = {
    "convolution": ("_narrow", "_image", "_output"),
    "transposed convolution and concatenation": ("_join", "_add_part"),
    "norm and activation": ("_moments", "_finish", "_normalize", "_gradient"),
    "loss": ("_sums",),
}
KINDS = {
    "convolution": ("conv", "xmma", "cutlass", "cudnn", "implicit", "dgrad", "wgrad", "gemm", "nvjet"),
    "concatenation": ("CatArray",),
    "optimizer and gradient norm": ("multi_tensor", "lpnorm", "FusedSgd"),
    "copies": ("Memcpy", "Memset", "copy", "fill", "Fill"),
}


def scale_of(options: Options, batch: int) -> Scale:
    if options.quick:
        return Scale((4, 8), (16, 16, 16), batch, 1)
    return Scale(MLPERF_FILTERS, (128, 128, 128), batch, 3)


def autotune(options: Options) -> None:
    torch.backends.cudnn.benchmark = options.device.type == "cuda"


def sample_flops(scale: Scale) -> float:
    return training_flops(lambda: Unet3d(CHANNELS, CLASSES, filters=scale.filters), (CHANNELS, *scale.shape))


def samples(options: Options) -> Table:
    """Training steps on dummy data at several batch sizes."""
    autotune(options)
    device = options.device
    precision = choose_precision(True, "auto", device)
    peak = peak_flops(precision)
    rows: list[list[object]] = []
    for batch in (1, 2) if options.quick else BATCHES:
        scale = scale_of(options, batch)
        flops = sample_flops(scale)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        try:
            work = make_step(StepVariant(), device, scale, batch)
            first = seconds(work, device)
            times = [seconds(work, device) for _ in range(WARM_UP + REPETITIONS)][WARM_UP:]
        except torch.cuda.OutOfMemoryError:
            rows.append([batch, f"{NOT_MEASURED}: out of memory", *[""] * 5])
            continue
        duration = statistics.median(times)
        rate = batch / duration
        rows.append(
            [
                batch,
                rate,
                1e3 * duration,
                rate * flops / 1e12,
                rate * flops / peak,
                peak_memory_bytes(device) / 2**30,
                first,
            ]
        )
    columns = [
        "batch",
        "samples/s",
        "ms per step",
        "TFLOP/s",
        "share of the GEMM peak",
        "peak memory, GiB",
        "first step, s",
    ]
    published = [f"One H200: {PUBLISHED['samples/s']} samples/s."] if device.type == "cuda" else []
    notes = [f"{step.describe(scale_of(options, 0), precision, 0)} GEMM peak {peak / 1e12:.4g} TFLOP/s.", *published]
    return Table("Samples per second", columns, rows, notes)


def profile(options: Options) -> Table:
    """The kernels that take the most time of a training step."""
    autotune(options)
    device = options.device
    batch = 2 if options.quick else PROFILED_BATCH
    work = make_step(StepVariant(), device, scale_of(options, batch), batch)
    for _ in range(WARM_UP):
        work()
    synchronize(device)
    is_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]
    started = time.perf_counter()
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(PROFILED_STEPS):
            work()
        synchronize(device)
    duration = (time.perf_counter() - started) / PROFILED_STEPS
    times: dict[str, tuple[float, int]] = {}
    for event in profiler.key_averages():
        on_device = str(event.device_type).endswith("CUDA")
        if on_device == is_gpu:
            total = event.self_device_time_total if is_gpu else event.self_cpu_time_total
            before, count = times.get(event.key, (0.0, 0))
            times[event.key] = (before + total, count + event.count)
    return Table(
        "A step by kernel",
        *kernel_rows(times),
        notes=[f"Batch {batch}, {PROFILED_STEPS} profiled steps of {1e3 * duration:.4g} ms each."],
    )


def kernel_rows(times: dict[str, tuple[float, int]]) -> tuple[list[str], list[list[object]]]:
    """The largest kernels, then all of them by kind, from (microseconds, launches) in all profiled steps."""
    total = sum(time for time, _ in times.values()) or 1.0
    rows: list[list[object]] = []
    for name, (time_us, count) in sorted(times.items(), key=lambda item: -item[1][0])[:LARGEST_KERNELS]:
        rows.append(
            [name[:90].replace("|", "/"), time_us / 1e3 / PROFILED_STEPS, count / PROFILED_STEPS, time_us / total]
        )
    kinds: dict[str, list[float]] = {}
    for name, (time_us, count) in times.items():
        entry = kinds.setdefault(kind_of(name), [0.0, 0.0])
        entry[0] += time_us
        entry[1] += count
    for kind, (time_us, launches) in sorted(kinds.items(), key=lambda item: -item[1][0]):
        rows.append([f"all: {kind}", time_us / 1e3 / PROFILED_STEPS, launches / PROFILED_STEPS, time_us / total])
    return ["kernel", "ms per step", "launches per step", "share"], rows


def kind_of(name: str) -> str:
    """The purpose of a kernel."""
    triton = (kind for kind, starts in TRITON_KINDS.items() if name.startswith(starts))
    others = (kind for kind, words in KINDS.items() if any(word in name for word in words))
    return next(triton, None) or next(others, "other")


def windows(options: Options) -> Table:
    """Whole cases in the device's memory, scored with windows in batches; the scores are those of one at a time."""
    autotune(options)
    device = options.device
    filters, side = ((4, 8), 16) if options.quick else (MLPERF_FILTERS, 128)
    precision = choose_precision(True, "auto", device)
    network = ConfidentNetwork(make_state(StepVariant(), precision, filters).network).to(device).eval()
    cases = []
    for number in range(2):
        batch = dummy_batch((1, CHANNELS, 2 * side, 3 * side, 3 * side), CLASSES, device)
        cases.append(EvaluationCase(f"case {number}", batch["image"], batch["label"]))
    count = sum(scoring((side,) * 3, 1).windows(case.image.shape[2:]) for case in cases)
    rows: list[list[object]] = []
    first: Tensor | None = None
    for size in WINDOW_BATCHES:
        scorer = CaseScorer(network=network, loss=DiceCELoss(), windows=scoring((side,) * 3, size), precision=precision)

        def score(scorer: CaseScorer = scorer) -> Tensor:
            return torch.stack(list(scorer.score(cases, World(0, 1, device))))

        scores = score().cpu()
        first = scores if first is None else first
        check_same(first, scores, precision)
        duration = statistics.median(seconds(score, device) for _ in range(3))
        inputs = dummy_batch((size, CHANNELS, side, side, side), CLASSES, device)["image"]
        batches = math.ceil(count / size)

        def forward(inputs: Tensor = inputs, batches: int = batches) -> None:
            # As many as the scorer runs, none waited for: one at a time would measure the latency of a launch as well.
            with torch.inference_mode(), precision.autocast():
                for _ in range(batches):
                    network.network(inputs)

        forward()
        alone = statistics.median(seconds(forward, device) for _ in range(3))
        rows.append([size, count / duration, batches * size / alone])
    notes = [
        f"{count} windows of {side}^3 over two volumes on the device; stitching, loss and Dice included, and the same "
        "scores at every batch size. In the last column the network alone.",
        *([WINDOWS_PUBLISHED] if device.type == "cuda" else []),
    ]
    return Table("Windows per second", ["val_batch_size", "windows/s", "windows/s, network alone"], rows, notes)


def choices(options: Options) -> Table:
    """The gain of each choice, at a batch that leaves room for what its baseline needs."""
    autotune(options)
    left = tuple(choice for choice in step.CHOICES if not choice.on)
    return step.gains(options.device, scale_of(options, 2 if options.quick else 7), left)


def compiled(options: Options) -> Table:
    """`--compile` compared with the eager step."""
    autotune(options)
    only = tuple(choice for choice in step.CHOICES if choice.on)
    table = step.gains(options.device, scale_of(options, 2 if options.quick else 7), only)
    return replace(table, title="torch.compile")


def cuda_graphs(options: Options) -> Table:
    """Steps replayed from a CUDA graph compared with launching each kernel."""
    autotune(options)
    rows: list[list[object]] = []
    for batch in (1,) if options.quick else GRAPH_BATCHES:
        scale = scale_of(options, batch)
        plain = make_step(StepVariant(), options.device, scale, batch)
        replay = captured(options.device, scale, batch)
        times = compare(plain, replay, pairs=5, device=options.device, warm_up=2)
        milliseconds = [1e3 * statistics.median(values) for values in (times.naive_s, times.ours_s)]
        rows.append([batch, *milliseconds, times.ratio])
    return Table("CUDA graphs", ["batch", "ms per step, launched", "ms per step, replayed", "ratio"], rows)


def captured(device: torch.device, scale: Scale, batch_size: int) -> Callable[[], object]:
    """Returns a function that replays a captured step."""
    precision = choose_precision(True, "auto", device)
    state = make_state(StepVariant(), precision, scale.filters)
    config = StepConfig(loss=DiceCELoss(), precision=precision, ga_steps=1, layout="NDHWC")
    batch = dummy_batch((batch_size, CHANNELS, *scale.shape), CLASSES, device)

    work = training_step(state, config, batch)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            work()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay
