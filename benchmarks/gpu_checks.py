"""What must be right on a GPU before a figure counts: operators, syncs, traces, data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import ModuleType

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
from model import losses, normalization
from model.losses import DiceCELoss, DiceSums
from model.normalization import NormState
from model.unet3d import MLPERF_FILTERS
from runtime.distributed.step_sync import StepSync
from runtime.distributed.world import World
from runtime.evaluation import CaseScorer
from runtime.precision import Precision
from runtime.training import StepConfig, forward_backward, optimizer_step
from runtime.warmup import dummy_batch, synchronize

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Every width of the benchmark's network, one channel, and widths that are no power of two.
WIDTHS = (1, 3, 20, *sorted(set(MLPERF_FILTERS)))
CLASS_COUNTS = (2, 3, 20)
EPS = 1e-5
COLUMNS = ["what", "largest relative error", "limit", "verdict"]
# Sums of fp32 numbers in another order.
FP32_LIMIT = 2e-5
# More elements than a 32-bit index reaches: several samples, and one sample.
LARGE_SHAPES = ((33, 32, 128, 128, 128), (1, 32, 512, 512, 257))
TRACE_STEPS = 6


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected value; infinite if a value is not finite."""
    if not found.isfinite().all():
        return float("inf")
    scale = expected.float().abs().max().clamp(min=1e-30)
    return float((found.float() - expected.float()).abs().max() / scale)


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


def triton_operators(options: Options) -> Table:
    """Triton's operators compared with the plain ones, for every number of channels and number format."""
    from model.kernels import triton as kernels

    rows: list[list[object]] = []
    for dtype in DTYPES:
        errors = {"norm forward": 0.0, "norm backward": 0.0, "loss forward": 0.0, "loss backward": 0.0}
        for width in WIDTHS:
            side = 32 if width <= 64 else 8
            x = (1 + normal(2, width, side, side, side + 3, device=options.device)).to(dtype)
            x = x.contiguous(memory_format=torch.channels_last_3d)
            forward, backward = norm_errors(kernels, x)
            errors["norm forward"] = max(errors["norm forward"], forward)
            errors["norm backward"] = max(errors["norm backward"], backward)
        for classes in CLASS_COUNTS:
            for layout in (torch.contiguous_format, torch.channels_last_3d):
                logits = (5 * normal(2, classes, 33, 32, 31, device=options.device)).to(dtype)
                forward, backward = loss_errors(kernels, logits.contiguous(memory_format=layout))
                errors["loss forward"] = max(errors["loss forward"], forward)
                errors["loss backward"] = max(errors["loss backward"], backward)
        for name, error in errors.items():
            limit = FP32_LIMIT if name == "loss forward" else limit_of(dtype)
            rows.append([f"{name}, {str(dtype).removeprefix('torch.')}", error, limit, verdict(error, limit)])
    notes = [
        f"Against PyTorch's operators on the same tensors; {WIDTHS} channels, {CLASS_COUNTS} classes. The error is the "
        "largest difference relative to the largest value."
    ]
    return checked("Triton operators", rows, notes)


def norm_errors(kernels: ModuleType, x: Tensor) -> tuple[float, float]:
    """The errors of norm and activation forward and backward, for x (N, C, D, H, W) channels-last."""
    weight, bias = (normal(x.shape[1], device=x.device, seed=seed) for seed in (1, 2))
    grad = normal(*x.shape, device=x.device, seed=3).to(x.dtype).contiguous(memory_format=torch.channels_last_3d)
    results = []
    for module in (kernels, normalization):
        y, mean, inverse_std = module.norm_forward(x, weight, bias, eps=EPS, slope=0.0)
        state = NormState(x, y, weight=weight, bias=bias, mean=mean, inverse_std=inverse_std)
        gradients = module.norm_backward(grad, state, 0.0)
        results.append(((y, mean, inverse_std), gradients))
    return largest_errors(results)


def loss_errors(kernels: ModuleType, logits: Tensor) -> tuple[float, float]:
    """The errors of the loss's sums and of their gradient, for logits (N, K, D, H, W)."""
    n, classes = logits.shape[:2]
    generator = torch.Generator(logits.device).manual_seed(4)
    labels = torch.randint(
        classes, (n, 1, *logits.shape[2:]), device=logits.device, generator=generator, dtype=torch.uint8
    )
    of_sample, of_class = (normal(*shape, device=logits.device, seed=5) for shape in ((n,), (n, classes)))
    results = []
    for module in (kernels, losses):
        sums = module.sums_forward(logits, labels)
        gradient = module.sums_backward(logits, labels, DiceSums(of_sample, of_class, -of_class, sums[3]))
        results.append((sums, (gradient,)))
    return largest_errors(results)


def largest_errors(results: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> tuple[float, float]:
    """The largest errors of what the first of two implementations returned forward and backward."""
    forward, backward = (max(map(relative_error, *pair)) for pair in zip(*results, strict=True))
    return forward, backward


def large_tensors(options: Options) -> Table:
    """Triton's operators on tensors with more than 2^31 elements, compared on their last voxels."""
    from model.kernels import triton as kernels

    rows: list[list[object]] = []
    for shape in LARGE_SHAPES:
        x = torch.empty(shape, device=options.device, dtype=torch.bfloat16, memory_format=torch.channels_last_3d)
        x.normal_(generator=torch.Generator(options.device).manual_seed(0))
        weight, bias = (normal(shape[1], device=options.device, seed=seed) for seed in (1, 2))
        y, mean, inverse_std = kernels.norm_forward(x, weight, bias, eps=EPS, slope=0.0)
        dx, _, _ = kernels.norm_backward(
            x, NormState(x, y, weight=weight, bias=bias, mean=mean, inverse_std=inverse_std), 0.0
        )
        # The plain operators on the last sample, which lies beyond 2^31 elements, or beyond them within one sample.
        last = x[-1:].contiguous(memory_format=torch.channels_last_3d)
        right, right_mean, right_std = normalization.norm_forward(last, weight, bias, eps=EPS, slope=0.0)
        error = max(relative_error(y[-1:], right), relative_error(mean[-1:], right_mean))
        state = NormState(last, right, weight=weight, bias=bias, mean=right_mean, inverse_std=right_std)
        error_back = relative_error(dx[-1:], normalization.norm_backward(last, state, 0.0)[0])
        name = " x ".join(map(str, shape))
        limit = limit_of(x.dtype)
        rows += [
            [f"norm forward, {name}", error, limit, verdict(error, limit)],
            [f"norm backward, {name}", error_back, limit, verdict(error_back, limit)],
        ]
        del x, y, dx, last, right, state
        torch.cuda.empty_cache()
    return checked("Large tensors", rows, ["bfloat16, channels-last; compared on the last sample."])


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


@contextmanager
def exact_fp32() -> Iterator[None]:
    """Computes fp32 products in fp32 inside the block, not in TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # that of matrix products is off unless asked for
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


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
