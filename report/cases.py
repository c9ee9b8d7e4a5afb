"""Pictures of the worst, the median and the best case: three planes, truth and prediction as outlines.

The prediction is the evaluation's: the checkpoint's best network, the run's windows, the part of a volume that counts.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from numpy.typing import NDArray
from torch import Tensor, nn

from common.errors import UserError
from common.files import replacing
from common.registry import Spec
from data_loading.data_loader import load_evaluation_case
from data_loading.dataset import read_spec_and_split
from data_loading.index import INDEX_NAME, read_index
from data_loading.spec import DatasetSpec
from model.registry import build_network
from report.records import Run
from runtime.checkpoint.format import Checkpoint, load, load_network
from runtime.evaluation import SlidingWindowConfig
from runtime.inference import sliding_window
from runtime.memory_format import to_device
from runtime.precision import Precision, choose_precision

# Bright on a black ground, and told apart however one sees colours; the prediction is dashed besides.
TRUTH, PREDICTION = "#56b4e9", "#f0a818"
# Axis by axis towards left, back and feet: a plane's rows and columns then run as radiologists hang it, the patient's
# right on the picture's left, the head or the nose above.
HANGING = ("L", "P", "I")
PLANES = ("sagittal", "coronal", "axial")  # across the axis of the same place in `HANGING`
# Volumes of the reference come without their geometry; KiTS19's axes run from head to feet, front to back and so on.
KITS19_AXES = np.array([[0.0, 0, -1, 0], [0, -1, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 1]])
INCHES, DPI = 3.2, 200


@dataclass(frozen=True)
class Picture:
    """One plane: a PNG, and in words what it shows."""

    plane: str
    told: str
    png: bytes


@dataclass(frozen=True)
class Shown:
    """A case and its pictures; `role` is worst, median or best, `dice` per class as evaluated."""

    role: str
    case: str
    dice: list[float]
    pictures: list[Picture]


@dataclass(frozen=True)
class Hung:
    """A volume as it is looked at: image, truth and prediction (L, P, I), and a voxel's size along them in mm."""

    image: NDArray[np.float32]
    truth: NDArray[np.uint8]
    prediction: NDArray[np.uint8]
    spacing_mm: tuple[float, ...]


def mean_of(row: Sequence[float]) -> float:
    return sum(row) / len(row) if row else math.nan


def worst_first(per_case: Mapping[str, Sequence[float]]) -> list[str]:
    """Cases from the lowest mean Dice to the highest, what is no number first."""

    def key(case: str) -> tuple[float, str]:
        mean = mean_of(per_case[case])
        return (mean if math.isfinite(mean) else -1.0, case)

    return sorted(per_case, key=key)


