"""What must be right on a GPU before a figure counts: operators, syncs, traces, data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from benchmarks.data import write_patients
from benchmarks.evaluate import scoring
from benchmarks.harness import Options, Table
from benchmarks.step import CHANNELS, CLASSES, LEARNING_RATE, Scale, StepVariant, make_state, make_step
from data_loading.base_loader import Batch, LoaderConfig, TrainingLoader
from data_loading.data_loader import EvaluationCase, make_training_loader
from data_loading.spec import KITS19
from data_loading.transforms import MLPerfAugmentation, draw_augmentation
from model.losses import DiceCELoss
from model.unet3d import MLPERF_FILTERS
from runtime.convolution_probe import exact_fp32, relative_error
from runtime.distributed.step_sync import StepSync
from runtime.distributed.world import World
from runtime.evaluation import CaseScorer
from runtime.precision import Precision
from runtime.training import StepConfig, forward_backward, optimizer_step
from runtime.warmup import dummy_batch, synchronize

COLUMNS = ["what", "largest relative error", "limit", "verdict"]
# Sums of fp32 numbers in another order.
FP32_LIMIT = 2e-5
TRACE_STEPS = 6


def limit_of(dtype: torch.dtype) -> float:
    """Two implementations may round a 16-bit result differently: by one unit in the last place."""
    return FP32_LIMIT if dtype == torch.float32 else torch.finfo(dtype).eps


def verdict(error: float, limit: float) -> str:
    return "ok" if error <= limit else "WRONG"


def checked(title: str, rows: list[list[object]], notes: list[str], columns: list[str] = COLUMNS) -> Table:
    """A table whose rows end in a verdict; `problem` names the rows that are wrong."""
    wrong = [str(row[0]) for row in rows if row[-1] != "ok"]
    return Table(title, columns, rows, notes, problem=f"{title}: wrong: {', '.join(wrong)}" if wrong else "")


def normal(*shape: int, device: torch.device, seed: int = 0) -> Tensor:
    return torch.randn(shape, device=device, generator=torch.Generator(device).manual_seed(seed))


@contextmanager
def syncs_forbidden() -> Iterator[None]:
    """Every call that makes the host wait for the GPU raises RuntimeError inside the block."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def host_syncs(options: Options) -> Table:
    """Runs what happens in a step and in an evaluation with every wait for the GPU forbidden."""
    device = options.device
    filters, side = ((8, 16), 16) if options.quick else (MLPERF_FILTERS, 64)
    batch = dummy_batch((2, CHANNELS, side, side, side), CLASSES, device)
    rows: list[list[object]] = []
    for dtype in (torch.bfloat16, torch.float16):
        work = partial(train_steps, Precision(device, dtype), filters, batch)
        rows.append([f"training step, {str(dtype).removeprefix('torch.')}", *forbidden(work(), device)])
    rows.append(["samples of the device loader", *forbidden(draw_samples(options), device)])
    rows.append(["evaluation of a case", *forbidden(score_case(device, filters, side), device)])
    return checked("Host syncs in a step", rows, ["torch.cuda.set_sync_debug_mode('error')."], ["what", "verdict"])


def forbidden(work: Callable[[], object], device: torch.device) -> list[str]:
    """["ok"], or the first error of `work` with syncs forbidden; it has run twice before."""
    for _ in range(2):
        work()
    synchronize(device)
    try:
        with syncs_forbidden():
            work()
    except RuntimeError as error:
        return [str(error).splitlines()[0]]
    return ["ok"]


def train_steps(precision: Precision, filters: tuple[int, ...], batch: Batch) -> Callable[[], object]:
    """A function that runs one step as the training loop does."""
    state = make_state(StepVariant(), precision, filters)
    config = StepConfig(loss=DiceCELoss(), precision=precision, ga_steps=1, layout="NDHWC")
    sync = StepSync(World(0, 1, precision.device))

    def step() -> None:
        loss = forward_backward(state, batch, config, communicate=True)
        norm = optimizer_step(state)
        scale = torch.ones((), device=precision.device) if precision.dtype is torch.float16 else None
        list(sync.submit(epoch=1, batch=0, loss=loss, gradient_norm=norm, loss_scale=scale))

    return step


def draw_samples(options: Options) -> Callable[[], object]:
    loader, epochs = make_loader("device", options), iter(range(1, 100))
    return lambda: list(loader.epoch(next(epochs)))


def score_case(device: torch.device, filters: tuple[int, ...], side: int) -> Callable[[], object]:
    """A function that scores one case of several windows; its result stays on the device."""
    precision = Precision(device, torch.bfloat16)
    network = make_state(StepVariant(), precision, filters).network.eval()
    scorer = CaseScorer(network=network, loss=DiceCELoss(), windows=scoring((side, side, side), 4), precision=precision)
    batch = dummy_batch((1, CHANNELS, 2 * side, side, 2 * side), CLASSES, device)
    case = EvaluationCase("case", batch["image"], batch["label"])
    return lambda: list(scorer.score([case], World(0, 1, device)))


def trace(options: Options) -> Table:
    """The losses of the first steps on the device and on the CPU, in fp32 without TF32."""
    scale = Scale((8, 16, 32), (32, 32, 32), 2, 1)
    with exact_fp32():
        here, there = (
            make_step(StepVariant(amp=False), device, scale, scale.batch_size)
            for device in (options.device, torch.device("cpu"))
        )
        pairs = [(here().item(), there().item()) for _ in range(TRACE_STEPS)]
    rows: list[list[object]] = []
    for number, (loss, right) in enumerate(pairs, start=1):
        error = abs(loss - right) / right
        rows.append([f"step {number}: {loss:.7f}, on the CPU {right:.7f}", error, 1e-4, verdict(error, 1e-4)])
    notes = [f"unet3d with filters {scale.filters}, fp32, SGD at {LEARNING_RATE:g}."]
    return checked("Six steps against the CPU", rows, notes)


def draw_noiseless(rng: np.random.Generator) -> MLPerfAugmentation:
    """The benchmark's augmentation without noise, whose values depend on the device's generator."""
    return replace(draw_augmentation(rng), noise_std=0.0)


def make_loader(name: str, options: Options) -> TrainingLoader:
    """A loader of two synthetic patients on the suite's device."""
    folder = options.work_dir / "patients"
    side = 24 if options.quick else 96
    shape = (side + 8, side + 40, side + 20)
    if not folder.exists():
        write_patients(folder, 2, shape)
    config = LoaderConfig(
        patch=(side, side, side),
        oversampling=0.4,
        batch_size=2,
        num_workers=0,
        rank=0,
        ranks=1,
        order_seed=1,
        sample_seed=2,
        device=options.device,
        augment=draw_noiseless,
    )
    cases = ["case_00000", "case_00001"]
    return make_training_loader(name, folder, cases=cases, spec=KITS19, config=config)


def device_loader(options: Options) -> Table:
    """The samples of the device loader compared with those that the pytorch loader reads from disk."""
    here, there = (make_loader(name, options) for name in ("device", "pytorch"))
    image = label = 0.0
    for epoch in range(1, 6):
        for found, right in zip(here.epoch(epoch), there.epoch(epoch), strict=True):
            image = max(image, relative_error(found["image"].cpu(), right["image"]))
            label = max(label, float((found["label"].cpu() != right["label"]).sum()))
    rows: list[list[object]] = [
        ["images", image, 1e-3, verdict(image, 1e-3)],
        ["labels: voxels that differ", label, 0, verdict(label, 0)],
    ]
    return checked("Device loader", rows, ["10 samples; images are kept in fp16."])
