"""The loaders: a sample is a function of (seed, epoch, case), whoever makes it, and reads its own voxels alone."""

from __future__ import annotations

import os
import signal
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from common.errors import UserError
from data_loading import pytorch_loader as loader_module
from data_loading.base_loader import Batch, LoaderConfig
from data_loading.data_loader import load_evaluation_case, make_training_loader
from data_loading.dataset import case_file, load_boxes, map_case
from data_loading.preprocessing import Boxes, Shape, foreground_boxes
from data_loading.pytorch_loader import CropDataset, PytorchLoader
from data_loading.sampler import EpochSampler, sample_rng
from data_loading.spec import DatasetSpec
from data_loading.synthetic_loader import synthetic_cases
from data_loading.transforms import draw_augmentation, draw_crop

SPEC = DatasetSpec(name="made_up", classes=("background", "kidney", "tumour"))
SETTINGS = LoaderConfig(
    patch=(8, 8, 8),
    oversampling=0.4,
    batch_size=2,
    num_workers=0,
    rank=0,
    ranks=1,
    order_seed=11,
    sample_seed=22,
)
# Larger than the patch, equal to it, and smaller along one, two and three axes.
SHAPES: Sequence[Shape] = ((20, 18, 16), (8, 8, 8), (9, 5, 30), (3, 4, 12), (5, 6, 7), (12, 12, 12), (16, 8, 10))
CASES = [f"case_{number:05d}" for number in range(len(SHAPES))]

Arrays = tuple[NDArray[np.float32], NDArray[np.uint8]]
WritePreprocessed = Callable[..., Path]


