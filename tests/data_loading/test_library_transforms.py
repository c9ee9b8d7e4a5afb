"""Augmentations by spec: composed in order, identical for image and label, all randomness the sample's own."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import UserError
from common.registry import Spec
from data_loading.base_loader import LoaderConfig
from data_loading.data_loader import make_training_loader
from data_loading.library_transforms import LibraryTransform, RandomLibraryTransform, seeded
from data_loading.spec import DatasetSpec
from data_loading.transforms import MLPerfAugmentation, RandomTransform, make_augmentation

# TorchIO, of a deformation that moves the labels of a tiny volume at all.
pytestmark = pytest.mark.filterwarnings("ignore:The maximum displacement is larger:RuntimeWarning:torchio")
HERE = "tests.data_loading.test_library_transforms"
TORCHIO = [
    "torchio:RandomElasticDeformation(num_control_points=5, max_displacement=4.0)",
    "torchio:RandomGamma",
    "torchio:RandomBiasField",
    "torchio:RandomAffine(degrees=40)",
    "torchio:RandomNoise",
    "torchio:RandomMotion",
]
MONAI = [
    "RandGaussianNoise(prob=1)",
    "RandAdjustContrastd(prob=1)",
    "RandFlip(prob=1, spatial_axis=0)",
    "RandAffine(prob=1, rotate_range=(0.9, 0, 0), padding_mode='border')",
    "RandFlipd(prob=1)",
    "Rand3DElasticd(prob=1, sigma_range=(1, 2), magnitude_range=(20, 40))",
    "RandSimulateLowResolution(prob=1, zoom_range=(0.5, 0.6))",
    "RandSmoothFieldAdjustIntensity(spatial_size=(6, 8, 8), rand_size=(3, 4, 4), prob=1)",
]
FOREIGN = [*TORCHIO, *(f"monai.transforms:{name}" for name in MONAI)]


def sample(shape: tuple[int, int, int] = (6, 8, 8)) -> tuple[np.ndarray, np.ndarray]:
    """A label (1, D, H, W) of blocks of 0, 3 and 7, and an image (2, D, H, W) that is a smooth multiple of it."""
    label = np.zeros((1, *shape), np.uint8)
    label[:, 1:4, 2:7, 1:5] = 3
    label[:, 3:5, 3:6, 4:7] = 7
    return np.concatenate([label, 2.0 * label]).astype(np.float32), label


def apply(draw: RandomTransform, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    return draw(np.random.default_rng(seed)).apply(*sample())


def needs(spec: str) -> None:
    pytest.importorskip(spec.partition(":")[0].partition(".")[0])


def typed(*specs: str) -> list[str]:
    return [Spec(spec, trusted=True) for spec in specs]


class Add:
    """A draw of one's own: adds what it has drawn."""

    def __init__(self, value: float, by_chance: float = 0.0) -> None:
        self.value = value + by_chance

    def apply(self, image: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return image + np.float32(self.value), label

    def __str__(self) -> str:
        return f"plus {self.value:g}"


def adding(value: float) -> RandomTransform:
    return lambda rng: Add(value, rng.random())


def no_draw() -> int:
    return 3


def test_several_are_drawn_and_applied_in_order() -> None:
    draw = make_augmentation(typed(f"{HERE}:adding(value=10)", "mlperf", f"{HERE}:adding(value=20)"))
    drawn = draw(np.random.default_rng(3))
    rng = np.random.default_rng(3)
    first, middle = 10 + rng.random(), make_augmentation(["mlperf"])(rng)
    last = 20 + rng.random()
    assert str(drawn) == f"plus {first:g}, {middle}, plus {last:g}"
    image, label = sample()
    expected = middle.apply(image + np.float32(first), label)[0] + np.float32(last)
    np.testing.assert_array_equal(drawn.apply(*sample())[0], expected)


def test_none_leaves_a_sample_as_it_is() -> None:
    drawn = make_augmentation([])(np.random.default_rng(0))
    for changed, before in zip(drawn.apply(*sample()), sample(), strict=True):
        np.testing.assert_array_equal(changed, before)
    assert str(drawn) == "unchanged"


def test_flips_by_their_probability_along_their_axes() -> None:
    draw = make_augmentation(["flips(p=0.25, axes='HW')"])
    rng = np.random.default_rng(0)
    counts = np.sum([draw(rng).flips for _ in range(4000)], axis=0)  # type: ignore[attr-defined]
    assert counts[0] == 0
    assert all(abs(count - 1000) < 4 * np.sqrt(4000 * 0.25 * 0.75) for count in counts[1:])
    always = make_augmentation(["flips(p=1, axes='W')"])(rng)
    image, label = always.apply(*sample())
    np.testing.assert_array_equal(image, sample()[0][..., ::-1])
    np.testing.assert_array_equal(label, sample()[1][..., ::-1])
    assert str(always) == "flips W"


def test_quarter_turns_are_alike_for_image_and_label_and_keep_the_shape() -> None:
    draw = make_augmentation(["rot90(p=0.5)"])
    rng = np.random.default_rng(0)
    turns = np.bincount([draw(rng).turns for _ in range(4000)])  # type: ignore[attr-defined]
    for count, share in zip(turns, [1 / 2, 1 / 6, 1 / 6, 1 / 6], strict=True):
        assert abs(count - 4000 * share) < 4 * np.sqrt(4000 * share * (1 - share))
    whole, oblong = make_augmentation(["rot90(p=1)"]), make_augmentation(["rot90(p=1, axes='DH')"])
    for seed in range(6):
        drawn = whole(np.random.default_rng(seed))
        image, label = drawn.apply(*sample())
        np.testing.assert_array_equal(image, np.rot90(sample()[0], drawn.turns, (2, 3)))  # type: ignore[attr-defined]
        np.testing.assert_array_equal(image[:1], label)
        np.testing.assert_array_equal(apply(oblong, seed)[0], np.rot90(sample()[0], 2, (1, 2)))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("flips(p=2)", "2 is not a probability"),
        ("flips(axes='XY')", "expected axes of 'DHW'"),
        ("rot90(axes='DHW')", "the two axes of a plane"),
        ("rot90(p='a')", "'a' is not a probability"),
        ("rot9", "'rot9': unknown name; available: flips, mlperf, nnunet, rot90"),
        (f"{HERE}:no_draw", "returns a int, expected a callable"),
        ("torchio:RandomGama", "has no callable RandomGama; similar: RandomGamma"),
        ("torchio:RandomGamma(q=1)", "unexpected keyword argument 'q'; it takes log_gamma"),
        ("torchio:RandomGamma(p=7)", "it takes"),
        ("monai.transforms:RandFlip(probability=1)", "unknown argument 'probability'"),
        ("monai.transforms:RandFlipd(keys=('image',))", "'keys' is set by the program"),
        ("monai.data:Dataset(data=())", "not a transform of MONAI"),
    ],
)
def test_a_wrong_spec_is_one_line(spec: str, message: str) -> None:
    if spec.startswith(("torchio", "monai")):
        needs(spec)
    with pytest.raises(UserError, match=f"^--augment .*{message}"):
        make_augmentation(typed(spec))


