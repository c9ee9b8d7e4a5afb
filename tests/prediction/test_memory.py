"""What a prediction takes, and where it goes when there is less."""

from __future__ import annotations

from collections.abc import Callable
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
from prediction.memory import GIB, Budget, Place, Sizes, places, window_bytes
from runtime.inference import sliding_window

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SIZES = Sizes(volume=10 * GIB, window=3 * GIB, host=2 * GIB)


@dataclass(frozen=True)
class Fixed(Budget):
    """A budget of so many GiB."""

    host_gb: float = 0
    gpu_gb: float = 0

    def host(self) -> int:
        return int(self.host_gb * GIB)

    def gpu(self) -> int:
        return int(self.gpu_gb * GIB)


def first(host: float, gpu: float, device: torch.device = GPU) -> Place:
    return next(places(SIZES, Fixed(None, device, host, gpu), 4, "scan"))


def test_with_room_all_is_on_the_gpu() -> None:
    assert first(99, 40) == Place(GPU, GPU, 4, "")
    assert first(99, 17).batch_size == 2


def test_without_room_for_the_volume_windows_alone_are_on_the_gpu() -> None:
    place = first(20, 12)
    assert (place.volume, place.network, place.batch_size) == (CPU, GPU, 4)
    assert place.note.startswith("needs 13.00 GiB, the GPU has 12.00: its volume stays in the host's memory")


def test_without_room_for_a_window_all_is_on_the_cpu() -> None:
    place = first(17, 2)
    assert (place.volume, place.network, place.batch_size) == (CPU, CPU, 2)
    assert place.note == "needs 13.00 GiB, the GPU has 2.00: computed on the CPU"


def test_each_place_is_offered_in_turn() -> None:
    """Where the estimate was too low and the GPU's memory runs out, the next one is taken."""
    found = list(places(SIZES, Fixed(None, GPU, 99, 40), 4, "scan"))
    assert [(place.volume.type, place.network.type) for place in found] == [
        ("cuda", "cuda"),
        ("cpu", "cuda"),
        ("cpu", "cpu"),
    ]


def test_on_a_cpu_there_is_one_place_and_no_note() -> None:
    assert list(places(SIZES, Fixed(None, CPU, 99), 4, "scan")) == [Place(CPU, CPU, 4, "")]


@pytest.mark.parametrize("gigabytes", [12.9, 1.5, -1])
def test_what_fits_nowhere_is_told_in_a_line(gigabytes: float) -> None:
    with pytest.raises(UserError, match=r"scan: needs \d+\.00 GiB, and .* GiB are free"):
        list(places(SIZES, Fixed(None, CPU, gigabytes), 4, "scan"))


def test_the_bound_counts_what_the_program_has() -> None:
    assert Budget(1.0, CPU).host() < GIB
    assert Budget(0.001, CPU).host() < 0
    assert Budget(None, CPU).host() > 0


class Two(nn.Module):
    """8 channels, of which 4 remain."""

    def forward(self, image: Tensor) -> Tensor:
        wide = image.repeat(1, 8, 1, 1, 1)
        return wide[:, :4] + 1


def test_a_window_takes_what_lives_at_once() -> None:
    voxel = 4 * 6 * 6 * 6
    assert window_bytes(Two(), 1, (6, 6, 6)) == pytest.approx(1.5 * (8 + 4) * voxel, rel=0.15)


def test_prediction_stays_within_its_bound(tmp_path: Path, run_python: Callable[..., Any]) -> None:
    """The most memory that the process ever had, by the kernel's own count."""
    rng = np.random.default_rng(0)
    nib.save(nib.Nifti1Image(rng.normal(size=(110, 115, 120)).astype(np.float32), np.eye(4)), tmp_path / "scan.nii")
    program = f"""
import sys
from pathlib import Path
import torch
from data_loading.io.scan_discovery import Source
from data_loading.spec import DatasetSpec
from model.unet3d import Unet3d
from prediction.memory import GIB, Budget, resident_bytes
from prediction.predict import Member, Predictor, predict_scan
torch.manual_seed(0)
spec = DatasetSpec(name="own", classes=tuple("abcdefgh"), spacing_mm=(0.9, 1.1, 1.0))
member = Member(Unet3d(1, 8, filters=(4, 8)).eval(), (64, 64, 64), 0.0, False, "auto", "NCDHW")
started = resident_bytes() / GIB
bound = started + float(sys.argv[1])
maker = Predictor((member,), spec, ((), (2,)), 64, Budget(bound, torch.device("cpu")))
predict_scan(Source("scan", Path("{tmp_path}/mask.nii"), Path("{tmp_path}/scan.nii")), maker, False)
peak = [line for line in open("/proc/self/status") if line.startswith("VmHWM")][0].split()[1]
print(int(peak) * 1024 / GIB - started)
"""
    for bound_gb in (1.0, 0.4):  # all windows at once would take more
        done = run_python("-c", program, bound_gb)
        assert done.returncode == 0, done.stderr
        assert 0.4 * bound_gb < float(done.stdout) < bound_gb
    assert "are left of --max_memory_gb" in run_python("-c", program, 0.15).stderr


def test_the_volume_s_bytes_cover_what_the_windows_need() -> None:
    """The tensors that a sliding window holds in the end are no more than counted."""
    image = torch.zeros(1, 1, 9, 10, 11)
    logits = sliding_window(image, Two(), (4, 4, 4), 0.5, padding_value=-2.2)
    transform = GridTransform(
        source=Geometry(np.eye(4), (9, 10, 11), (1, 1, 1)),
        resampled_shape=(9, 10, 11),
        padding_before=(0, 0, 0),
        shape=(9, 10, 11),
    )
    sizes = Sizes.of((1, 9, 10, 11), transform, 4, (4, 4, 4), 0.5, -2.2, False, 1)
    assert sizes.volume >= 2 * logits.numel() * 4 + 2 * image.numel() * 4
