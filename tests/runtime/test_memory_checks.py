"""The checks of memory: what fits passes, what does not fails with the flag and the largest value that does."""

from __future__ import annotations

import gc
import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from common.memory import free_memory_bytes
from data_loading.data_loader import EvaluationCase
from data_loading.spec import KITS19
from model.losses import DiceCELoss
from runtime.arguments import RunConfig, parse_arguments
from runtime.build import make_sliding_window_config
from runtime.check_table import Check
from runtime.demand import Demand, NetworkMemory
from runtime.distributed.world import World
from runtime.evaluation import CaseScorer, SlidingWindowConfig
from runtime.memory import BatchMemory, state_bytes, step_memory, window_memory
from runtime.memory_checks import (
    Machine,
    case_memory,
    check_evaluation,
    check_host,
    check_training,
    fitting_loader,
    free_bytes,
)
from runtime.memory_format import to_device
from runtime.network import make_network
from runtime.optimizer import make_optimizer
from runtime.precision import Precision
from runtime.train_state import TrainState
from runtime.training import StepConfig

CPU = torch.device("cpu")
GIB = 2**30
NOTHING = BatchMemory(((0, 0),))
SCORING = SlidingWindowConfig(
    window=(16, 16, 16), overlap=0.5, batch_size=2, classes=3, padding_value=None, crops_remainder=False
)
SAMPLE = 5 * 10 * 10 * 10
# A step: 1000 bytes for the optimizer, 100 once, 9000 per sample.
DEMAND = Demand(
    data_dir=None,
    training=[],
    evaluation=[],
    loader="device",
    workers=3,
    batch_size=4,
    patch=(10, 10, 10),
    channels=1,
    scoring=SCORING,
    network=NetworkMemory(step=BatchMemory(((100, 9000),)), windows=BatchMemory(((50, 20_000),)), state_bytes=1000),
    batches=100,
    prewarms=True,
    checkpoint_dir=None,
    checkpoints=1,
    checkpoint_bytes=0,
)
STEP = 1000 + 100 + 4 * 9000


def gpu(device: int, host: int = 10**9, ranks: int = 1) -> Machine:
    return Machine(is_gpu=True, device=device, host=host, ranks=ranks)


def host(free: int, ranks: int = 1) -> Machine:
    return Machine(is_gpu=False, device=free, host=free, ranks=ranks)


def verdict(check: Check) -> tuple[str, str]:
    return check.verdict, check.remedy


# A training step.


def test_a_step_fails_only_above_what_is_free_and_warns_where_it_is_tight() -> None:
    assert verdict(check_training(DEMAND, "device", 0, gpu(math.ceil(STEP / 0.9)))) == ("ok", "")
    check = check_training(DEMAND, "device", 0, gpu(STEP))
    assert check.verdict == "warn"
    assert check.remedy.endswith("; --batch_size 3 leaves room for them")
    assert check.found.endswith("; 36 KiB are free; up to 4 fit")
    check = check_training(DEMAND, "device", 0, gpu(STEP - 1))
    assert verdict(check) == ("fail", "use --batch_size 3 or less, with more --ga_steps for the same global batch")
    assert check.found == "a training step of 4 sample(s) takes 36 KiB on the device; 36 KiB are free"
    assert "not even --batch_size 1 fits" in check_training(DEMAND, "device", 0, gpu(10_000)).remedy


def test_volumes_on_the_device_are_there_during_a_step() -> None:
    check = check_training(DEMAND, "device", 5000, gpu(STEP + 4999))
    assert check.verdict == "fail"
    assert "(5 KiB of training volumes included)" in check.found
    assert check_training(DEMAND, "device", 5000, gpu(STEP + 5000)).verdict == "warn"
    check = check_training(DEMAND, "pytorch", 5000, gpu(STEP))
    assert check.verdict == "warn"
    assert "volumes do not fit and are read from the disk" in check.found


def test_on_a_cpu_ranks_and_loaders_share_its_memory() -> None:
    def least(loader: str, ranks: int = 1, **changed: Any) -> int:
        """The least free memory with which the check passes."""
        demand = replace(DEMAND, **changed)

        low, high = STEP, 10**7
        while low < high:
            middle = (low + high) // 2
            failed = check_training(demand, loader, 0, host(middle, ranks)).verdict == "fail"
            low, high = (middle + 1, high) if failed else (low, middle)
        return low

    assert least("device") == STEP
    assert least("device", ranks=3) == 3 * STEP
    assert least("synthetic") == STEP + 32 * SAMPLE
    assert least("pytorch") == STEP + 2 * 3 * 4 * SAMPLE  # 3 workers with 2 batches of 4
    assert least("pytorch", batches=2) == STEP + 2 * 4 * SAMPLE
    assert least("pytorch", workers=0) == STEP
    assert "each of 3 ranks" in check_training(DEMAND, "device", 0, host(10**9, 3)).found


