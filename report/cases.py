"""Images of the worst, the median and the best case: three planes with ground truth and prediction as outlines.

The prediction is the one that was evaluated: the checkpoint's best network, the run's windows, the scored part of the
volume.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
from report.figures import Plane, draw_plane
from report.records import Evaluation, Run
from runtime.arguments import RunConfig, with_checkpoint_network
from runtime.build import make_sliding_window_config
from runtime.checkpoint.format import Checkpoint, load
from runtime.evaluation import SlidingWindowConfig
from runtime.inference import WindowedVolume, predict_windows
from runtime.network import load_trained
from runtime.precision import Precision, choose_precision
from runtime.test_time_flips import mean_over_flips

# Axes that run towards left, back and feet give planes in the radiological convention: the patient's right on the
# left of the image, head or nose at the top.
RADIOLOGICAL = ("L", "P", "I")
PLANES = ("sagittal", "coronal", "axial")  # perpendicular to the axis at the same index of `RADIOLOGICAL`
# The reference's preprocessed volumes have no geometry; KiTS19's axes run from head to feet, front to back, and so on.
KITS19_AXES = np.array([[0.0, 0, -1, 0], [0, -1, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 1]])


@dataclass(frozen=True, kw_only=True)
class PlaneImage:
    """One plane as PNG, with a description for the alt text."""

    plane: str
    description: str
    png: bytes


@dataclass(frozen=True, kw_only=True)
class ShownCase:
    """A case with its images.

    Attributes:
        role: "worst", "median" or "best".
        dice: per foreground class, as evaluated.
    """

    role: str
    case: str
    dice: list[float]
    images: list[PlaneImage]


@dataclass(frozen=True, kw_only=True)
class OrientedCase:
    """A case in the radiological orientation: arrays (L, P, I), and the size of a voxel along these axes in mm."""

    image: NDArray[np.float32]
    truth: NDArray[np.uint8]
    prediction: NDArray[np.uint8]
    spacing_mm: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """A trained network with the settings of its evaluation."""

    network: nn.Module
    windows: SlidingWindowConfig
    precision: Precision

    @torch.inference_mode()
    def __call__(self, image: Tensor) -> Tensor:
        """Returns the predicted classes of an image (1, C, D, H, W): (D, H, W) uint8 on the host."""
        windows = self.windows
        volume = WindowedVolume(
            image.to(self.precision.device), windows.window, windows.overlap, padding_value=windows.padding_value
        )
        predictor = mean_over_flips(self.precision.applied_to(self.network), windows.flips)
        slabs = predict_windows([volume], predictor, windows.batch_size)
        return torch.cat([slab.logits.argmax(1)[0].to("cpu", torch.uint8) for slab in slabs])


def mean_of(row: Sequence[float]) -> float:
    return sum(row) / len(row) if row else math.nan


def worst_first(per_case: Mapping[str, Sequence[float]]) -> list[str]:
    """Returns the cases by rising mean Dice, those without a finite one first."""

    def key(case: str) -> tuple[float, str]:
        mean = mean_of(per_case[case])
        return (mean if math.isfinite(mean) else -1.0, case)

    return sorted(per_case, key=key)


def choose_cases(per_case: Mapping[str, Sequence[float]]) -> dict[str, str]:
    """Returns the case for each role, each case once; if there are too few, worst and best take precedence."""
    order = worst_first(per_case)
    ranks = {"worst": 0, "best": len(order) - 1, "median": (len(order) - 1) // 2}
    roles: dict[str, str] = {}
    for role, rank in ranks.items():
        if order and order[rank] not in roles.values():
            roles[role] = order[rank]
    return {role: roles[role] for role in ("worst", "median", "best") if role in roles}


def draw_cases(
    run: Run,
    folder: Path,
    *,
    device: torch.device,
    checkpoint: Path | None = None,
    data_dir: Path | None = None,
    model: Spec | None = None,
) -> list[ShownCase]:
    """Predicts and draws the chosen cases of the best evaluation, each image as FOLDER/ROLE_PLANE.png too.

    Args:
        checkpoint: None: the run's own.
        data_dir: preprocessed data set; None: the one the run used.
        model: spec of the network, if the user gave one; None: the checkpoint's.

    Raises:
        UserError: nothing was evaluated, or the data or the checkpoint are missing or another run's.
    """
    best = run.best
    if best is None or not best.per_case:
        raise UserError("nothing was evaluated")
    data_dir = data_dir or Path(run.config["data_dir"])
    loaded = _load_checkpoint(run, checkpoint, best)
    spec, _ = read_spec_and_split(data_dir, [])
    predictor = make_predictor(run, spec, loaded, device=device, model=model)
    shown = []
    for role, case in choose_cases(best.per_case).items():
        images = list(draw_planes(_orient(data_dir, case, spec, predictor), f"{role} case {case}"))
        for image in images:
            with replacing(folder / f"{role}_{image.plane}.png") as temporary:
                temporary.write_bytes(image.png)
        shown.append(ShownCase(role=role, case=case, dice=best.per_case[case], images=images))
    return shown


def _load_checkpoint(run: Run, path: Path | None, best: Evaluation) -> Checkpoint:
    """Loads the run's checkpoint. Raises UserError if it is missing or does not hold the best evaluation's network."""
    if path is None:
        saved = run.config.get("save_ckpt_path")
        # Also beside the log, in case the folder was moved.
        candidates = [Path(saved), run.folder / Path(saved).name] if saved else [run.folder / "checkpoint.pth"]
        path = next(filter(Path.is_file, candidates), None)
        if path is None:
            raise UserError(f"no checkpoint at {candidates[0]}")
    loaded = load(path, "checkpoint")
    if loaded.seed is not None and loaded.seed != run.seeds.get("master"):
        raise UserError(f"{path} belongs to another run")
    if loaded.config and loaded.best_epoch != best.epoch:
        raise UserError(f"the best state in {path} is from epoch {loaded.best_epoch}, not {best.epoch}")
    return loaded


def make_predictor(
    run: Run, spec: DatasetSpec, loaded: Checkpoint, *, device: torch.device, model: Spec | None
) -> Predictor:
    """Returns the network with the flags that it was evaluated with."""
    stored, given = loaded.config or run.config, frozenset({"model"} if model else ())
    config = RunConfig(model=model or RunConfig.model, val_batch_size=int(stored["val_batch_size"]))
    config = with_checkpoint_network(config, given, stored)
    return Predictor(
        network=load_trained(loaded, config, spec, device),
        windows=make_sliding_window_config(config, spec),
        precision=choose_precision(config.amp, config.amp_dtype, device),
    )


def _orient(data_dir: Path, case: str, spec: DatasetSpec, predictor: Predictor) -> OrientedCase:
    """Predicts the scored part of a case and reorients it for viewing."""
    loaded = load_evaluation_case(data_dir, case)
    kept = predictor.windows.kept(loaded.image.shape[2:])
    image, label = loaded.image[..., *kept], loaded.label[..., *kept]
    affine, case_spacing_mm = KITS19_AXES, (1.0, 1.0, 1.0)
    if (data_dir / INDEX_NAME).is_file():
        record = read_index(data_dir / INDEX_NAME).cases[case]
        if record.transform is not None:
            affine, case_spacing_mm = record.transform.cropped.affine, record.transform.spacing_mm
    truth = label[0, 0].numpy()
    if spec.ignore_label is not None:
        truth = np.where(truth == spec.ignore_label, np.uint8(0), truth)
    reorientation = radiological(affine)
    spacing_mm = np.empty(3)
    spacing_mm[reorientation[:, 0].astype(int)] = spec.spacing_mm or case_spacing_mm
    return OrientedCase(
        image=apply_orientation(image[0, 0].numpy(), reorientation),
        truth=apply_orientation(truth, reorientation),
        prediction=apply_orientation(predictor(image).numpy(), reorientation),
        spacing_mm=tuple(spacing_mm),
    )


def radiological(affine: NDArray[np.float64]) -> NDArray[Any]:
    """Returns nibabel's orientation transform (3, 2) that turns a volume with this affine (4, 4) to `RADIOLOGICAL`."""
    return ornt_transform(io_orientation(affine), axcodes2ornt(RADIOLOGICAL))