def made_up(shape: Shape, seed: int) -> Arrays:
    """An image whose every voxel holds its own index, and a label with blobs (none for seed 0)."""
    image = np.arange(np.prod(shape), dtype=np.float32).reshape(1, *shape)
    label = np.zeros((1, *shape), np.uint8)
    if seed:
        d, h, w = (n // 2 for n in shape)
        label[:, :d, :h, :w] = 1
        label[:, d + 1 :, h:, w:] = 1 + seed % 2
    return image, label


VOLUMES: dict[str, Arrays] = {
    case: made_up(shape, seed) for seed, (case, shape) in enumerate(zip(CASES, SHAPES, strict=True))
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_preprocessed: WritePreprocessed) -> Path:
    return write_preprocessed(tmp_path_factory.mktemp("preprocessed"), VOLUMES)


def batches(folder: Path, epochs: Sequence[int] = (1, 2), **changes: Any) -> list[list[Batch]]:
    loader = make_training_loader("pytorch", folder, CASES, spec=SPEC, config=replace(SETTINGS, **changes))
    return [list(loader.epoch(epoch)) for epoch in epochs]


def assert_same(ours: list[list[Batch]], theirs: list[list[Batch]]) -> None:
    assert [len(epoch) for epoch in ours] == [len(epoch) for epoch in theirs]
    for one, other in zip(chain(*ours), chain(*theirs), strict=True):
        assert one.keys() == other.keys() == {"image", "label"}
        assert all(torch.equal(one[key], other[key]) for key in one)


def expected_sample(case: str, permutation: int, settings: LoaderConfig) -> Arrays:
    """A sample from the whole arrays, padded whole: what the loader makes from a window alone."""
    image, label = VOLUMES[case]
    missing = [max(0, length - size) for length, size in zip(settings.patch, image.shape[1:], strict=True)]
    padding = [(0, 0), *((n // 2, n - n // 2) for n in missing)]
    image, label = np.pad(image, padding, mode="edge"), np.pad(label, padding, mode="edge")
    before = [first for first, _ in padding[1:]]
    boxes: Boxes = {
        value: [tuple(edge + before[axis % 3] for axis, edge in enumerate(box)) for box in found]  # type: ignore[misc]
        for value, found in foreground_boxes(VOLUMES[case][1], 3).items()
    }
    rng = sample_rng(settings.sample_seed, permutation, CASES.index(case))
    d, h, w = draw_crop(
        rng, shape=image.shape[1:], patch=settings.patch, boxes=boxes, oversampling=settings.oversampling
    )  # type: ignore[arg-type]
    window = (slice(None), *(slice(n, n + length) for n, length in zip((d, h, w), settings.patch, strict=True)))
    return draw_augmentation(rng).apply(image[window].copy(), label[window].copy())


@pytest.mark.parametrize(
    "changes",
    [{}, {"oversampling": 1.0}, {"patch": (4, 6, 5), "batch_size": 3}, {"fixed_batches": 5}, {"fixed_batches": 1}],
)
def test_a_sample_is_its_window_of_the_volume_augmented(folder: Path, changes: dict[str, Any]) -> None:
    settings = replace(SETTINGS, **changes)
    order = settings.sampler(len(CASES))
    epochs = range(1, 9)
    for epoch, made in zip(epochs, batches(folder, epochs, **changes), strict=True):
        for keys, batch in zip(order.batches(epoch), made, strict=True):
            samples = [expected_sample(CASES[index], permutation, settings) for permutation, index in keys]
            np.testing.assert_array_equal(batch["image"].numpy(), np.stack([image for image, _ in samples]))
            np.testing.assert_array_equal(batch["label"].numpy(), np.stack([label for _, label in samples]))


def test_batches_have_the_promised_shapes_and_types(folder: Path) -> None:
    for batch in batches(folder, [1], patch=(8, 10, 6), batch_size=3)[0]:
        assert (batch["image"].shape, batch["image"].dtype) == ((3, 1, 8, 10, 6), torch.float32)
        assert (batch["label"].shape, batch["label"].dtype) == ((3, 1, 8, 10, 6), torch.uint8)


def test_image_and_label_show_the_same_voxels(folder: Path) -> None:
    seen = 0
    dataset = CropDataset(folder, CASES, load_boxes(folder, CASES, 3), SETTINGS)
    for epoch in range(1, 20):
        for index, case in enumerate(CASES):
            sample = dataset[epoch, index]
            places = sample["image"].astype(int)
            if (places != sample["image"]).any() or places.max() >= VOLUMES[case][1].size:
                continue  # brighter, or noisy: its voxels no longer tell their places
            np.testing.assert_array_equal(sample["label"], VOLUMES[case][1].ravel()[places])
            seen += 1
    assert seen > 80


def test_workers_change_nothing(folder: Path) -> None:
    alone = batches(folder, (1, 2))
    assert_same(batches(folder, (1, 2), num_workers=1), alone)
    assert_same(batches(folder, (1, 2), num_workers=3), alone)


def test_epochs_can_be_taken_in_any_order_and_left_early(folder: Path) -> None:
    # A resumed run begins in the middle; a stopped one abandons an epoch while its workers are ahead.
    first, second = batches(folder, (1, 2))
    loader = make_training_loader("pytorch", folder, CASES, spec=SPEC, config=replace(SETTINGS, num_workers=2))
    assert_same([list(loader.epoch(2))], [second])
    for batch in loader.epoch(7):
        assert len(batch) == 2
        break
    assert_same([list(loader.epoch(1))], [first])


@pytest.mark.parametrize("change", [{"order_seed": 12}, {"sample_seed": 23}])
def test_seeds_change_order_and_samples(folder: Path, change: dict[str, int]) -> None:
    ours, theirs = batches(folder, [1])[0], batches(folder, [1], **change)[0]
    assert any(not torch.equal(one["image"], other["image"]) for one, other in zip(ours, theirs, strict=True))


def test_epochs_differ(folder: Path) -> None:
    first, second = batches(folder, (1, 2), batch_size=1)
    voxels = [{batch["image"].numpy().tobytes() for batch in epoch} for epoch in (first, second)]
    assert len(voxels[0] & voxels[1]) < 3


def test_two_ranks_share_one_permutation(folder: Path) -> None:
    def samples(**changes: Any) -> list[bytes]:
        made = batches(folder, [3], batch_size=1, **changes)[0]
        return [batch["image"].numpy().tobytes() + batch["label"].numpy().tobytes() for batch in made]

    alone = samples()
    ranks = [samples(rank=rank, ranks=2) for rank in range(2)]
    assert [sample for turn in zip(*ranks, strict=True) for sample in turn] == alone[:6]
    assert len(make_training_loader("pytorch", folder, CASES, spec=SPEC, config=replace(SETTINGS, ranks=2))) == 1


def test_too_few_cases_are_told_before_the_first_epoch(folder: Path) -> None:
    with pytest.raises(UserError, match=r"too few training cases \(7\) for 2 rank"):
        make_training_loader("pytorch", folder, CASES, spec=SPEC, config=replace(SETTINGS, ranks=2, batch_size=4))


def test_a_folder_of_the_reference_gives_the_same_batches(
    folder: Path, tmp_path: Path, write_preprocessed: WritePreprocessed
) -> None:
    reference = write_preprocessed(tmp_path, VOLUMES, index=False)
    assert not (reference / "dataset.json").exists()
    assert load_boxes(reference, CASES, 3) == load_boxes(folder, CASES, 3)
    assert_same(batches(reference, [1]), batches(folder, [1]))


def test_a_case_without_foreground_is_cropped_all_the_same(folder: Path) -> None:
    assert not VOLUMES[CASES[0]][1].any()
    dataset = CropDataset(folder, CASES[:1], load_boxes(folder, CASES[:1], 3), replace(SETTINGS, oversampling=1.0))
    for epoch in range(1, 6):
        assert not dataset[epoch, 0]["label"].any()


def test_a_crop_reads_its_window_alone(tmp_path: Path) -> None:
    # 8 GiB and 2 GiB that are only promised to the file system: who reads them all runs out of time or memory.
    shape = (1, 1024, 2048, 1024)
    for kind, dtype in (("x", "<f4"), ("y", "|u1")):
        with case_file(tmp_path, "case_00001", kind).open("wb") as stream:
            np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
            stream.truncate(stream.tell() + int(np.prod(shape)) * np.dtype(dtype).itemsize)
    boxes: Boxes = {1: [(1000, 2000, 1000, 1024, 2048, 1024)]}
    dataset = CropDataset(tmp_path, ["case_00001"], [boxes], replace(SETTINGS, patch=(32, 32, 32)))
    tracemalloc.start()
    for epoch in range(1, 6):
        assert dataset[epoch, 0]["image"].shape == (1, 32, 32, 32)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 10 * 32**3 * 5


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_case_is_one_clear_line_from_any_process(
    tmp_path: Path, write_preprocessed: WritePreprocessed, num_workers: int
) -> None:
    folder = write_preprocessed(tmp_path, VOLUMES)
    path = case_file(folder, CASES[4], "y")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError) as caught:
        batches(folder, [1], batch_size=1, num_workers=num_workers)
    assert str(caught.value).startswith(f"{path}: damaged")
    assert "Traceback" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bug_keeps_its_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int) -> None:
    def broken(*_: object) -> Arrays:
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(loader_module, "map_case", broken)
    with pytest.raises(RuntimeError, match="a bug of ours"):
        batches(folder, [1], num_workers=num_workers)


def vanish(path: Path) -> None:
    path.unlink()


def cut_off(path: Path) -> None:
    os.truncate(path, 200)


def overwrite(path: Path) -> None:
    status = path.stat()
    path.write_bytes(bytes(status.st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


@pytest.mark.parametrize(
    ("change", "kind", "num_workers"),
    [
        (vanish, "x", 0),
        (vanish, "y", 0),
        (cut_off, "x", 0),
        (cut_off, "y", 1),
        (overwrite, "x", 0),
        (overwrite, "y", 0),
    ],
)
def test_a_file_that_changes_under_way_is_one_clear_line(
    tmp_path: Path,
    write_preprocessed: WritePreprocessed,
    change: Callable[[Path], None],
    kind: str,
    num_workers: int,
) -> None:
    folder = write_preprocessed(tmp_path, VOLUMES)
    settings = replace(SETTINGS, batch_size=1, num_workers=num_workers)
    loader = make_training_loader("pytorch", folder, CASES, spec=SPEC, config=settings)
    for epoch in (1, 2):
        assert len(list(loader.epoch(epoch))) == len(CASES), "all of them are mapped by now"
    path = case_file(folder, CASES[0], kind)
    change(path)
    with pytest.raises(UserError) as caught:
        list(loader.epoch(3))
    assert str(caught.value).startswith(f"{path}: {'vanished' if change is vanish else 'changed'} while training")


def test_a_file_that_changes_while_it_is_mapped_is_noticed(
    tmp_path: Path, write_preprocessed: WritePreprocessed, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_preprocessed(tmp_path, VOLUMES)
    dataset = CropDataset(folder, CASES, load_boxes(folder, CASES, 3), SETTINGS)

    def map_and_cut(data_dir: Path, case: str) -> Arrays:
        arrays = map_case(data_dir, case)
        cut_off(case_file(data_dir, case, "x"))
        return arrays

    monkeypatch.setattr(loader_module, "map_case", map_and_cut)
    with pytest.raises(UserError, match=rf"{CASES[0]}_x\.npy: changed while training"):
        _ = dataset[1, 0]


def test_a_worker_that_a_cut_off_file_kills_is_told_with_the_file(
    tmp_path: Path, write_preprocessed: WritePreprocessed, monkeypatch: pytest.MonkeyPatch
) -> None:
    # SIGBUS, of which torch says that /dev/shm is full.
    folder = write_preprocessed(tmp_path, {case: made_up((40, 40, 40), 1) for case in CASES})
    path = case_file(folder, CASES[3], "x")
    read = loader_module._windows

    def cut_and_read(*arguments: Any) -> NDArray[Any]:
        cut_off(path)
        return read(*arguments)

    monkeypatch.setattr(loader_module, "_windows", cut_and_read)
    settings = replace(SETTINGS, batch_size=1, num_workers=1)
    loader = make_training_loader("pytorch", folder, CASES[3:4], spec=SPEC, config=settings)
    with pytest.raises(UserError, match=rf"{CASES[3]}_x\.npy: its 200 bytes and the 64128 of .* cannot hold the same"):
        list(loader.epoch(1))


def test_a_killed_worker_is_told_with_its_case_and_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second = [
        CASES[index]
        for _, index in EpochSampler(cases=len(CASES), batch_size=2, rank=0, ranks=1, seed=SETTINGS.order_seed).batches(
            1
        )[1]
    ]
    named = ", ".join(second)

    def killed(data_dir: Path, case: str) -> Arrays:
        if case in second:
            time.sleep(0.5)  # until the first batch is on its way
            os.kill(os.getpid(), signal.SIGKILL)
        return map_case(data_dir, case)

    monkeypatch.setattr(loader_module, "map_case", killed)
    with pytest.raises(UserError, match=rf"DataLoader worker .* while waiting for {named}; .* GiB .*/dev/shm"):
        batches(folder, [1], num_workers=1)


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()], ids=repr)
def test_a_worker_killed_with_a_batch_on_its_way_is_told_alike(
    error: Exception, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch fetches a batch's memory from the worker: if it is gone, the pipe raises, not torch."""
    loader = PytorchLoader(CropDataset(folder, CASES, load_boxes(folder, CASES, 3), SETTINGS), SETTINGS)

    def broken() -> Iterator[None]:
        raise error
        yield

    monkeypatch.setattr(type(loader._loader), "__iter__", lambda self: broken())
    with pytest.raises(UserError, match=r"a DataLoader worker was killed \(.+\) while waiting for case_.*; .* GiB"):
        list(loader.epoch(1))


def test_a_hanging_worker_ends_the_epoch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(data_dir: Path, case: str) -> Arrays:
        signal.pause()
        raise AssertionError(data_dir, case)

    monkeypatch.setattr(loader_module, "map_case", hang)
    expected = r"DataLoader timed out after 1 seconds while waiting for case_.*; raise --worker_timeout, then --resume"
    with pytest.raises(UserError, match=expected):
        batches(folder, [1], num_workers=1, worker_timeout_s=1)


def test_the_synthetic_loader_serves_32_volumes_64_times(tmp_path: Path) -> None:
    assert len(synthetic_cases()) == 64
    spec = replace(SPEC, channels=2)
    made = {}
    for seed in (22, 22, 23):
        settings = replace(SETTINGS, patch=(4, 5, 6), sample_seed=seed)
        loader = make_training_loader("synthetic", tmp_path / "nowhere", synthetic_cases(), spec=spec, config=settings)
        epoch = list(loader.epoch(1))
        assert len(loader) == len(epoch) == 32
        if seed in made:
            assert_same([epoch], [made[seed]])
        made[seed] = epoch
    assert not torch.equal(made[22][0]["image"], made[23][0]["image"])
    images = torch.cat([batch["image"] for batch in made[22]])
    labels = torch.cat([batch["label"] for batch in made[22]])
    assert (images.shape, images.dtype) == ((64, 2, 4, 5, 6), torch.float32)
    assert (labels.shape, labels.dtype) == ((64, 1, 4, 5, 6), torch.uint8)
    assert len(images.unique(dim=0)) == 32
    assert torch.equal(images[:32], images[32:])
    assert labels.unique().tolist() == [0, 1, 2]
    assert (images.min() >= 0, images.max() < 1) == (True, True)


def test_the_synthetic_loader_splits_its_samples_over_ranks(tmp_path: Path) -> None:
    settings = replace(SETTINGS, patch=(2, 2, 2), batch_size=5, ranks=3, rank=2)
    loader = make_training_loader("synthetic", tmp_path, synthetic_cases(), spec=SPEC, config=settings)
    assert len(loader) == len(list(loader.epoch(4))) == 64 // 15
    assert all(len(batch["image"]) == 5 for batch in loader.epoch(1))


def test_an_unknown_loader_is_one_clear_line(folder: Path) -> None:
    with pytest.raises(UserError, match=r"--loader 'dali': unknown loader; available: .*pytorch, synthetic"):
        make_training_loader("dali", folder, CASES, spec=SPEC, config=SETTINGS)


def test_an_evaluation_case_is_whole(folder: Path) -> None:
    case = load_evaluation_case(folder, CASES[2])
    assert case.case == CASES[2]
    assert (case.image.dtype, case.label.dtype) == (torch.float32, torch.uint8)
    np.testing.assert_array_equal(case.image.numpy(), VOLUMES[CASES[2]][0][np.newaxis])
    np.testing.assert_array_equal(case.label.numpy(), VOLUMES[CASES[2]][1][np.newaxis])
    (case.image.add_(1), case.label.add_(1))  # its own memory, not the file's
    np.testing.assert_array_equal(np.load(case_file(folder, CASES[2], "x")), VOLUMES[CASES[2]][0])


def test_an_evaluation_case_that_does_not_fit_is_one_clear_line(
    tmp_path: Path, write_preprocessed: WritePreprocessed
) -> None:
    image, label = made_up((4, 5, 6), 1)
    folder = write_preprocessed(tmp_path, {"a": (image, label), "b": (image, label[:, :3])})
    case_file(folder, "a", "x").unlink()
    with pytest.raises(UserError, match=r"a_x\.npy: missing"):
        load_evaluation_case(folder, "a")
    with pytest.raises(UserError, match=r"b: image \(1, 4, 5, 6\) and label \(1, 3, 5, 6\) differ"):
        load_evaluation_case(folder, "b")
    os.truncate(case_file(folder, "b", "y"), 130)
    with pytest.raises(UserError, match=r"b_y\.npy: damaged"):
        load_evaluation_case(folder, "b")