# Other libraries' transforms


@pytest.mark.parametrize("spec", FOREIGN)
def test_a_transform_follows_from_its_generator_and_leaves_all_others_alone(spec: str) -> None:
    needs(spec)
    draw = make_augmentation(typed(spec))
    states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    first = apply(draw)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert np.random.get_state()[1].tolist() == states[2]  # type: ignore[union-attr]
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    apply(draw, 9)
    for once, again in zip(first, apply(draw), strict=True):
        np.testing.assert_array_equal(once, again)
    image, label = first
    assert (image.dtype, label.dtype, image.shape, label.shape) == (np.float32, np.uint8, (2, 6, 8, 8), (1, 6, 8, 8))
    assert image.flags.c_contiguous
    assert label.flags.c_contiguous
    assert not np.array_equal(image, sample()[0])
    assert set(np.unique(label)) <= {0, 3, 7}, "a label is never between two classes"


SPATIAL = [spec for spec in FOREIGN if any(name in spec for name in ("Elastic", "Affine", "Flip"))]


@pytest.mark.parametrize("spec", SPATIAL)
def test_image_and_label_move_together(spec: str) -> None:
    needs(spec)
    image, label = (np.kron(array, np.ones((1, 3, 3, 3), array.dtype)) for array in sample())
    drawn = make_augmentation(typed(spec))(np.random.default_rng(1))
    changed, moved = drawn.apply(image.copy(), label.copy())
    assert (moved != label).mean() > 0.01
    assert np.abs(changed[:1] - moved).mean() < 0.9 * np.abs(changed[:1] - label).mean()


@pytest.mark.parametrize("spec", [spec for spec in FOREIGN if spec not in SPATIAL and "Motion" not in spec])
def test_an_intensity_transform_leaves_the_label(spec: str) -> None:
    needs(spec)
    np.testing.assert_array_equal(apply(make_augmentation(typed(spec)))[1], sample()[1])


