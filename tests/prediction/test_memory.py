"""Memory of a prediction: estimates, and plans for less than it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.errors import UserError
from data_loading.io.volume import Geometry
from data_loading.preprocessing import GridTransform
from data_loading.source_grid import SourceGrid
from data_loading.spec import DatasetSpec
from prediction.ensemble import Ensemble, Member, mean_probabilities, predict_image
from prediction.memory import GIB, MemoryBudget, MemoryEstimate, MemoryPlan, memory_plans, window_bytes
from runtime.evaluation import SlidingWindowConfig
from runtime.memory import LiveMemory

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ESTIMATE = MemoryEstimate(volume=10 * GIB, window=3 * GIB, host=2 * GIB)


@dataclass(frozen=True)
class FixedBudget(MemoryBudget):
    """A budget in GiB."""

    host_gb: float = 0
    gpu_gb: float = 0

    def host_bytes(self) -> int:
        return int(self.host_gb * GIB)

    def gpu_bytes(self) -> int:
        return int(self.gpu_gb * GIB)


def plans(host_gb: float, gpu_gb: float = 0, device: torch.device = GPU) -> Iterator[MemoryPlan]:
    budget = FixedBudget(max_gb=None, device=device, host_gb=host_gb, gpu_gb=gpu_gb)
    return memory_plans(ESTIMATE, budget, 4, "scan")


def test_if_it_fits_everything_is_on_the_gpu() -> None:
    assert next(plans(99, 40)) == MemoryPlan(volume_device=GPU, network_device=GPU, batch_size=4, note="")
    assert next(plans(99, 17)).batch_size == 2


def test_if_the_volume_does_not_fit_only_windows_are_on_the_gpu() -> None:
    plan = next(plans(20, 12))
    assert (plan.volume_device, plan.network_device, plan.batch_size) == (CPU, GPU, 4)
    assert plan.note.startswith("needs 13.00 GiB, the GPU has 12.00: its volume stays in host memory")


def test_if_no_window_fits_everything_is_on_the_cpu() -> None:
    plan = next(plans(19, 2))
    assert (plan.volume_device, plan.network_device, plan.batch_size) == (CPU, CPU, 2)
    assert plan.note == "needs 13.00 GiB, the GPU has 2.00: computed on the CPU"


def test_slower_plans_follow() -> None:
    """If the estimate was too low and the GPU runs out of memory, the next plan is tried."""
    assert [(plan.volume_device.type, plan.network_device.type) for plan in plans(99, 40)] == [
        ("cuda", "cuda"),
        ("cpu", "cuda"),
        ("cpu", "cpu"),
    ]


def test_without_a_gpu_there_is_one_plan_and_no_note() -> None:
    expected = MemoryPlan(volume_device=CPU, network_device=CPU, batch_size=4, note="")
    assert list(plans(99, device=CPU)) == [expected]


@pytest.mark.parametrize("gigabytes", [12.9, 1.5, -1])
def test_too_little_memory_is_a_one_line_error(gigabytes: float) -> None:
    with pytest.raises(UserError, match=r"scan: needs \d+\.00 GiB, but .* GiB are free"):
        list(plans(gigabytes, device=CPU))


def test_the_limit_includes_the_memory_in_use() -> None:
    assert MemoryBudget(1.0, CPU).host_bytes() < GIB
    assert MemoryBudget(0.001, CPU).host_bytes() < 0
    assert MemoryBudget(None, CPU).host_bytes() > 0


class Two(nn.Module):
    """Makes 8 channels and keeps 4."""

    def forward(self, image: Tensor) -> Tensor:
        wide = image.repeat(1, 8, 1, 1, 1)
        return wide[:, :4] + 1


class Copies(nn.Module):
    """50 classes that cost nothing: the image each time."""

    def forward(self, image: Tensor) -> Tensor:
        return image.expand(-1, 50, -1, -1, -1)


def test_a_window_takes_the_peak_of_live_tensors() -> None:
    voxel = 4 * 6 * 6 * 6
    assert window_bytes(Two(), 1, (6, 6, 6)) == pytest.approx(1.5 * (8 + 4) * voxel, rel=0.15)


def test_prediction_stays_within_its_limit(tmp_path: Path, run_python: Callable[..., Any]) -> None:
    """Peak memory of the process as counted by the kernel."""
    rng = np.random.default_rng(0)
    nib.save(nib.Nifti1Image(rng.normal(size=(110, 115, 120)).astype(np.float32), np.eye(4)), tmp_path / "scan.nii")
    program = f"""
