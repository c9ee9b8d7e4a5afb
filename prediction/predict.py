"""`--exec_mode predict`: scans in, masks on the scans' own grids out, with one checkpoint or the mean of several.

    python3 main.py --exec_mode predict --load_ckpt_path C [C2 …] --scan IN --output OUT

A scan is turned to run as the training scans did, preprocessed by the checkpoint's own spec, cut into windows as in an
evaluation (padded, never cropped), and its mean probabilities go back to the scan's grid before the arg-max.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common import registry
from common.errors import UserError
from common.messages import logger, note
from data_loading.dataset import read_spec_and_split
from data_loading.io.scan_discovery import Source, find_sources, is_file_name, probabilities_file, stem
from data_loading.io.volume import Geometry, Volume
from data_loading.preprocessing import GridTransform, preprocess_image, to_source_grid
from data_loading.spec import KITS19, KITS19_ORIENTATION, DatasetSpec
from model.registry import build_network, check_window
from prediction.memory import READ_BYTES, Budget, Place, Sizes, places, window_bytes
from prediction.volumes import Row, measure, write_table
from runtime.arguments import RunConfig, with_checkpoint_network
from runtime.checkpoint import format as checkpoints
from runtime.checkpoint.format import Checkpoint
from runtime.distributed.world import World
from runtime.inference import sliding_window
from runtime.memory_format import to_device
from runtime.precision import Precision, choose_precision
from runtime.seeding import seed_process

VOLUMES_NAME = "volumes.csv"
# Which augmentations flip, and by which argument they say along what axes: all of them where it is left out.
FLIPPED_BY = {"mlperf": "flips", "flips": "axes"}


@dataclass(frozen=True)
class Member:
    """One network of an ensemble, with the settings that its evaluation had.

    Attributes:
        amp, amp_dtype: as on the command line; what they mean depends on where it computes.
        layout: of the network's memory.
    """

    network: nn.Module
    window: tuple[int, int, int]
    overlap: float
    amp: bool
    amp_dtype: str
    layout: str


@dataclass(frozen=True)
class Predictor:
    """All that a scan's prediction needs but the scan.

    Attributes:
        flips: of the axes D, H, W of the network's grid; the mean is taken over all of them.
        batch_size: windows computed at once, where the memory is there.
    """

    members: tuple[Member, ...]
    spec: DatasetSpec
    flips: tuple[tuple[int, ...], ...]
    batch_size: int
    budget: Budget


def main(config: RunConfig, given: frozenset[str], world: World) -> int:
    """Predicts this rank's share of the scans; rank 0 writes the table of volumes."""
    assert config.scan is not None
    assert config.output is not None
    seed_process(0, deterministic=config.cudnn_deterministic, autotune=config.cudnn_benchmark)
    predictor, notes = make_predictor(config, given, world)
    sources = find_sources(config.scan, config.output, config.series)
    folder = config.output.parent if is_file_name(config.output) else config.output
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {config.output}: cannot be made: {error.strerror}") from None
    if world.is_main:
        for line in notes:
            note(line)
    rows: list[Row] = []
    faults = []
    for source in world.shard(sources):
        try:
            rows += predict_scan(source, predictor, config.save_probabilities)
        except (UserError, OSError) as error:  # the other scans are predicted all the same
            faults.append(str(error))
            logger.error(str(error))
    rows = sorted(itertools.chain.from_iterable(world.gather(rows)))
    faults = list(itertools.chain.from_iterable(world.gather(faults)))
    if world.is_main and rows:
        named = is_file_name(config.output)
        path = folder / (f"{stem(config.output)}_{VOLUMES_NAME}" if named else VOLUMES_NAME)
        write_table(path, rows)
        print("".join(f"{row}\n" for row in rows), end="", flush=True)
    if len(faults) == 1 == len(sources):
        raise UserError(faults[0])
    if faults:
        raise UserError(f"{len(faults)} of {len(sources)} scans could not be predicted; the first: {faults[0]}")
    return 0


