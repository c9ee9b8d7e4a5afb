"""Time to MLPerf's target on many GPUs, computed from a device's measured rates.

    time = steps * step time + evaluations
    step time = floor + samples per GPU * time per sample + the part of the all-reduce that is not hidden
                + the exchange of planes between GPUs that share a sample
    steps = samples to converge at this batch size / batch size

Known figures are in the table of published runs; assumptions are named constants here, the same for every run.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from benchmarks.evaluate import busiest, window_counts
from model.slabs import halo_bytes
from model.unet3d import MLPERF_FILTERS

PARAMETERS = 31_190_243
GRADIENT_BYTES = 2 * PARAMETERS
# Planes that a GPU sends to its two neighbours in a step, for one 128^3 sample that they share, in 16 bit.
HALO_BYTES = halo_bytes(MLPERF_FILTERS, 1, (128, 128), element_bytes=2)
# Operations of one 128^3 sample: forward (a multiply-add counts as two), and forward and backward.
FORWARD_TFLOP, TRAINING_TFLOP = 2 * 0.4773, 2.860
TRAINING_CASES = 168
GPUS_PER_NODE = 8

# MLPerf's rule, in epochs of 168 samples: the first evaluation, and the interval between evaluations.
FIRST_EVALUATION, EVALUATION_INTERVAL = 1000, 20

# The least time of a step, however little there is to compute: launches, layers too small to fill a GPU, the latency of
# exchanges between GPUs that share a sample. Fitted to the largest published run (LARGEST): 4,960 steps in 46 s.
STEP_FLOOR_S = 7.5e-3
# Samples per GPU that fit in 80 GB in 16 bit (1.8 GB of activations each, plus the largest layers' workspace).
MAX_SAMPLES_PER_GPU = 28
# GPUs per sample: a window of 128 planes gives 4 slabs a plane each at the lowest resolution (--ranks_per_sample). The
# most that was published is 8.
RANKS_PER_SAMPLE = (2, 4)
MAX_GPUS_PER_SAMPLE = 8


@dataclass(frozen=True)
class Reference:
    """An MLPerf reference convergence point: mean samples to the target, and its rate and warm-up (epochs)."""

    batch: int
    samples: float
    learning_rate: float
    warmup_epochs: int


REFERENCES = (
    Reference(28, 345_167, 2.0, 1000),
    Reference(56, 357_404, 2.0, 1000),
    Reference(84, 2480 * TRAINING_CASES, 1.5, 1500),
)
# Batches that divide the 168 training cases, so that no epoch drops a case. 168 is beyond all reference points.
BATCHES = (28, 56, 84, 168)


@dataclass(frozen=True)
class Device:
    """A GPU, by its measured rates: training with `batch` samples per GPU, and evaluation windows/s."""

    name: str
    samples_per_s: float
    batch: int
    windows_per_s: float

    @property
    def sample_s(self) -> float:
        """Time per sample on top of the step's floor."""
        return 1 / self.samples_per_s - STEP_FLOOR_S / self.batch


