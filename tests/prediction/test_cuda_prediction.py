"""Prediction on a stand-in for a GPU: all of it there, only the windows, or none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prediction import ensemble as ensembles
from prediction.memory import MemoryBudget, MemoryPlan
from tests.fake_gpu import CPU, GPU, FakeGpu
from tests.prediction.test_ensemble import PLAIN, make_ensemble

IMAGE = torch.from_numpy(np.random.default_rng(3).normal(size=(1, 1, 9, 8, 7)).astype(np.float32))


class Blur(nn.Module):
    """Two classes from the voxel and its neighbours, in windows of any size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.conv = nn.Conv3d(1, 2, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.conv(image)
        return logits


def predict(volumes: torch.device, windows: torch.device, layout: str = "NCDHW") -> np.ndarray:
    ensemble = make_ensemble(PLAIN, Blur(), Blur(), flips="DH")
    ensemble = replace(ensemble, members=tuple(replace(member, layout=layout) for member in ensemble.members))
    plan = MemoryPlan(volume_device=volumes, network_device=windows, batch_size=3)
    return torch.cat(list(ensembles.mean_probabilities(IMAGE, ensemble, plan, "scan")), 1).numpy()


@pytest.mark.parametrize("layout", ["NCDHW", "NDHWC"])
@pytest.mark.parametrize("volumes", [GPU, CPU], ids=str)
def test_the_probabilities_are_those_of_a_cpu(volumes: torch.device, layout: str, gpu: FakeGpu) -> None:
    assert np.array_equal(predict(volumes, GPU, layout), predict(CPU, CPU, layout))


def test_a_volume_on_the_gpu_is_transferred_once(gpu: FakeGpu) -> None:
    predict(GPU, GPU)  # makes the window's weights
    gpu.waits.clear()
    predict(GPU, GPU)
    parameters = 2 * len(list(Blur().parameters()))
    slabs = 5  # of 9 planes, in windows of 4 that are 2 apart
    assert [wait.partition(" in ")[0] for wait in gpu.waits] == [
        *("copy to the device",) * (1 + parameters),
        *("copy to the host",) * slabs,
    ]


def test_memory_of_earlier_scans_that_torch_keeps_is_free(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the second scan would be computed with smaller batches, or on the CPU."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 850)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 50)
    assert MemoryBudget(None, GPU).gpu_bytes() == int(0.9 * 900)
    assert MemoryBudget(500 / 2**30, GPU).gpu_bytes() == 450
