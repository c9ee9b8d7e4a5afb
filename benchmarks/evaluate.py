"""Sliding-window evaluation: windows in batches compared with one at a time, and the assignment of cases to ranks."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.harness import Options, Table, compare
from benchmarks.step import CHANNELS, CLASSES, NaiveDiceCE
from data_loading.data_loader import load_evaluation_case
from data_loading.dataset import case_file
from model.losses import DiceCELoss
from model.unet3d import MLPERF_FILTERS, Unet3d
from runtime.distributed.world import World
from runtime.evaluation import CaseScorer, SlidingWindowConfig, assign_cases
from runtime.memory_format import to_device
from runtime.precision import Precision, choose_precision
from runtime.seeding import seed_process

BATCH_SIZES = (1, 2, 4, 8)
RANKS = (2, 4, 8, 16, 42, 64)
# The evaluation set's 42 cases have 8 to 144 windows of 128^3, 2,636 in all; synthetic here: a curve through all three.
FEWEST, MOST, CASES = 8, 144, 42
# Padding around a volume: below every intensity of KITS19, as in its spec.
PADDING = -2.2
# Number of case orders over which round-robin is averaged: the data set's own order is unrelated to size.
ORDERS = 200
# The image is noise with standard deviation 1: these edges give each class about a third of the voxels.
EDGES = (-0.5, 0.5)
# Largest difference between both implementations: in Dice only the last digits, in the loss the format's rounding.
DICE_TOLERANCE = 1e-6
LOSS_TOLERANCE = {None: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}
PUBLISHED = "Published for one H200 (NVIDIA's MXNet code, MLPerf v4.0): 204 windows/s."


@dataclass(frozen=True)
class Scale:
    """The size of the computation: network, window, and volumes whose sizes require cutting and padding."""

    filters: tuple[int, ...]
    window: tuple[int, int, int]
    volumes: tuple[tuple[int, int, int], ...]
    pairs: int


def run(options: Options) -> list[Table]:
    """Runs the suite: windows in batches at each scale, and the assignment of cases to ranks."""
    tables = []
    for title, scale in scales_of(options).items():
        folder = options.work_dir / title
        folder.mkdir()
        tables.append(batching(title, options.device, scale, folder))
    return [*tables, assignment()]


def scales_of(options: Options) -> dict[str, Scale]:
    """Scales by title. Small windows are a separate case: for a single one a CPU uses PyTorch's slow convolution."""
    whole, small = "Evaluation in batches of windows", "Evaluation in batches of small windows"
    if options.quick:
        return {whole: Scale((4, 8), (16, 16, 16), ((25, 31, 30), (16, 20, 24)), 1)}
    scans = Scale((8, 16, 64, 128), (32, 48, 32), ((35, 50, 36), (38, 49, 33), (32, 54, 34)), 5)  # of the hippocampus
    if options.device.type == "cuda":
        volumes = ((261, 250, 250), (190, 325, 325), (325, 250, 250))
        return {whole: Scale(MLPERF_FILTERS, (128, 128, 128), volumes, 5), small: scans}
    return {whole: Scale(MLPERF_FILTERS, (64, 64, 64), ((100, 90, 100), (64, 64, 100)), 3), small: scans}


def batching(title: str, device: torch.device, scale: Scale, folder: Path) -> Table:
    """Windows/s of `CaseScorer` compared with `naive_scores`, on the same network and volumes.

    Raises:
        RuntimeError: their scores differ.
    """
    seed_process(0, deterministic=False, autotune=device.type == "cuda")
    cases = write_cases(folder, scale.volumes)
    network = to_device(ConfidentNetwork(Unet3d(CHANNELS, CLASSES, filters=scale.filters)), device, "NDHWC").eval()
    precision = choose_precision(True, "auto", device)
    windows = sum(scoring(scale.window, 1).windows(shape) for shape in scale.volumes)
    rows = []
    for batch_size in BATCH_SIZES:
        found: dict[str, Tensor] = {}

        def naive(found: dict[str, Tensor] = found) -> None:
            found["naive"] = naive_scores(folder, cases, network=network, window=scale.window, precision=precision)

        def ours(found: dict[str, Tensor] = found, batch_size: int = batch_size) -> None:
            found["ours"] = batched_scores(
                folder, cases, network=network, how=scoring(scale.window, batch_size), precision=precision
            )

        times = compare(naive, ours, scale.pairs, device)
        check_same(found["naive"], found["ours"], precision)
        rates = [windows / statistics.median(values) for values in (times.naive_s, times.ours_s)]
        rows.append([batch_size, *rates, times.ratio])
    shapes = ", ".join(" x ".join(map(str, shape)) for shape in scale.volumes)
    notes = [
        f"unet3d with filters {scale.filters}, {windows} windows of {' x '.join(map(str, scale.window))} over volumes "
        f"of {shapes}; both give the same scores (Dice within {DICE_TOLERANCE:g}).",
        "One at a time: the Gaussian map is recomputed for each volume. Both read from disk, as main.py does on a CPU.",
        *([PUBLISHED] if device.type == "cuda" and scale.filters == MLPERF_FILTERS else []),
    ]
    columns = ["val_batch_size", "windows/s, one at a time", "windows/s, in batches", "ratio"]
    return Table(title, columns, rows, notes)


