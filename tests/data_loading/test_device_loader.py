"""The device loader makes the samples of the `pytorch` loader, from volumes in 16 bit, on the device itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import UserError
from data_loading import data_loader as table
from data_loading.base_loader import Batch, LoaderConfig, TrainingLoader
from data_loading.data_loader import EvaluationCase, EvaluationCases, make_training_loader
from data_loading.device_loader import DeviceLoader, bytes_needed, load_volumes
from data_loading.preprocessing import Shape
from data_loading.pytorch_loader import PytorchLoader
from data_loading.spec import DatasetSpec
from data_loading.transforms import MLPerfAugmentation, draw_augmentation

SPEC = DatasetSpec(name="made_up", classes=("background", "kidney", "tumour"))
SETTINGS = LoaderConfig(
    patch=(8, 8, 8), oversampling=0.4, batch_size=2, num_workers=0, rank=0, ranks=1, order_seed=11, sample_seed=22
)
SHAPES: Sequence[Shape] = ((20, 18, 16), (8, 8, 8), (9, 5, 30), (3, 4, 12), (12, 12, 12), (16, 8, 10))
CASES = [f"case_{number:05d}" for number in range(len(SHAPES))]
# fp16 has 11 significant bits.
FP16_ERROR = 2.0**-11

Arrays = tuple[NDArray[np.float32], NDArray[np.uint8]]


def made_up(number: int, shape: Shape) -> Arrays:
    rng = np.random.default_rng(number)
    label = np.zeros((1, *shape), np.uint8)
    label[:, : shape[0] // 2, : shape[1] // 2] = 1
    label[:, -1:, -2:, -3:] = 2
    return rng.uniform(-2.3, 2.6, (1, *shape)).astype(np.float32), label


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_preprocessed: Callable[..., Path]) -> Path:
    volumes = {case: made_up(number, shape) for number, (case, shape) in enumerate(zip(CASES, SHAPES, strict=True))}
    return write_preprocessed(tmp_path_factory.mktemp("preprocessed"), volumes)


def make(name: str, folder: Path, settings: LoaderConfig = SETTINGS) -> TrainingLoader:
    return make_training_loader(name, folder, CASES, spec=SPEC, config=settings)


def without_noise(rng: np.random.Generator) -> MLPerfAugmentation:
    """Noise is the only thing in which the loaders' numbers differ."""
    return replace(draw_augmentation(rng), noise_std=0.0)


def epochs_of(loader: TrainingLoader, count: int = 6) -> list[Batch]:
    return list(chain.from_iterable(loader.epoch(epoch) for epoch in range(1, count + 1)))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("patch", [(8, 8, 8), (4, 6, 5), (10, 8, 14)])
def test_samples_are_those_of_the_pytorch_loader(folder: Path, patch: Shape, ranks: int) -> None:
    for rank in range(ranks):
        settings = replace(SETTINGS, patch=patch, rank=rank, ranks=ranks, augment=without_noise)
        ours, theirs = (epochs_of(make(name, folder, settings)) for name in ("device", "pytorch"))
        assert len(ours) == len(theirs) > 0
        brightened = 0
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one["label"], other["label"])
            torch.testing.assert_close(one["image"], other["image"], rtol=FP16_ERROR, atol=0)
            brightened += int((other["image"].abs().amax((1, 2, 3, 4)) > 2.7).sum())
        assert brightened > 0, "the factor is among what was compared"


def test_batches_have_the_promised_shapes_and_types(folder: Path) -> None:
    for batch in make("device", folder, replace(SETTINGS, patch=(8, 10, 6), batch_size=3)).epoch(1):
        assert (batch["image"].shape, batch["image"].dtype) == ((3, 1, 8, 10, 6), torch.float32)
        assert (batch["label"].shape, batch["label"].dtype) == ((3, 1, 8, 10, 6), torch.uint8)
        assert batch["image"].is_contiguous()


