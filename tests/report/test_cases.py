"""Images of cases: which are chosen, their orientation, outlines in the right places."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="the report is drawn by matplotlib, which is not installed")

from matplotlib.image import imread
from nibabel.orientations import apply_orientation

from common.registry import Spec
from data_loading.spec import DatasetSpec
from model.unet3d import Unet3d
from report import cases, figures
from report.cases import OrientedCase
from report.records import Run
from runtime.arguments import RunConfig
from runtime.checkpoint.format import Checkpoint
from runtime.evaluation import SlidingWindowConfig
from runtime.test_time_flips import flips_of


def test_the_table_has_the_worst_case_first(tmp_path: Path) -> None:
    per_case = {"good": [0.9, 0.8], "bad": [0.1, 0.2], "none": [math.nan, 0.9], "fair": [0.5, 0.5]}
    assert cases.worst_first(per_case) == ["none", "bad", "fair", "good"]
    assert cases.choose_cases(per_case) == {"worst": "none", "median": "bad", "best": "good"}
    assert cases.choose_cases({"a": [1.0], "b": [0.0]}) == {"worst": "b", "best": "a"}
    assert cases.choose_cases({"a": [1.0]}) == {"worst": "a"}
    assert cases.choose_cases({}) == {}


@pytest.mark.parametrize(
    "affine",
    [
        np.diag([1.0, 1, 1, 1]),
        np.diag([-2.0, 1, -3, 1]),
        cases.KITS19_AXES,
        np.array([[0.1, 0.9, 0.2, 5], [0.1, 0.2, -2.8, 1], [-1.1, 0.1, 0.1, 0], [0, 0, 0, 1.0]]),
    ],
    ids=["RAS", "LAI", "KiTS19", "oblique"],
)
def test_images_have_the_patients_right_nose_and_head_first(affine: np.ndarray[Any, Any]) -> None:
    shape = (4, 5, 6)
    # The scanner's coordinates grow towards right, front and head.
    corners = np.array([[d, h, w] for d in (0, 3) for h in (0, 4) for w in (0, 5)])
    places = corners @ affine[:3, :3].T
    foremost = corners[(places / np.abs(places).max(0)).sum(1).argmax()]
    volume = np.zeros(shape)
    volume[tuple(foremost)] = 1
    turned = apply_orientation(volume, cases.radiological(affine))
    assert np.argwhere(turned).tolist() == [[0, 0, 0]]


def test_the_centre_is_within_the_foreground() -> None:
    mask = np.zeros((9, 9, 9), np.uint8)
    mask[1:4, 1:4, 1:4] = 1
    assert cases.centre_of(mask) == (2, 2, 2)
    mask[6:, 1:4, 1:4] = 2  # the middle is between the two
    assert mask[cases.centre_of(mask)]
    assert cases.centre_of(np.zeros((4, 6, 8), np.uint8)) == (2, 3, 4)


def coloured(png: bytes, colour: str) -> np.ndarray[Any, Any]:
    """Rows and columns, from 0 to 1, of the pixels of a colour."""
    pixels = imread(io.BytesIO(png), format="png")[..., :3]
    wanted = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    return np.argwhere(np.abs(pixels - wanted).max(-1) < 0.02) / np.array(pixels.shape[:2])


def test_planes_show_truth_and_prediction_in_the_right_places() -> None:
    """Truth at the patient's right, front and head; the prediction overlaps it, further left, back and down."""
    image = np.random.default_rng(0).normal(size=(40, 40, 40)).astype(np.float32)
    truth, prediction = np.zeros((2, 40, 40, 40), np.uint8)
    truth[4:16, 6:18, 8:20] = 1
    prediction[12:30, 12:32, 12:34] = 1
    case = OrientedCase(image=image, truth=truth, prediction=prediction, spacing_mm=(1, 1, 1))
    images = {image.plane: image for image in cases.draw_planes(case, "case")}
    assert list(images) == ["axial", "coronal", "sagittal"]
    # Edges of the truth in each plane (top, bottom, left, right): rows and columns of the remaining two axes.
    edges = {"axial": (6, 18, 4, 16), "coronal": (8, 20, 4, 16), "sagittal": (8, 20, 6, 18)}
    for plane, expected in edges.items():
        found = coloured(images[plane].png, figures.TRUTH) * 40
        measured = (found[:, 0].min(), found[:, 0].max(), found[:, 1].min(), found[:, 1].max())
        assert measured == pytest.approx(expected, abs=0.7), plane
        assert plane in images[plane].description
    assert coloured(images["sagittal"].png, figures.PREDICTION).size == 0  # it begins behind that plane
    assert len(coloured(images["axial"].png, figures.PREDICTION)) > 50