def make_predictor(config: RunConfig, given: frozenset[str], world: World) -> tuple[Predictor, list[str]]:
    """Loads the checkpoints; and lines for the user.

    Raises:
        UserError: one is missing, damaged or without the data set's constants, or they are of different data sets.
    """
    members, specs, notes = [], [], []
    for path in config.load_ckpt_path:
        loaded = checkpoints.load(path)
        spec, note = spec_of(loaded, config.data_dir if "data_dir" in given else None)
        own = with_checkpoint_network(config, given, loaded.config)
        channels, classes = spec.channels, len(spec.classes)
        network = build_network(
            own.model, channels, classes, normalization=own.normalization, activation=own.activation
        )
        check_window(network, own.val_input_shape, "--val_input_shape", channels=channels, classes=classes)
        checkpoints.load_network(network, loaded.state(config.checkpoint)[0], path)
        to_device(network.eval(), world.device, own.layout)
        members.append(Member(network, own.val_input_shape, own.overlap, own.amp, own.amp_dtype, own.layout))
        specs.append(spec)
        notes += [note] if note else []
        notes += flips_note(config.test_time_flips, loaded)
        if spec != specs[0]:
            raise UserError(
                f"--load_ckpt_path {path} is of another data set ({spec.name}) than the first "
                f"({specs[0].name}), or one preprocessed otherwise: nothing to average"
            )
    axes = ["DHW".index(axis) + 2 for axis in config.test_time_flips]
    flips = tuple(itertools.chain.from_iterable(itertools.combinations(axes, n) for n in range(len(axes) + 1)))
    budget = Budget(config.max_memory_gb, world.device)
    return Predictor(tuple(members), specs[0], flips, config.val_batch_size, budget), list(dict.fromkeys(notes))


def flips_note(flips: str, loaded: Checkpoint) -> list[str]:
    """A line where a network is shown flips that its training never made: it scores worse on them than without."""
    stored = loaded.config.get("augment", "mlperf")
    specs = [stored] if isinstance(stored, str) else stored
    trained = ""
    for name, arguments in (registry.parse(spec, "--augment") for spec in specs):
        if name in FLIPPED_BY:
            trained += arguments.get(FLIPPED_BY[name], "DHW")
    strange = "".join(axis for axis in flips if axis not in trained)
    told = " ".join(specs) or "no augmentation"
    return [f"--test_time_flips {strange}: {loaded.path} was trained without ({told})"] if strange else []


def spec_of(loaded: Checkpoint, data_dir: Path | None) -> tuple[DatasetSpec, str]:
    """The constants of the data set that a checkpoint was trained on; and a line for the user, or "".

    Args:
        data_dir: the preprocessed folder, for a checkpoint that does not hold them.

    Raises:
        UserError: nothing tells what a scan must go through.
    """
    if loaded.spec is not None:
        try:
            return DatasetSpec.from_json(loaded.spec), ""
        except (UserError, TypeError, AttributeError):
            raise UserError(f"--load_ckpt_path {loaded.path}: its data set's spec is of another version") from None
    if data_dir is not None:
        return read_spec_and_split(data_dir, [])[0], ""
    if loaded.config:
        raise UserError(
            f"--load_ckpt_path {loaded.path} does not hold its data set's constants, as an earlier version "
            "wrote it; give --data_dir, the preprocessed folder that it was trained on"
        )
    note = f"{loaded.path} is another program's: taken for one of KiTS19 (of another data set: give --data_dir)"
    return replace(KITS19, orientation=KITS19_ORIENTATION), note


def predict_scan(source: Source, predictor: Predictor, save_probabilities: bool) -> list[Row]:
    """Predicts one scan and writes its mask, and its probabilities beside it; the volume of each class.

    Raises:
        UserError: the scan is damaged, has other channels than the network, or needs more memory than there may be.
    """
    spec = predictor.spec
    predictor.budget.check_host(READ_BYTES * spec.channels * source.voxels(), source.name)
    scan = source.read(spec.channels)
    geometry = scan.geometry
    if len(scan.array) != spec.channels:
        raise UserError(f"{source.name}: has {len(scan.array)} channel(s), the network takes {spec.channels}")
    image, transform = preprocess_image(scan, spec)
    del scan  # not needed again, and a scan may be half of the memory
    path = source.output.with_name(f"{stem(source.output)}_probabilities.nii.gz")
    probabilities = predict_image(image, transform, predictor, source.name)
    classes = (values[0] for values in classes_on_source_grid(probabilities, transform))
    if save_probabilities:
        with probabilities_file(path, geometry, len(spec.classes)) as add:
            mask = arg_max(_each(classes, add), geometry)
    else:
        mask = arg_max(classes, geometry)
    for line in source.write(Volume(mask[np.newaxis], geometry), spec.classes):
        note(line)
    return measure(source.name, mask, geometry, spec.classes)