def test_the_noise_is_gaussian_of_the_drawn_deviation_and_the_same_again(folder: Path) -> None:
    def images(std: float) -> Tensor:
        def draw(rng: np.random.Generator) -> MLPerfAugmentation:
            return MLPerfAugmentation((False, False, False), 1.0, std, int(rng.integers(2**63)))

        loader = make("device", folder, replace(SETTINGS, augment=draw))
        return torch.cat([batch["image"] for batch in epochs_of(loader, 40)])

    noise = images(0.07) - images(0.0)
    count = noise.numel()
    assert noise.mean().item() == pytest.approx(0, abs=5 * 0.07 / count**0.5)
    assert noise.std().item() == pytest.approx(0.07, rel=5 / (2 * count) ** 0.5)
    assert torch.equal(images(0.07) - images(0.0), noise)
    assert not torch.equal(noise[0], noise[1])


def test_an_epoch_can_be_made_again(folder: Path) -> None:
    loader = make("device", folder)
    first, _, again = list(loader.epoch(3)), list(loader.epoch(4)), list(loader.epoch(3))
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one["image"], other["image"])


@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_an_epoch_can_be_begun_in_its_middle(folder: Path, start: int) -> None:
    loader = make("device", folder)
    whole, rest = list(loader.epoch(3)), list(loader.epoch(3, start))
    assert (len(whole), len(rest)) == (3, 3 - start)
    for one, other in zip(rest, whole[start:], strict=True):
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["label"], other["label"])


def plainly(rng: np.random.Generator) -> MLPerfAugmentation:
    """Nothing is changed but the crop's place."""
    return MLPerfAugmentation((False, False, False), 1.0, 0.0, int(rng.integers(2**63)))