def test_planes_have_the_proportions_of_the_body() -> None:
    """Voxels of 1 x 1 x 4 mm: 40 x 40 x 10 of them are a cube, and fill the square image."""
    image = np.ones((40, 40, 10), np.float32)
    image[0] = 0
    truth = np.zeros((40, 40, 10), np.uint8)
    truth[10:30, 10:30, 4:6] = 1
    case = OrientedCase(image=image, truth=truth, prediction=truth * 0, spacing_mm=(1.0, 1.0, 4.0))
    coronal = list(cases.draw_planes(case, "case"))[1]
    found = coloured(coronal.png, figures.TRUTH)
    height, width = np.ptp(found, axis=0)
    assert height == pytest.approx(0.2, abs=0.03)
    assert width == pytest.approx(0.5, abs=0.03)


def test_a_2d_image_is_drawn_once_and_upright() -> None:
    """A volume of one slice, as `--dataset images` makes it: its edges are not drawn as planes."""
    image = np.random.default_rng(0).normal(size=(1, 30, 40)).astype(np.float32)
    truth = np.zeros((1, 30, 40), np.uint8)
    truth[0, 3:9, 20:36] = 1
    turn = cases.radiological(cases.KITS19_AXES)  # the axes of a 2-D image
    seen, mask = (apply_orientation(array, turn) for array in (image, truth))
    (image,) = cases.draw_planes(
        OrientedCase(image=seen, truth=mask, prediction=mask * 0, spacing_mm=(1.0, 1.0, 1.0)), "case"
    )
    assert image.plane == "axial"
    rows, columns = coloured(image.png, figures.TRUTH).T
    # Square, with 5 rows of black above and below.
    assert rows.min() * 40 - 5 == pytest.approx(3, abs=1)
    assert (columns.min() * 40, columns.max() * 40) == pytest.approx((20, 36), abs=1)


def test_cases_are_predicted_as_they_were_evaluated(tmp_path: Path) -> None:
    """Flags of the evaluation come from the checkpoint, as text from a log where it holds none."""
    spec = DatasetSpec(name="dummy", classes=("background", "kidney", "tumour"), ignore_label=9)
    flags = {"val_input_shape": [4, 4, 8], "overlap": 0.25, "test_time_flips": "DW", "val_batch_size": 3}
    weights = Unet3d(1, 3, filters=(3, 4)).state_dict()
    run = Run(folder=tmp_path, config=RunConfig(model=Spec("unet3d(filters=(3,4))")).to_json() | flags)
    loaded = Checkpoint(path=tmp_path, best=weights, last=weights)
    predictor = cases.make_predictor(run, spec, loaded, device=torch.device("cpu"), model=None)
    assert predictor.windows == SlidingWindowConfig(
        window=(4, 4, 8),
        overlap=0.25,
        batch_size=3,
        classes=3,
        padding_value=None,
        crops_remainder=False,
        ignore_label=9,
        flips=flips_of("DW"),
    )
    image = torch.randn(1, 1, 4, 4, 8)
    each = [predictor.network(image.flip(axes)).flip(axes) for axes in flips_of("DW")]
    assert torch.equal(predictor(image), torch.stack(each).mean(0).argmax(1)[0])