def centre_of(mask: NDArray[Any]) -> tuple[int, ...]:
    """Returns an index within the foreground, through which all three planes are drawn; without one, the middle."""
    found = np.argwhere(mask)
    if not len(found):
        return tuple(size // 2 for size in mask.shape)
    # The foreground voxel nearest to the centre of mass: the centre itself may be between two kidneys.
    nearest = found[((found - found.mean(0)) ** 2).sum(1).argmin()]
    return tuple(int(index) for index in nearest)


def draw_planes(case: OrientedCase, name: str) -> Iterator[PlaneImage]:
    """Draws the axial, coronal and sagittal plane through the foreground; of a single slice, that slice alone.

    Args:
        name: of the case, for the descriptions.
    """
    centre = centre_of(case.truth if case.truth.any() else case.prediction)
    low, high = np.percentile(case.image, (1, 99.5))
    for axis in (2, 1, 0):
        if min(size for other, size in enumerate(case.image.shape) if other != axis) == 1:
            continue  # the edge of a 2-D image
        across_mm, down_mm = (case.spacing_mm[other] for other in range(3) if other != axis)
        plane = Plane(
            # Transposed: the later of the two remaining axes runs down the image.
            image=np.take(case.image, centre[axis], axis).T,
            truth=np.take(case.truth, centre[axis], axis).T,
            prediction=np.take(case.prediction, centre[axis], axis).T,
            aspect=down_mm / across_mm,
            window=(float(low), float(high)),
        )
        description = f"{PLANES[axis]} plane of the {name}, truth and prediction outlined"
        yield PlaneImage(plane=PLANES[axis], description=description, png=draw_plane(plane))