@dataclass(frozen=True)
class Links:
    """The speed of gradient communication.

    Attributes:
        within_node: bytes/s that a GPU sends within its node (NVLink: 450e9 nominal, four fifths reached).
        between_nodes: bytes/s that a node sends to others (8 x 200 Gb/s nominal; today's nodes have twice that).
        overlap: share of the all-reduce hidden behind the backward pass.
    """

    within_node: float = 360e9
    between_nodes: float = 200e9
    overlap: float = 0.8

    def exchange_s(self, ranks_per_sample: int) -> float:
        """The transfer of planes between GPUs that share a sample, all in one node; a layer waits for its own."""
        return HALO_BYTES / self.within_node if ranks_per_sample > 1 else 0.0

    def all_reduce_s(self, gpus: int) -> float:
        """A ring within each node, then one across nodes: each moves 2 (n - 1) / n of the gradients."""
        within, nodes = min(gpus, GPUS_PER_NODE), -(-gpus // GPUS_PER_NODE)
        return GRADIENT_BYTES * (
            2 * (within - 1) / within / self.within_node + 2 * (nodes - 1) / nodes / self.between_nodes
        )


@dataclass(frozen=True)
class Layout:
    """How the GPUs share the work.

    Attributes:
        batch: samples per step, over all GPUs.
        training: number of GPUs that train.
        evaluating: number of further GPUs that evaluate meanwhile; 0: training pauses for evaluation.
    """

    batch: int
    training: int
    evaluating: int = 0

    @property
    def samples_per_gpu(self) -> float:
        """Below 1 if several GPUs share a sample."""
        return self.batch / self.training

    @property
    def ranks_per_sample(self) -> int:
        return max(1, self.training // self.batch)


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The result of a layout, in seconds, except for `evaluations`, their number.

    Attributes:
        exposed: the part of a step that waits for the all-reduce.
        exchange: the part of a step in which planes are sent between GPUs that share a sample.
        evaluation: duration of one; `share` is its share of the time once evaluations run.
    """

    step: float
    exposed: float
    exchange: float
    evaluation: float
    share: float
    evaluations: float
    total: float


def samples_to_converge(batch: int) -> float:
    """Mean samples to the target: the reference points, linearly interpolated.

    Below the first point, its own figure. Beyond the last one the line is extrapolated, an assumption that no published
    run supports: the largest runs kept to batch 84.
    """
    if batch <= REFERENCES[0].batch:
        return REFERENCES[0].samples
    pairs = list(itertools.pairwise(REFERENCES))
    a, b = next(((a, b) for a, b in pairs if batch <= b.batch), pairs[-1])
    return a.samples + (b.samples - a.samples) * (batch - a.batch) / (b.batch - a.batch)


def nearest_reference(batch: int) -> Reference:
    """The reference point whose learning rate and warm-up are a starting point."""
    return min(REFERENCES, key=lambda reference: abs(reference.batch - batch))


def forecast(device: Device, layout: Layout, links: Links) -> Forecast:
    """Time to target of one run."""
    samples = samples_to_converge(layout.batch)
    exposed = (1 - links.overlap) * links.all_reduce_s(layout.training)
    exchange = links.exchange_s(layout.ranks_per_sample)
    step = STEP_FLOOR_S + layout.samples_per_gpu * device.sample_s + exposed + exchange
    evaluation = evaluation_s(device, layout.evaluating or layout.training)
    # A mean over runs, so not a whole number; the last evaluation reaches the target.
    evaluations = 1 + (samples / TRAINING_CASES - FIRST_EVALUATION) / EVALUATION_INTERVAL
    interval = EVALUATION_INTERVAL * TRAINING_CASES / layout.batch * step
    # With GPUs that only evaluate, training waits only if an evaluation takes longer than the epochs between two.
    pause = max(0.0, evaluation - interval) if layout.evaluating else evaluation
    total = samples / layout.batch * step + (evaluations - 1) * pause + evaluation
    return Forecast(
        step=step,
        exposed=exposed,
        exchange=exchange,
        evaluation=evaluation,
        share=pause / (pause + interval),
        evaluations=evaluations,
        total=total,
    )


def evaluation_s(device: Device, ranks: int) -> float:
    """Duration of one evaluation: that of the busiest rank's windows."""
    return _busiest_rank(ranks) / device.windows_per_s


@cache
def _busiest_rank(ranks: int) -> int:
    return busiest(window_counts(), ranks)


def layouts(gpus: int, beyond_main: bool = False) -> Iterator[Layout]:
    """Every way to use at most `gpus` GPUs with samples spread evenly and equally many GPUs on each node.

    Args:
        beyond_main: include 8 GPUs per sample, which `main.py` does not do, and GPUs that only evaluate.
    """
    for batch in BATCHES:
        members = (*RANKS_PER_SAMPLE, MAX_GPUS_PER_SAMPLE) if beyond_main else RANKS_PER_SAMPLE
        shared = [batch * ranks for ranks in members]
        for training in [ranks for ranks in range(1, batch + 1) if batch % ranks == 0] + shared:
            if training <= gpus and nodes_for(training, gpus) and batch / training <= MAX_SAMPLES_PER_GPU:
                yield Layout(batch, training)
                if beyond_main and training < gpus:
                    yield Layout(batch, training, gpus - training)


def nodes_for(ranks: int, gpus: int) -> int:
    """The smallest number of nodes with equally many of the ranks on each; 0 if `gpus` GPUs allow none."""
    for nodes in range(1, max(gpus // GPUS_PER_NODE, 1) + 1):
        if ranks % nodes == 0 and ranks // nodes <= GPUS_PER_NODE:
            return nodes
    return 0


def best(device: Device, gpus: int, links: Links, beyond_main: bool = False) -> tuple[Layout, Forecast]:
    """The layout that reaches the target first; of equals, the one with the fewest GPUs."""
    pairs = [(layout, forecast(device, layout, links)) for layout in layouts(gpus, beyond_main)]
    return min(pairs, key=lambda pair: (pair[1].total, pair[0].training + pair[0].evaluating))


def launch(layout: Layout, gpus: int) -> str:
    """The command that runs a layout that `main.py` supports."""
    nodes = nodes_for(layout.training, gpus)
    reference = nearest_reference(layout.batch)
    groups = layout.training // layout.ranks_per_sample
    sharing = f"--ranks_per_sample {layout.ranks_per_sample} " if layout.ranks_per_sample > 1 else ""
    where = f"--nnodes {nodes} --rdzv_backend c10d --rdzv_endpoint HOST:29500 " if nodes > 1 else ""
    return (
        f"torchrun {where}--nproc_per_node {layout.training // nodes} main.py @recipes/kits19_8xgpu.args "
        f"{sharing}--batch_size {layout.batch // groups} --ga_steps 1 --learning_rate {reference.learning_rate:g} "
        f"--lr_warmup_epochs {reference.warmup_epochs} --data_dir DATA --log_dir LOGS"
    )


@dataclass(frozen=True)
class Published:
    """A published run and its time to target."""

    name: str
    device: Device
    layout: Layout
    minutes: float


def _published(name: str, samples_per_s: float, evaluation_s: float, minutes: float) -> Published:
    """A run of 8 devices at batch 56. Its windows/s follow from its evaluation's duration."""
    device = Device(name, samples_per_s, 7, _busiest_rank(8) / evaluation_s)
    return Published(name, device, Layout(56, 8), minutes)


PUBLISHED = (
    _published("8 x H200, NVIDIA (MXNet), v4.0", 76.05, 1.67, 11.5),
    _published("8 x H100, NVIDIA (MXNet), v4.0", 72.2, 1.80, 12.1),
    _published("8 x A100, NVIDIA (MXNet), v2.0", 36.4, 3.27, 23.8),
    _published("8 x Gaudi2, Habana (PyTorch), v3.0", 40.5, 4.35, 20.5),
)
H200, H100 = (run.device for run in PUBLISHED[:2])
# Not a check: STEP_FLOOR_S is taken from it. 8 GPUs per sample make its batch 84.
LARGEST = Published("768 x H100, of which 96 evaluate", H100, Layout(84, 672, 96), 0.773)


def evaluation_share_of_work() -> float:
    """Evaluation's share of the operations, once it runs."""
    evaluation = sum(window_counts()) * FORWARD_TFLOP
    return evaluation / (evaluation + EVALUATION_INTERVAL * TRAINING_CASES * TRAINING_TFLOP)