def test_a_network_without_an_estimate_is_checked_for_its_batch() -> None:
    network = replace(DEMAND.network, step=BatchMemory(((0, SAMPLE),), "it reads a value"))
    check = check_training(replace(DEMAND, network=network), "device", 0, gpu(10**6))
    assert (check.verdict, check.found.endswith(" on the device (it reads a value); 977 KiB are free")) == ("ok", True)
    check = check_training(replace(DEMAND, network=network, batch_size=10_000), "device", 0, gpu(10**6))
    assert verdict(check)[1].startswith(f"use --batch_size {(10**6 - 1000) // SAMPLE} or less")


# Before a GPU: the host.


def test_batches_must_fit_on_the_host_before_they_reach_a_gpu() -> None:
    dummy = 4 * SAMPLE + 2 * 5 * 16**3
    assert check_host(DEMAND, "device", gpu(10**9, host=2 * dummy, ranks=2)).verdict == "warn"
    check = check_host(DEMAND, "device", gpu(10**9, host=2 * dummy - 1, ranks=2))
    assert verdict(check)[1].startswith("use --batch_size 3 or less")
    # Six that wait, one that is copied, the present one.
    waiting = 4 * SAMPLE * (2 * 3 + 2)
    assert check_host(DEMAND, "pytorch", gpu(10**9, host=waiting)).verdict == "warn"
    assert check_host(DEMAND, "pytorch", gpu(10**9, host=waiting - 1)).verdict == "fail"


def test_volumes_may_take_half_of_what_the_steps_on_dummy_data_leave() -> None:
    step = DEMAND.network.step.peak(4)
    assert fitting_loader(DEMAND, 1000, gpu(step + 2000)) == "device"
    assert fitting_loader(DEMAND, 1001, gpu(step + 2000)) == "pytorch"
    assert fitting_loader(replace(DEMAND, prewarms=False), 1001, gpu(step + 2000)) == "device"
    assert fitting_loader(DEMAND, 1001, host(step + 2000)) == "device"


# An evaluation.


def test_the_largest_case_must_fit() -> None:
    shapes = [(8, 8, 8), (40, 20, 30), (20, 20, 20)]
    _, large, middle = (
        case_memory(shape, 1, SCORING, DEMAND.network.windows).plus(1000 + 70).peak(2) for shape in shapes
    )
    assert check_evaluation(DEMAND, shapes, 70, gpu(2 * large)).verdict == "ok"
    check = check_evaluation(DEMAND, shapes, 70, gpu(large - 1))
    assert (check.verdict, "(40, 20, 30), with 2 window(s) at once" in check.found) == ("fail", True)
    both = large + middle
    assert check_evaluation(DEMAND, shapes, 70, host(both, ranks=2)).verdict == "ok"
    check = check_evaluation(DEMAND, shapes, 70, host(both - 1, ranks=2))
    assert (check.verdict, "fewer ranks" in check.remedy) == ("warn", True)
    assert check_evaluation(DEMAND, shapes[1:2], 70, host(2 * large - 1, ranks=2)).verdict == "ok", "one rank is idle"


def test_too_many_windows_fail_with_the_number_that_fits() -> None:
    scoring = replace(SCORING, batch_size=1000)
    many = replace(DEMAND, scoring=scoring)
    check = check_evaluation(many, [], 0, gpu(1000 + 50 + 7 * 20_000))
    assert verdict(check) == ("fail", "use --val_batch_size 7 or less")
    assert check.found.startswith("a batch of 1000 window(s) takes 19 MiB on the device")
    assert verdict(check_evaluation(many, [], 0, host(2 * (1000 + 50 + 7 * 20_000), ranks=2))) == verdict(check)
    unknown = replace(many, network=replace(many.network, windows=BatchMemory(((0, 1),), "it reads a value")))
    for shapes in ([], [(8, 8, 8)]):
        found = check_evaluation(unknown, shapes, 0, gpu(10**8)).found
        assert "on the device (it reads a value); 95 MiB are free" in found
        assert "fit" not in found, "how many fit is not known"
    fixed = case_memory((32, 32, 32), 1, scoring, BatchMemory(((0, 0),))).peak(0)
    remedy = check_evaluation(many, [(32, 32, 32)], 0, gpu(fixed + 100 * 20_000)).remedy
    fitting = int(remedy.split()[2])
    assert 100 <= fitting < 300  # beside the sums and the case, not beside the loss
    assert (
        check_evaluation(
            replace(DEMAND, scoring=replace(scoring, batch_size=fitting)), [(32, 32, 32)], 0, gpu(fixed + 100 * 20_000)
        ).verdict
        == "warn"
    )


