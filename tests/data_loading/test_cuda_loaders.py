"""The loaders on a stand-in for a GPU: where samples are made, and what the host waits for."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from data_loading import data_loader as table
from data_loading import device_loader
from data_loading.data_loader import EvaluationCases, load_evaluation_case, make_training_loader
from data_loading.device_loader import DeviceLoader, load_volumes
from data_loading.pytorch_loader import CropDataset, PytorchLoader
from tests.data_loading.test_device_loader import CASES, SETTINGS, SHAPES, SPEC, made_up
from tests.fake_gpu import GPU, FakeGpu

ON_GPU = replace(SETTINGS, device=GPU)


@pytest.fixture
def folder(tmp_path: Path, write_preprocessed: Callable[..., Path]) -> Path:
    volumes = {case: made_up(number, shape) for number, (case, shape) in enumerate(zip(CASES, SHAPES, strict=True))}
    return write_preprocessed(tmp_path / "preprocessed", volumes)


def test_the_device_loader_makes_the_samples_of_a_cpu_without_a_wait(
    folder: Path, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With noise too: the stand-in draws on the CPU, while a GPU has numbers of its own."""
    on_cpu = make_training_loader("device", folder, CASES, spec=SPEC, config=SETTINGS)
    assert isinstance(on_cpu, DeviceLoader)
    volumes = [(image.to(GPU), label.to(GPU)) for image, label in load_volumes(folder, CASES, SETTINGS)]
    asked: list[torch.device] = []
    generator = torch.Generator

    def on_device(device: torch.device) -> torch.Generator:
        asked.append(device)
        return generator()

    monkeypatch.setattr(device_loader.torch, "Generator", on_device)
    on_gpu = DeviceLoader(CASES, volumes, on_cpu._boxes, ON_GPU)
    assert asked == [GPU], "as CUDA demands of a generator for its tensors"
    gpu.waits.clear()
    batches = [batch for epoch in range(1, 5) for batch in on_gpu.epoch(epoch)]
    assert gpu.waits == []
    assert gpu.copies_to_device == []
    expected = [batch for epoch in range(1, 5) for batch in on_cpu.epoch(epoch)]
    for ours, theirs in zip(batches, expected, strict=True):
        assert ours["image"].device == ours["label"].device == GPU
        assert torch.equal(ours["image"].cpu(), theirs["image"])
        assert torch.equal(ours["label"].cpu(), theirs["label"])


def test_synthetic_volumes_are_on_the_gpu_and_take_no_copy(tmp_path: Path, gpu: FakeGpu) -> None:
    loaders = [make_training_loader("synthetic", tmp_path, CASES, spec=SPEC, config=c) for c in (SETTINGS, ON_GPU)]
    gpu.waits.clear()
    expected, batches = (list(loader.epoch(1)) for loader in loaders)
    assert (gpu.waits, gpu.copies_to_device) == ([], [])
    for ours, theirs in zip(batches, expected, strict=True):
        assert ours["image"].device == ours["label"].device == GPU
        assert torch.equal(ours["image"].cpu(), theirs["image"])
        assert torch.equal(ours["label"].cpu(), theirs["label"])


def test_volumes_that_do_not_fit_on_the_gpu_are_read_by_workers(
    folder: Path, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.device] = []

    def mem_get_info(device: torch.device) -> tuple[int, int]:
        asked.append(device)
        return 1000, 2000

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    made = make_training_loader("device", folder, CASES, spec=SPEC, config=ON_GPU)
    assert (type(made), asked) == (PytorchLoader, [GPU])


def test_transforms_of_the_host_are_refused_on_a_gpu(folder: Path, gpu: FakeGpu) -> None:
    class OnTheHost:
        """Any other transform."""

    config = replace(ON_GPU, augment=lambda rng: OnTheHost())  # type: ignore[arg-type, return-value]
    with pytest.raises(UserError, match="supports only --augment mlperf on a GPU"):
        make_training_loader("device", folder, CASES, spec=SPEC, config=config)


def test_batches_for_a_gpu_are_pinned_and_only_those(folder: Path) -> None:
    for config, pinned in ((SETTINGS, False), (ON_GPU, True)):
        loader = make_training_loader("pytorch", folder, CASES, spec=SPEC, config=config)
        assert isinstance(loader, PytorchLoader)
        assert loader._loader.pin_memory is pinned


def test_a_worker_that_starts_anew_gets_a_data_set_without_a_gpu(folder: Path) -> None:
    """Workers are forked up to Python 3.13, with what the process knows of CUDA; they may not use it, nor do they."""
    loader = make_training_loader("pytorch", folder, CASES, spec=SPEC, config=ON_GPU)
    assert isinstance(loader, PytorchLoader)
    dataset = pickle.loads(pickle.dumps(loader._dataset))
    assert isinstance(dataset, CropDataset)
    assert {type(value).__module__ for value in dataset[(1, 0)].values()} == {"numpy"}


def test_evaluation_cases_stay_on_the_gpu_as_long_as_they_fit(
    folder: Path, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * 5 * 8 * 8 * 8, 10**6))
    cases = EvaluationCases(folder, GPU)
    first = cases(CASES[1])
    assert first.image.device == first.label.device == GPU
    assert torch.equal(first.image.cpu(), load_evaluation_case(folder, CASES[1]).image)
    monkeypatch.setattr(table, "load_evaluation_case", partial(pytest.fail, "read again"))
    assert cases(CASES[1]) is first
