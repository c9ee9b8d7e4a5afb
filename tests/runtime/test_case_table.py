"""The table of an evaluation: distances and volumes by closed form, the worst case first."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from data_loading.index import INDEX_NAME, CaseRecord, DatasetIndex, write_json
from data_loading.io.volume import Geometry
from data_loading.preprocessing import GridTransform
from data_loading.spec import DatasetSpec
from prediction.volumes import measure
from runtime.case_table import CaseTable
from runtime.logging.events import EvaluationStopped

SPEC = DatasetSpec(name="own", classes=("background", "kidney", "tumour"))
# 10 voxels of 2 mm became 19 of 1 mm: the ends stay.
TRANSFORM = GridTransform(
    source=Geometry(np.diag([2.0, 1, 1, 1]), (10, 20, 20), (2.0, 1.0, 1.0)),
    resampled_shape=(19, 20, 20),
    padding_before=(0, 0, 0),
    shape=(19, 20, 20),
)
PLAIN = GridTransform(
    source=Geometry(np.diag([2.0, 1, 1, 1]), (10, 20, 20), (2.0, 1.0, 1.0)),
    resampled_shape=(10, 20, 20),
    padding_before=(0, 0, 0),
    shape=(10, 20, 20),
)


def write_index(folder: Path, transforms: dict[str, GridTransform]) -> None:
    records = {
        case: CaseRecord(transform=transform, boxes={}, digests={}, source_stamp=[], statistics={})
        for case, transform in transforms.items()
    }
    index = DatasetIndex(spec=SPEC, split={"evaluation": list(records)}, cases=records)
    write_json(folder / INDEX_NAME, index.to_json())


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    records = {
        case: CaseRecord(transform=transform, boxes={}, digests={}, source_stamp=[], statistics={})
        for case, transform in (("a", PLAIN), ("b", TRANSFORM))
    }
    write_json(
        tmp_path / INDEX_NAME, DatasetIndex(spec=SPEC, split={"evaluation": ["a", "b"]}, cases=records).to_json()
    )
    return tmp_path


def block(*slices: slice, shape: tuple[int, int, int] = (10, 20, 20), value: int = 1) -> Tensor:
    label = torch.zeros(1, 1, *shape, dtype=torch.uint8)
    label[0, 0, *slices] = value
    return label


TRUE = block(slice(2, 7), slice(4, 14), slice(4, 14))
# One voxel further along the first axis, 2 mm.
MOVED = block(slice(3, 8), slice(4, 14), slice(4, 14))


def test_figures_of_a_block_that_moved(data_dir: Path) -> None:
    table = CaseTable(data_dir, SPEC, "evaluation")
    figures = table("a", MOVED, TRUE)
    assert figures.dtype == torch.float64
    assert table.size == 8
    assert figures[:4].tolist() == pytest.approx([1.0, 0.0, 1.0, 0.0])  # 500 voxels of 2 mm3 each
    surface_dice, none, distance_mm, no_distance = figures[4:].tolist()
    # The two faces that moved by 2 mm are wrong but for their rims; those along the movement stay surfaces.
    assert 0.4 < surface_dice < 0.8
    assert distance_mm == pytest.approx(2.0)
    assert not math.isfinite(none)
    assert not math.isfinite(no_distance)
    assert table("a", TRUE, TRUE)[[4, 6]].tolist() == [1.0, 0.0]


def test_voxels_with_the_ignore_label_are_in_no_figure(data_dir: Path) -> None:
    """Prediction and truth differ only where nothing counts, and beyond it all figures are those of equal masks."""
    true = TRUE.clone()
    true[0, 0, 5:] = 255
    table = CaseTable(data_dir, replace(SPEC, ignore_label=255), "evaluation")
    figures = table("a", block(slice(2, 9), slice(4, 14), slice(4, 14)).masked_fill(true == 255, 0), true)
    assert figures[:4].tolist() == pytest.approx([0.6, 0.0, 0.6, 0.0])  # planes 2 to 4
    assert figures[[4, 6]].tolist() == [1.0, 0.0]


def test_distances_are_those_of_the_resampled_grid(data_dir: Path) -> None:
    shape = (19, 20, 20)
    true = block(slice(2, 7), slice(4, 14), slice(4, 14), shape=shape)
    moved = block(slice(5, 10), slice(4, 14), slice(4, 14), shape=shape)
    figures = CaseTable(data_dir, SPEC, "evaluation")("b", moved, true)
    assert figures[0] == pytest.approx(0.5)
    assert figures[6] == pytest.approx(3.0)


def test_distances_are_those_of_a_turned_cropped_or_resized_grid(data_dir: Path) -> None:
    source = Geometry(np.diag([2.0, 3.0, 5.0, 1.0]), (10, 20, 30), (2.0, 3.0, 5.0))
    turned = GridTransform(
        source=source,
        resampled_shape=(12, 5, 10),
        padding_before=(0, 0, 0),
        shape=(16, 16, 16),
        orientation="SAR",
        crop=(3, 5, 0, 26, 14, 10),
    )
    picture = GridTransform(
        source=source, resampled_shape=(10, 40, 10), padding_before=(0, 0, 0), shape=(10, 40, 10), half_pixel=True
    )
    records = {
        case: CaseRecord(transform=way, boxes={}, digests={}, source_stamp=[], statistics={})
        for case, way in (("a", turned), ("b", picture))
    }
    write_json(
        data_dir / INDEX_NAME, DatasetIndex(spec=SPEC, split={"evaluation": ["a", "b"]}, cases=records).to_json()
    )
    table = CaseTable(data_dir, SPEC, "evaluation")
    # The turned axes are S, A and R; the first of them points against the stored one's direction.
    lengths = [np.linalg.norm(table._steps_of(case), axis=0) for case in "ab"]
    assert lengths[0] == pytest.approx((5 * 22 / 11, 3 * 8 / 4, 2.0))
    assert lengths[1] == pytest.approx((2.0, 1.5, 15.0))
    assert np.count_nonzero(table._steps_of("a")) == 3


@pytest.mark.parametrize("shear", [0.0, 0.24, -1.0])
def test_volumes_of_a_sheared_grid_are_those_that_prediction_measures(data_dir: Path, shear: float) -> None:
    affine = np.array([[0.9, 0, 0, 1], [0, 0.9, -1.2 * shear, 2], [0, 0, 1.2, 3], [0, 0, 0, 1]])
    source = Geometry(affine, (10, 20, 20), (0.9, 0.9, 1.2 * math.hypot(1, shear)))
    transforms = {
        "a": GridTransform(source=source, resampled_shape=(10, 20, 20), padding_before=(0, 0, 0), shape=(10, 20, 20)),
        # Twice as many voxels along D and W, and axes in another order.
        "b": GridTransform(
            source=source, resampled_shape=(39, 20, 19), padding_before=(0, 0, 0), shape=(39, 20, 19), orientation="SAR"
        ),
    }
    write_index(data_dir, transforms)
    table = CaseTable(data_dir, SPEC, "evaluation")
    figures = table("a", TRUE, TRUE)
    (row, _) = measure("a", TRUE[0, 0].numpy(), source, SPEC.classes)
    assert figures[0].item() == pytest.approx(row.volume_ml) == 500 * 0.9 * 0.9 * 1.2e-3
    fine = block(slice(2, 7), slice(4, 14), slice(4, 14), shape=(39, 20, 19))
    assert table("b", fine, fine)[0].item() == pytest.approx(row.volume_ml / 4)


def test_a_picture_has_surfaces_too(data_dir: Path) -> None:
    shape = (1, 20, 20)
    true, moved = (block(slice(0, 1), slice(4, 14), slice(a, a + 8), shape=shape) for a in (4, 7))
    figures = CaseTable(data_dir, SPEC, "evaluation")("none", moved, true)
    assert figures[6] == pytest.approx(3.0)


def test_the_worst_case_comes_first(data_dir: Path, tmp_path: Path) -> None:
    table = CaseTable(data_dir, SPEC, "test")
    table.keep({"a": [1.5, math.nan] + [0.25] * (table.size - 2), "b": [math.inf] * table.size})
    per_case = {"a": [0.9, 0.7], "b": [0.5, 0.4]}
    line = table.write(
        tmp_path / "logs",
        EvaluationStopped(epoch=3, mean_dice=0.6, dice=[0.7, 0.5], loss=0.1, seconds=1.0, per_case=per_case),
    )
    assert line.startswith(f"cases {tmp_path / 'logs' / 'evaluation.csv'}")
    with (tmp_path / "logs" / "evaluation.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["case"] for row in rows] == ["b", "a"]
    assert [row["subset"] for row in rows] == ["test", "test"]
    assert (rows[1]["mean_dice"], rows[1]["kidney_dice"], rows[1]["tumour_dice"]) == ("0.8", "0.9", "0.7")
    assert (rows[1]["kidney_volume_ml"], rows[1]["tumour_volume_ml"]) == ("1.5", "")
    assert rows[0]["kidney_true_volume_ml"] == ""