class _Copies(nn.Module):
    """Logits that cost nothing: the image's first channel for every class."""

    def forward(self, windows: Tensor) -> Tensor:
        return windows[:, :1].expand(-1, 3, -1, -1, -1)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize(
    ("shape", "padding_value", "crops"),
    [((34, 43, 46), -2.2, True), ((34, 43, 46), -2.2, False), ((34, 43, 46), None, False), ((9, 43, 46), None, False)],
)
def test_what_a_case_takes_is_what_torch_holds_at_once(
    fp32: Precision, world: World, shape: tuple[int, int, int], padding_value: float | None, crops: bool, channels: int
) -> None:
    scoring = replace(SCORING, batch_size=1, padding_value=padding_value, crops_remainder=crops)
    gc.collect()  # what the profiler sees given back must have been taken under its eyes
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as watched:
        image, label = torch.zeros(1, channels, *shape), torch.zeros(1, 1, *shape, dtype=torch.uint8)
        cases = [EvaluationCase("a", image, label)]
        scorer = CaseScorer(network=_Copies(), loss=DiceCELoss(), windows=scoring, precision=fp32)
        list(scorer.score(cases, world))
    events = watched.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    peak = max(itertools.accumulate(changes))
    # The windows in the network are not counted.
    assert 0.96 * peak < case_memory(shape, channels, scoring, NOTHING).peak(1) < 1.01 * peak


def test_a_cpus_free_memory_is_the_machines() -> None:
    assert abs(free_bytes(CPU) - free_memory_bytes()) < GIB


# The recipe of one GPU.


def order_of_cudnn(x: torch.Tensor, weight: torch.Tensor, backend: object) -> torch.memory_format:
    """Returns the memory order of a convolution's output on a GPU; on a CPU, in 16 bit, it depends on the CPU."""
    is_last = any(t.is_contiguous(memory_format=torch.channels_last_3d) for t in (x, weight))
    return torch.channels_last_3d if is_last else torch.contiguous_format


@pytest.fixture(scope="module")
def recipe() -> tuple[RunConfig, NetworkMemory]:
    """The recipe's flags and its network's memory on a GPU with Triton, estimated on this CPU."""
    path = Path(__file__).resolve().parents[2] / "recipes" / "kits19_1xgpu.args"
    config, _ = parse_arguments([f"@{path}", "--data_dir", "DATA"])
    network = to_device(make_network(config, KITS19), CPU, config.layout)
    optimizer = make_optimizer(config.optimizer, network.parameters(), config.learning_rate)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = TrainState(network=network, model=network, optimizer=optimizer, scaler=scaler)
    precision = Precision(CPU, torch.bfloat16)
    step = StepConfig(loss=DiceCELoss(), precision=precision, ga_steps=config.ga_steps, layout=config.layout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._C, "_conv_determine_backend_memory_format", order_of_cudnn)
        in_step = step_memory(state, step, (1, *config.input_shape), as_triton=True)
        in_windows = window_memory(network, precision, (1, *config.val_input_shape), as_triton=True)
    assert not in_step.unknown
    assert not in_windows.unknown
    return config, NetworkMemory(step=in_step, windows=in_windows, state_bytes=state_bytes(network, optimizer, 1))


# KiTS19's 168 training volumes in 16 bit, and a case that is larger than any of its.
TRAINING_VOLUMES = int(14.5e9)
LARGEST_CASE = (600, 512, 512)


def fly(recipe: tuple[RunConfig, NetworkMemory], machine: Machine, **changed: Any) -> tuple[str, list[Check]]:
    config, network = recipe
    demand = replace(
        DEMAND,
        network=network,
        batch_size=config.batch_size,
        workers=config.num_workers,
        patch=config.input_shape,
        scoring=make_sliding_window_config(config, KITS19),
        batches=6,
    )
    demand = replace(demand, **changed)
    loader = fitting_loader(demand, TRAINING_VOLUMES, machine)
    volumes = TRAINING_VOLUMES if loader == "device" else 0
    checks = [check_training(demand, loader, TRAINING_VOLUMES, machine), check_host(demand, loader, machine)]
    return loader, [*checks, check_evaluation(demand, [LARGEST_CASE], volumes, machine)]


def test_a_step_of_the_recipe_takes_what_was_measured(recipe: tuple[RunConfig, NetworkMemory]) -> None:
    """`torch.cuda.max_memory_allocated` on an H100 with torch 2.11, less the weights and the moments; in bytes."""
    _, network = recipe
    for samples, measured in ((1, 2_135_482_880), (4, 8_343_407_104), (28, 58_006_370_816)):
        assert network.step.peak(samples) == pytest.approx(measured, rel=0.01)
    for windows, measured in ((1, 768_934_400), (8, 6_144_133_120)):
        assert network.windows.peak(windows) == pytest.approx(measured, rel=0.02)


def test_the_recipe_fits_141_gb_and_all_but_the_volumes_80(recipe: tuple[RunConfig, NetworkMemory]) -> None:
    small, large = gpu(int(84.46e9), host=100 * GIB), gpu(int(150e9), host=100 * GIB)  # free on an H100 and an H200
    loader, checks = fly(recipe, large)
    assert (loader, {check.verdict for check in checks}) == ("device", {"ok"})
    loader, checks = fly(recipe, small)
    assert (loader, {check.verdict for check in checks}) == ("pytorch", {"ok"})
    loader, checks = fly(recipe, small, batch_size=14, batches=12)
    assert (loader, {check.verdict for check in checks}) == ("device", {"ok"})
    _, checks = fly(recipe, gpu(int(42e9), host=100 * GIB))
    assert checks[0].verdict == "fail"
    assert "use --batch_size 20 or less" in checks[0].remedy