import sys
from pathlib import Path
import torch
from data_loading.io.scan_discovery import Source
from data_loading.spec import DatasetSpec
from model.unet3d import Unet3d
from prediction.ensemble import Ensemble, Member, predict_scan
from data_loading.source_grid import SourceGrid
from data_loading.spec import DatasetSpec
from prediction.ensemble import Ensemble, Member, mean_probabilities
from prediction.memory import GIB, MemoryBudget, resident_bytes
from runtime.evaluation import SlidingWindowConfig
torch.manual_seed(0)
spec = DatasetSpec(name="own", classes=tuple("abcdefgh"), spacing_mm=(0.9, 1.1, 1.0))
windows = SlidingWindowConfig(
    window=(64, 64, 64), overlap=0.0, batch_size=64, classes=8, padding_value=spec.padding_value, crops_remainder=False,
    flips=((), (2,)),
)
network = Unet3d(1, 8, filters=(4, 8)).eval()
member = Member(network=network, windows=windows, amp=False, amp_dtype="auto", layout="NCDHW")
started = resident_bytes() / GIB
budget = MemoryBudget(started + float(sys.argv[1]), torch.device("cpu"))
ensemble = Ensemble(members=(member,), spec=spec, budget=budget)
predict_scan(Source(name="scan", output=Path("{tmp_path}/mask.nii"), file=Path("{tmp_path}/scan.nii")), ensemble, False)
peak = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")][0].split()[1]
print(int(peak) * 1024 / GIB - started)
"""
    for limit_gb in (1.0, 0.5):  # all windows at once would take more
        done = run_python("-c", program, limit_gb)
        assert done.returncode == 0, done.stderr
        assert 0.4 * limit_gb < float(done.stdout) < limit_gb
    assert "are left of --max_memory_gb" in run_python("-c", program, 0.15).stderr


@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("depth", [9, 40])
def test_the_estimate_covers_what_torch_holds_at_once(members: int, depth: int) -> None:
    """With 50 classes, and a network that costs nothing: the image, the sums of one row of windows, the slabs."""
    shape = (depth, 10, 11)
    network = Copies()
    windows = SlidingWindowConfig(
        window=(8, 8, 8), overlap=0.5, batch_size=1, classes=50, padding_value=-2.2, crops_remainder=False
    )
    member = Member(network=network, windows=windows, amp=False, amp_dtype="auto", layout="NCDHW")
    spec = DatasetSpec(name="own", classes=tuple(map(str, range(50))))
    ensemble = Ensemble(members=(member,) * members, spec=spec, budget=MemoryBudget(None, CPU))
    transform = GridTransform(
        source=Geometry(np.eye(4), shape, (1, 1, 1)), resampled_shape=shape, padding_before=(0, 0, 0), shape=shape
    )
    estimate = MemoryEstimate.make((1, *shape), transform, windows, members=members, window_bytes=1)
    with LiveMemory([]) as memory:
        grid = SourceGrid(transform)
        plan = MemoryPlan(volume_device=CPU, network_device=CPU, batch_size=1)
        for planes in mean_probabilities(torch.zeros(1, 1, *shape), ensemble, plan, "scan"):
            grid.add(planes)
    a_window = 2 * 4 * 50 * 8**3  # its weighted logits
    assert memory.peak - members * a_window < estimate.volume < 1.6 * memory.peak


@pytest.mark.parametrize("sizes", [(4, 16), (16, 4)])
def test_the_member_with_the_largest_windows_must_fit(sizes: tuple[int, int]) -> None:
    shape, network = (16, 16, 16), Copies()
    spec = DatasetSpec(name="own", classes=tuple(map(str, range(50))))
    transform = GridTransform(
        source=Geometry(np.eye(4), shape, (1, 1, 1)), resampled_shape=shape, padding_before=(0, 0, 0), shape=shape
    )
    members, needed = [], []
    for size in sizes:
        window = (size, size, size)
        windows = SlidingWindowConfig(
            window=window, overlap=0.5, batch_size=1, classes=50, padding_value=None, crops_remainder=False
        )
        members.append(Member(network=network, windows=windows, amp=False, amp_dtype="auto", layout="NCDHW"))
        tensors = window_bytes(network, 1, window)
        estimate = MemoryEstimate.make((1, *shape), transform, windows, members=2, window_bytes=tensors)
        needed.append(estimate.volume + estimate.window + estimate.host)
    assert min(needed) < max(needed) - 1
    budget = FixedBudget(max_gb=None, device=CPU, host_gb=(max(needed) - 1) / GIB)
    with pytest.raises(UserError, match="scan: needs"):
        predict_image(
            np.zeros((1, *shape), np.float32),
            transform,
            Ensemble(members=tuple(members), spec=spec, budget=budget),
            "scan",
        )


def test_more_planes_of_a_scan_take_no_more_than_their_image() -> None:
    windows = SlidingWindowConfig(
        window=(8, 8, 8), overlap=0.5, batch_size=1, classes=100, padding_value=-2.2, crops_remainder=False
    )

    def volume(depth: int) -> int:
        shape = (depth, 16, 16)
        transform = GridTransform(
            source=Geometry(np.eye(4), shape, (1, 1, 1)), resampled_shape=shape, padding_before=(0, 0, 0), shape=shape
        )
        return MemoryEstimate.make((1, *shape), transform, windows, members=1, window_bytes=1).volume

    assert volume(80) - volume(40) == 3 * 4 * 40 * 16 * 16