def chosen(per_case: Mapping[str, Sequence[float]]) -> dict[str, str]:
    """The case of each role, a case once; of few cases the worst and the best come first."""
    order = worst_first(per_case)
    places = {"worst": 0, "best": len(order) - 1, "median": (len(order) - 1) // 2}
    roles: dict[str, str] = {}
    for role, index in places.items():
        if order and order[index] not in roles.values():
            roles[role] = order[index]
    return {role: roles[role] for role in ("worst", "median", "best") if role in roles}


def draw_cases(
    run: Run,
    checkpoint: Path | None,
    data_dir: Path | None,
    device: torch.device,
    folder: Path,
    model: Spec | None = None,
) -> list[Shown]:
    """Predicts and draws the chosen cases of the best evaluation, each picture as FOLDER/ROLE_PLANE.png too.

    Args:
        checkpoint, data_dir: None: where the run had them.
        model: the network's spec, where the user gave it; None: the checkpoint's.

    Raises:
        UserError: nothing to draw, or data or checkpoint are gone or of another run.
    """
    best = run.best
    if best is None or not best.per_case:
        raise UserError("nothing was evaluated")
    path = checkpoint or _checkpoint_of(run)
    data_dir = data_dir or Path(run.config["data_dir"])
    spec, _ = read_spec_and_split(data_dir, [])
    loaded = load(path, "checkpoint")
    if loaded.seed is not None and loaded.seed != run.seeds.get("master"):
        raise UserError(f"{path} is of another run")
    if loaded.config and loaded.best_epoch != best.epoch:
        raise UserError(f"the best state in {path} is of epoch {loaded.best_epoch}, not of {best.epoch}")
    config = {**(loaded.config or run.config), **({"model": model} if model else {})}
    network = _network(config, spec, loaded, device)
    scoring = SlidingWindowConfig(
        window=_shape(config["val_input_shape"]),
        overlap=float(config["overlap"]),
        batch_size=int(config["val_batch_size"]),
        classes=len(spec.classes),
        padding_value=spec.padding_value,
        crops_remainder=spec.crops_remainder,
    )
    precision = choose_precision(bool(config["amp"]), str(config["amp_dtype"]), device)
    shown = []
    for role, case in chosen(best.per_case).items():
        hung = _hang(data_dir, case, spec, network, scoring, precision)
        pictures = list(draw_planes(hung, f"{role} case {case}"))
        for picture in pictures:
            with replacing(folder / f"{role}_{picture.plane}.png") as temporary:
                temporary.write_bytes(picture.png)
        shown.append(Shown(role, case, best.per_case[case], pictures))
    return shown


def _checkpoint_of(run: Run) -> Path:
    """Where the run keeps its checkpoint; beside the log where the folder was moved."""
    asked = run.config.get("save_ckpt_path")
    places = [Path(asked), run.folder / Path(asked).name] if asked else [run.folder / "checkpoint.pth"]
    for path in places:
        if path.is_file():
            return path
    raise UserError(f"no checkpoint at {places[0]}")


def _shape(values: Sequence[int]) -> tuple[int, int, int]:
    d, h, w = (int(n) for n in values)
    return d, h, w


def _network(config: Mapping[str, Any], spec: DatasetSpec, loaded: Checkpoint, device: torch.device) -> nn.Module:
    network = build_network(
        config["model"],
        spec.channels,
        len(spec.classes),
        normalization=config["normalization"],
        activation=config["activation"],
    )
    load_network(network, loaded.best, loaded.path)
    to_device(network, device, config["layout"])
    return network.eval()


@torch.inference_mode()
def _hang(
    data_dir: Path, case: str, spec: DatasetSpec, network: nn.Module, scoring: SlidingWindowConfig, precision: Precision
) -> Hung:
    """Predicts what is scored of a case, and turns it to where people look from."""
    loaded = load_evaluation_case(data_dir, case)
    kept = scoring.kept(loaded.image.shape[2:])
    image, label = loaded.image[..., *kept], loaded.label[..., *kept]

    def predict(windows: Tensor) -> Tensor:
        with precision.autocast():
            logits: Tensor = network(windows)
        return logits

    logits = sliding_window(
        image.to(precision.device),
        predict,
        scoring.window,
        scoring.overlap,
        padding_value=scoring.padding_value,
        batch_size=scoring.batch_size,
    )
    prediction = logits.argmax(1)[0].to("cpu", torch.uint8)
    affine, own_mm = KITS19_AXES, (1.0, 1.0, 1.0)
    if (data_dir / INDEX_NAME).is_file():
        record = read_index(data_dir / INDEX_NAME).cases[case]
        if record.transform is not None:
            affine, own_mm = record.transform.cut.affine, record.transform.spacing_mm
    turn = hanging(affine)
    spacing_mm = np.empty(3)
    spacing_mm[turn[:, 0].astype(int)] = spec.spacing_mm or own_mm
    seen, truth, predicted = (
        apply_orientation(array.numpy(), turn) for array in (image[0, 0], label[0, 0], prediction)
    )
    return Hung(seen, truth, predicted, tuple(spacing_mm))


def hanging(affine: NDArray[np.float64]) -> NDArray[Any]:
    """What `apply_orientation` does with a volume of this affine so that its axes run as `HANGING` says."""
    return ornt_transform(io_orientation(affine), axcodes2ornt(HANGING))


def centre_of(mask: NDArray[Any]) -> tuple[int, ...]:
    """A place amid the foreground whose three planes all cut it; the volume's middle where there is none."""
    found = np.argwhere(mask)
    if not len(found):
        return tuple(size // 2 for size in mask.shape)
    # A voxel of the foreground, the nearest to its centre of mass: the centre itself may lie between two kidneys.
    nearest = found[((found - found.mean(0)) ** 2).sum(1).argmin()]
    return tuple(int(index) for index in nearest)


def draw_planes(hung: Hung, name: str) -> Iterator[Picture]:
    foreground = hung.truth if hung.truth.any() else hung.prediction
    centre = centre_of(foreground)
    low, high = np.percentile(hung.image, (1, 99.5))
    for axis in (2, 1, 0):
        if min(size for other, size in enumerate(hung.image.shape) if other != axis) == 1:
            continue  # a picture's edge
        # Transposed: what runs down the picture is the later of the two axes that are left.
        arrays: tuple[NDArray[Any], ...] = (hung.image, hung.truth, hung.prediction)
        image, truth, prediction = (np.take(array, centre[axis], axis).T for array in arrays)
        across_mm, down_mm = (hung.spacing_mm[other] for other in range(3) if other != axis)
        yield Picture(
            PLANES[axis],
            f"{PLANES[axis]} plane of the {name}, truth and prediction outlined",
            _png(image, truth, prediction, down_mm / across_mm, (float(low), float(high))),
        )


def _png(
    image: NDArray[np.float32],
    truth: NDArray[np.uint8],
    prediction: NDArray[np.uint8],
    aspect: float,
    window: tuple[float, float],
) -> bytes:
    """One plane as a square picture; classes are outlined one by one, so that a border between two is seen."""
    figure = Figure(figsize=(INCHES, INCHES), facecolor="black")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.imshow(
        image,
        cmap="gray",
        vmin=window[0],
        vmax=max(window[1], window[0] + 1e-6),
        aspect=aspect,
        interpolation="bilinear",
    )
    # Where the two agree, the wide line is seen on both sides of the narrow one.
    lines = ((truth, TRUTH, "solid", 2.4), (prediction, PREDICTION, (0, (3.0, 1.5)), 1.2))
    for mask, colour, line, width in lines:
        for value in np.unique(mask[mask > 0]):
            # Half a voxel of nothing around: an outline closes at the picture's edge too.
            outlined = np.pad((mask == value).astype(np.float32), 1)
            rows, columns = (np.arange(-1, size + 1) for size in mask.shape)
            axes.contour(columns, rows, outlined, levels=[0.5], colors=[colour], linewidths=width, linestyles=[line])
    axes.set(xlim=(-0.5, image.shape[1] - 0.5), ylim=(image.shape[0] - 0.5, -0.5))
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI, facecolor="black")
    return drawn.getvalue()