def _each(
    classes: Iterator[NDArray[np.float32]], add: Callable[[NDArray[np.float32]], None]
) -> Iterator[NDArray[np.float32]]:
    for values in classes:
        add(values)
        yield values


def classes_on_source_grid(
    probabilities: NDArray[np.float32], transform: GridTransform
) -> Iterator[NDArray[np.float32]]:
    """(K, D, H, W) on the network's grid -> (1, *source shape) of one class after the other.

    One at a time: all together would be the largest thing in memory, and the numbers are the same.
    """
    for value in range(len(probabilities)):
        yield to_source_grid(probabilities[value : value + 1], transform, first=value)


def arg_max(classes: Iterator[NDArray[np.float32]], geometry: Geometry) -> NDArray[np.uint8]:
    """The class of the largest probability in each voxel, the first of equal ones: (D, H, W) uint8."""
    mask = np.zeros(geometry.shape, np.uint8)
    best = np.full(geometry.shape, -np.inf, np.float32)
    for value, probability in enumerate(classes):
        is_larger = probability > best
        np.copyto(mask, np.uint8(value), where=is_larger)
        np.maximum(best, probability, out=best)
    return mask


def predict_image(
    image: NDArray[np.float32], transform: GridTransform, predictor: Predictor, name: str
) -> NDArray[np.float32]:
    """Mean probabilities of a preprocessed scan, (C, D, H, W) -> (K, D, H, W).

    Computed where there is room: on the GPU; with windows on the GPU and the volume on the host; on the CPU.

    Raises:
        UserError: not even the host may hold it.
    """
    members, spec = predictor.members, predictor.spec
    several = len(members) * len(predictor.flips) > 1
    sizes = [
        Sizes.of(
            image.shape,
            transform,
            len(spec.classes),
            member.window,
            member.overlap,
            spec.padding_value,
            several,
            window_bytes(member.network, spec.channels, member.window),
        )
        for member in members
    ]
    largest = max(sizes, key=lambda one: one.volume + one.window)
    tried = ""
    for candidate in places(largest, predictor.budget, predictor.batch_size, name):
        if candidate.note:
            note(f"{name}: {candidate.note}{tried}")
        try:
            return mean_probabilities(torch.from_numpy(image)[None], predictor, candidate)
        except torch.OutOfMemoryError:
            tried = " (the GPU's memory ran out)"
            torch.cuda.empty_cache()
    raise UserError(f"{name}: the GPU's memory ran out, and the host's is too small")


@torch.inference_mode()
def mean_probabilities(image: Tensor, predictor: Predictor, where: Place) -> NDArray[np.float32]:
    """The mean over members and flips of the softmax of their logits; (1, C, D, H, W) -> (K, D, H, W) on the host."""
    total: Tensor | None = None
    image = image.to(where.volume)
    for member in predictor.members:
        to_device(member.network, where.network, member.layout)
        precision = choose_precision(member.amp, member.amp_dtype, where.network)
        for axes in predictor.flips:
            own = _logits(image.flip(axes) if axes else image, member, precision, predictor.spec, where)
            # The softmax in place: another K volumes would be the largest thing in memory.
            own.sub_(own.amax(dim=1, keepdim=True)).exp_().div_(own.sum(dim=1, keepdim=True))
            own = own.flip(axes) if axes else own
            total = own if total is None else total.add_(own)
            del own
    assert total is not None
    total /= len(predictor.members) * len(predictor.flips)
    return total[0].cpu().numpy()


def _logits(image: Tensor, member: Member, precision: Precision, spec: DatasetSpec, where: Place) -> Tensor:
    def predict(windows: Tensor) -> Tensor:
        with precision.autocast():
            logits: Tensor = member.network(windows.to(where.network))
        return logits.to(where.volume)

    return sliding_window(
        image, predict, member.window, member.overlap, padding_value=spec.padding_value, batch_size=where.batch_size
    )