def check_same(naive: Tensor, ours: Tensor, precision: Precision) -> None:
    """Compares scores (cases, K), the loss first. Raises RuntimeError if they differ."""
    away = (naive - ours).abs().max(dim=0).values
    if not (away[1:].max() <= DICE_TOLERANCE and away[0] <= LOSS_TOLERANCE[precision.dtype]):
        raise RuntimeError(f"the batched scores are not those of one window at a time: off by {away.tolist()}")


def scoring(window: tuple[int, int, int], batch_size: int) -> SlidingWindowConfig:
    return SlidingWindowConfig(
        window=window,
        overlap=0.5,
        batch_size=batch_size,
        classes=CLASSES,
        padding_value=PADDING,
        crops_remainder=True,
    )


def batched_scores(
    folder: Path, cases: Sequence[str], network: nn.Module, how: SlidingWindowConfig, precision: Precision
) -> Tensor:
    """The project's own scores, as in evaluation: (cases, K) float64 on the host, the loss first."""
    loaded = (load_evaluation_case(folder, case) for case in cases)
    alone = World(0, 1, precision.device)
    scorer = CaseScorer(network=network, loss=DiceCELoss(), windows=how, precision=precision)
    return torch.stack(list(scorer.score(loaded, alone))).cpu()


class ConfidentNetwork(nn.Module):
    """A network with a clear largest logit in every voxel, at the cost of the network that it wraps.

    An untrained network's logits nearly tie: rounding, which differs with the batch size, would flip single voxels, and
    one voxel of a million changes Dice by more than 1e-6.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.edges: Tensor
        self.register_buffer("edges", torch.tensor(EDGES), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """(N, 1, D, H, W) -> (N, 3, D, H, W)."""
        logits: Tensor = 0.1 * self.network(image).tanh().float()
        chosen = torch.bucketize(image.contiguous(), self.edges)
        return logits.scatter_add(1, chosen, torch.ones_like(image))


def write_cases(folder: Path, shapes: Sequence[tuple[int, int, int]]) -> list[str]:
    """Writes a preprocessed folder of noise volumes, labelled by their own values except for some voxels."""
    cases = []
    for number, shape in enumerate(shapes):
        rng = np.random.default_rng(number)
        image = rng.standard_normal((1, *shape), dtype=np.float32)
        label = np.digitize(image + 0.3 * rng.standard_normal(image.shape, dtype=np.float32), EDGES)
        cases.append(f"case_{number:05d}")
        np.save(case_file(folder, cases[-1], "x"), image)
        np.save(case_file(folder, cases[-1], "y"), label.astype(np.uint8))
    return cases


@torch.inference_mode()
def naive_scores(
    folder: Path, cases: Sequence[str], network: nn.Module, window: tuple[int, int, int], precision: Precision
) -> Tensor:
    """The baseline: each volume read and its Gaussian map made anew, each window through the network on its own.

    Returns:
        (cases, K) float64 on the host: the loss, then Dice per foreground class.
    """
    rows = []
    for case in cases:
        image, label = (np.load(case_file(folder, case, kind)) for kind in ("x", "y"))
        strides = [length // 2 for length in window]
        for axis, stride in enumerate(strides, start=1):
            image, label = (cut_remainder(array, axis, stride) for array in (image, label))
        kept = image.shape[1:]
        before = [0, 0, 0]
        for axis, (length, stride) in enumerate(zip(window, strides, strict=True)):
            missing = max(length - kept[axis], -kept[axis] % stride)
            before[axis] = missing // 2
            around = [(0, 0)] * 4
            around[axis + 1] = (missing // 2, missing - missing // 2)
            image = np.pad(image, around, constant_values=PADDING)
        logits = naive_logits(torch.from_numpy(image)[None].to(precision.device), network, window, precision)
        d, h, w = (slice(first, first + size) for first, size in zip(before, kept, strict=True))
        rows.append(naive_score(logits[..., d, h, w], torch.from_numpy(label)[None].to(precision.device)))
    return torch.tensor(rows, dtype=torch.float64)


def cut_remainder(array: NDArray[np.generic], axis: int, stride: int) -> NDArray[np.generic]:
    """Cuts an axis to whole strides if the remainder is less than half a stride."""
    size = array.shape[axis]
    remainder = size % stride
    if remainder >= stride // 2:
        return array
    return array.take(range(remainder // 2, size - (remainder - remainder // 2)), axis)


def naive_logits(image: Tensor, network: nn.Module, window: tuple[int, int, int], precision: Precision) -> Tensor:
    """(1, 1, D, H, W), whole strides in each axis -> (1, K, D, H, W): the mean of the windows, weighted by the map."""
    curves = []
    for length in window:
        position = torch.arange(length, dtype=torch.float64) - (length - 1) / 2
        curves.append(torch.exp(-0.5 * (position / (length / 8)) ** 2))
    product = torch.einsum("d,h,w->dhw", *curves) ** (1 / 3)
    weights = (product / product.max()).float().to(image.device)
    total = torch.zeros(1, CLASSES, *image.shape[2:], device=image.device)
    norm = torch.zeros_like(total)
    starts = [range(0, size - n + 1, n // 2) for size, n in zip(image.shape[2:], window, strict=True)]
    for corner in itertools.product(*starts):
        d, h, w = (slice(first, first + length) for first, length in zip(corner, window, strict=True))
        with precision.autocast():
            logits = network(image[..., d, h, w])
        total[..., d, h, w] += logits.float() * weights
        norm[..., d, h, w] += weights
    return total / norm


def naive_score(logits: Tensor, label: Tensor) -> list[float]:
    """The loss, then Dice of the arg-max per foreground class, each read from the device separately."""
    prediction = logits.argmax(dim=1, keepdim=True)
    row = [NaiveDiceCE()(logits, label).item()]
    for value in range(1, CLASSES):
        predicted, true = prediction == value, label == value
        intersection, total = (predicted & true).sum().item(), predicted.sum().item() + true.sum().item()
        row.append((2 * intersection + 1e-6) / (total + 1e-6))
    return row


def assignment() -> Table:
    """The busiest rank's windows: longest case first compared with every `ranks`-th case. Computed, not timed."""
    windows = window_counts()
    rows = []
    for ranks in RANKS:
        naive, ours = round_robin(windows, ranks), busiest(windows, ranks)
        rows.append([ranks, math.ceil(sum(windows) / ranks), naive, ours, naive / ours])
    notes = [
        f"{CASES} cases of {FEWEST} to {MOST} windows, {sum(windows)} in all, synthetic with MLPerf's totals. "
        f"Round-robin: the median over {ORDERS} orders of the cases. With more than {CASES} ranks the windows of a "
        "case are shared.",
    ]
    columns = ["ranks", "even share", "busiest rank, round-robin", "busiest rank, longest first", "ratio"]
    return Table("Windows of the busiest rank", columns, rows, notes)


def window_counts() -> list[int]:
    """Synthetic window counts of the evaluation cases, from the fewest to the most, with MLPerf's total of 2,636."""
    return [round(FEWEST + (MOST - FEWEST) * (case / (CASES - 1)) ** 1.5) for case in range(CASES)]


def busiest(windows: Sequence[int], ranks: int) -> int:
    """Windows of the busiest rank under `assign_cases`; the windows of a shared case are split evenly."""
    load = [0] * ranks
    for count, members in zip(windows, assign_cases(windows, ranks), strict=True):
        for index, rank in enumerate(members):
            load[rank] += len(range(index, count, len(members)))
    return max(load)


def round_robin(windows: Sequence[int], ranks: int) -> float:
    """Windows of the busiest rank if rank r takes cases r, r + ranks, …: the median over random orders."""
    rng = np.random.default_rng(0)
    orders = [rng.permutation(windows) for _ in range(ORDERS)]
    return statistics.median(max(int(order[rank::ranks].sum()) for rank in range(ranks)) for order in orders)