def test_a_transform_that_fails_is_one_line() -> None:
    def fail(image: np.ndarray, label: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        raise ZeroDivisionError("no\nsuch thing")

    with pytest.raises(UserError, match=r"^--augment x: failed on a sample \(2, 6, 8, 8\): no such thing$"):
        LibraryTransform("x", 0, fail).apply(*sample())


@pytest.mark.parametrize(
    "spec",
    [
        "torchio:RandomAffine(degrees=40, label_interpolation='linear')",
        "monai.transforms:RandAffine(prob=1, rotate_range=(0.9, 0, 0), mode='bilinear')",
    ],
)
def test_labels_between_two_classes_are_refused(spec: str) -> None:
    needs(spec)
    with pytest.raises(UserError, match=r"^--augment .*Affine.*: interpolates between labels"):
        apply(make_augmentation(typed(spec)))


def test_seeded_draws_the_same_and_gives_the_generators_back() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    with seeded(2**32 - 1):
        first = draw()
    between = draw()
    with seeded(2**32 - 1):
        assert draw() == first
    with pytest.raises(KeyError), seeded(4):
        raise KeyError
    assert draw() != between


# In the loaders

SPEC = DatasetSpec(name="made_up", classes=("background", "kidney", "tumour"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_preprocessed: Callable[..., Path]) -> Path:
    rng = np.random.default_rng(0)
    cases = {f"case_{n}": (rng.normal(size=(1, 8, 9, 10)), rng.integers(0, 3, (1, 8, 9, 10))) for n in range(5)}
    return write_preprocessed(tmp_path_factory.mktemp("data"), cases)


def samples(folder: Path, name: str, draw: RandomTransform, workers: int, start: int = 0) -> dict[str, Any]:
    """Of the second epoch, by what they are."""
    settings = LoaderConfig(
        patch=(6, 6, 6),
        oversampling=0.4,
        batch_size=1,
        num_workers=workers,
        rank=0,
        ranks=1,
        order_seed=5,
        sample_seed=6,
        augment=draw,
    )
    loader = make_training_loader(name, folder, [f"case_{n}" for n in range(1, 5)], spec=SPEC, config=settings)
    return {loader.describe(2, index)[0]: batch for index, batch in enumerate(loader.epoch(2, start), start)}


def test_a_sample_is_the_same_whichever_process_makes_it_and_whatever_came_before(folder: Path) -> None:
    pytest.importorskip("torchio")
    pytest.importorskip("monai")
    specs = ("mlperf", "rot90", TORCHIO[0], "torchio:RandomBiasField", f"monai.transforms:{MONAI[0]}")
    draw = make_augmentation(typed(*specs))
    here, there = samples(folder, "pytorch", draw, 0), samples(folder, "pytorch", draw, 2)
    later = samples(folder, "pytorch", draw, 0, start=2)
    assert len(here) == 4
    assert here.keys() == there.keys() > later.keys()
    assert all("brightness" in name and "RandomBiasField with seed" in name for name in here)
    for name, batch in here.items():
        for other in (there, later):
            if name in other:
                assert all(torch.equal(batch[kind], other[name][kind]) for kind in batch)


def test_the_device_loader_takes_any_on_a_cpu_and_mlperf_alone_on_a_gpu(folder: Path) -> None:
    draw = make_augmentation(typed("rot90(p=1)", f"{HERE}:adding(value=2)"))
    plain, device = samples(folder, "pytorch", draw, 0), samples(folder, "device", draw, 0)
    assert plain.keys() == device.keys()
    for name, batch in plain.items():
        assert torch.equal(batch["label"], device[name]["label"])
        torch.testing.assert_close(batch["image"], device[name]["image"], atol=4e-3, rtol=0)
    settings = LoaderConfig(
        patch=(6, 6, 6),
        oversampling=0.4,
        batch_size=1,
        num_workers=0,
        rank=0,
        ranks=1,
        order_seed=5,
        sample_seed=6,
        device=torch.device("cuda"),
        augment=draw,
    )
    with pytest.raises(UserError, match="--loader device supports only --augment mlperf on a GPU"):
        make_training_loader("device", folder, ["case_1"], spec=SPEC, config=settings)


def test_what_is_drawn_is_plain() -> None:
    drawn = RandomLibraryTransform("x", lambda image, label, seed: (image, label))(np.random.default_rng(0))
    assert replace(drawn, seed=4) == LibraryTransform("x", 4, drawn.function)
    assert str(replace(drawn, seed=4)) == "x with seed 4"
    assert str(MLPerfAugmentation((True, False, False), 1.7, 0.05)) == "brightness 1.7, noise 0.05"