def test_a_batch_is_described_by_where_its_crops_are(folder: Path) -> None:
    """Cut out there by hand, with the volume's edges repeated up to the patch."""
    loader = make("device", folder, replace(SETTINGS, augment=plainly))
    for epoch in (1, 2):
        for index, batch in enumerate(loader.epoch(epoch)):
            phrases = loader.describe(epoch, index)
            assert len(phrases) == len(batch["image"]) == 2
            for image, phrase in zip(batch["image"], phrases, strict=True):
                match = re.fullmatch(r"(case_\d{5}) at \((\d+), (\d+), (\d+)\), brightness 1, noise 0", phrase)
                assert match is not None, phrase
                volume = made_up(CASES.index(match[1]), SHAPES[CASES.index(match[1])])[0]
                lacks = [max(0, 8 - n) for n in volume.shape[1:]]
                padded = np.pad(volume, [(0, 0), *((n // 2, n - n // 2) for n in lacks)], "edge").astype(np.float16)
                d, h, w = (slice(int(first), int(first) + 8) for first in match.groups()[1:])
                assert np.array_equal(image.numpy(), padded[:, d, h, w])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_batch_is_described_as_the_pytorch_loader_does(folder: Path, rank: int) -> None:
    settings = replace(SETTINGS, batch_size=1, rank=rank, ranks=2)
    ours, theirs = (make(name, folder, settings) for name in ("device", "pytorch"))
    phrases = [(ours.describe(4, batch), theirs.describe(4, batch)) for batch in range(len(ours))]
    assert all(one == other for one, other in phrases)
    assert len({phrase for (phrase,), _ in phrases}) == len(ours) == 3


def test_volumes_are_kept_in_16_and_8_bit(folder: Path) -> None:
    volumes = load_volumes(folder, CASES, replace(SETTINGS, patch=(4, 4, 4)))
    assert all(image.dtype == torch.float16 and label.dtype == torch.uint8 for image, label in volumes)
    held = sum(tensor.numel() * tensor.element_size() for pair in volumes for tensor in pair)
    shapes = [(1, *shape) for shape in SHAPES]
    shapes[3] = (1, 4, 4, 12)  # padded to the patch
    assert held == bytes_needed(shapes)


@pytest.mark.parametrize("sign", [1, -1])
def test_values_beyond_those_of_16_bits_are_refused_on_both_sides(
    sign: int, tmp_path: Path, write_preprocessed: Callable[..., Path]
) -> None:
    """As infinity, they would make the loss NaN."""
    largest = np.full((1, 8, 8, 8), 0.5, np.float32)
    largest[0, 3, 4, 5] = sign * 65504  # the largest float16: (2 - 2**-10) * 2**15
    too_large = largest.copy()
    too_large[0, 3, 4, 5] = sign * 65505
    label = np.zeros((1, 8, 8, 8), np.uint8)
    data = write_preprocessed(tmp_path, {"largest": (largest, label), "too_large": (too_large, label)})
    ((image, _),) = load_volumes(data, ["largest"], SETTINGS)
    assert torch.equal(image.float(), torch.from_numpy(largest))
    with pytest.raises(UserError, match=r"^too_large: values up to 65505 do not fit into the 16 bits of --loader dev"):
        load_volumes(data, ["largest", "too_large"], SETTINGS)


def test_no_value_comes_to_the_host(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one did, a GPU would make the host wait in every step."""
    loader = make("device", folder)

    def read(self: Tensor, *args: object) -> None:
        raise AssertionError("a tensor's value was read")

    for name in ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__"):
        monkeypatch.setattr(Tensor, name, read)
    assert len(list(loader.epoch(1))) == len(loader) == 3


def test_too_little_memory_falls_back_and_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = bytes_needed([(1, *shape) for shape in SHAPES])
    monkeypatch.setattr(table, "memory_budget", lambda device: needed)
    assert isinstance(make("device", folder), DeviceLoader)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(table, "memory_budget", lambda device: needed - 1)
    assert isinstance(make("device", folder), PytorchLoader)
    note = capsys.readouterr().err
    assert "--loader pytorch" in note
    assert "GiB" in note


def test_kits19_in_16_bit_is_what_the_notes_say() -> None:
    """Training set: 4.85 Gvoxel; images 9.7 GB in 16 bit, labels 4.85 GB in 8."""
    assert bytes_needed([(1, 4_850, 1_000, 1_000)]) == pytest.approx(14.55e9)


def test_more_ranks_than_batches_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="training cases"):
        make("device", folder, replace(SETTINGS, ranks=9))


def test_evaluation_cases_are_kept_as_long_as_they_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    load = table.load_evaluation_case

    def counted(data_dir: Path, case: str) -> EvaluationCase:
        read.append(case)
        return load(data_dir, case)

    monkeypatch.setattr(table, "load_evaluation_case", counted)
    cases = EvaluationCases(folder, torch.device("cpu"))
    # As on a GPU with room for the third case (5 bytes a voxel) and then just for the fourth: never for the first, and
    # not for the second beside the third.
    cases._budget = 5 * (9 * 5 * 30 + 3 * 4 * 12)
    in_turn = [CASES[index] for index in (0, 2, 1, 3)]
    for _ in range(2):
        for case in in_turn:
            found, expected = cases(case), load(folder, case)
            assert torch.equal(found.image, expected.image)
            assert torch.equal(found.label, expected.label)
    assert read == [*in_turn, CASES[0], CASES[1]]


def test_on_a_cpu_no_evaluation_case_is_kept(folder: Path) -> None:
    cases = EvaluationCases(folder, torch.device("cpu"))
    first = cases(CASES[0])
    assert cases(CASES[0]) is not first


@pytest.mark.parametrize("name", ["device", "pytorch", "synthetic"])
def test_slabs_are_the_parts_of_the_whole_samples(name: str, folder: Path) -> None:
    """Flips, factors and noise included, whose draws are those of the whole crop; in an epoch's middle too."""
    whole = list(make(name, folder).epoch(2, start=1))
    parts = [list(make(name, folder, replace(SETTINGS, slab=slab, slabs=4)).epoch(2, start=1)) for slab in range(4)]
    assert len(whole) == 2
    for expected, *slabs in zip(whole, *parts, strict=True):
        for key, tensor in expected.items():
            assert [slab[key].shape[2] for slab in slabs] == [2] * 4
            assert torch.equal(torch.cat([slab[key] for slab in slabs], 2), tensor)
