"""Volumes and components of masks with known answers."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from data_loading.io.volume import Geometry
from prediction.volumes import measure, write_table

CLASSES = ("background", "kidney", "tumour", "cyst")


def test_volumes_follow_the_affine_and_components_share_faces() -> None:
    affine = np.array([[2.0, 0, 0, 9], [0, 3, 0.5, 0], [0, 0, 5, 0], [0, 0, 0, 1]])  # tilted gantry
    mask = np.zeros((6, 6, 6), np.uint8)
    mask[0, 0, 0] = mask[1, 1, 1] = mask[1, 1, 2] = 1  # the first two share a corner
    mask[5, 5, 5] = 2
    rows = measure("scan", mask, Geometry(affine, (6, 6, 6), (2.0, 3.0, 5.02)), CLASSES)
    assert [(row.name, row.voxels, row.components) for row in rows] == [
        ("kidney", 3, 2),
        ("tumour", 1, 1),
        ("cyst", 0, 0),
    ]
    assert [row.volume_ml for row in rows] == pytest.approx([0.09, 0.03, 0])
    assert str(rows[1]) == "scan tumour 0.030 ml 1 component"
    assert str(replace(rows[1], volume_ml=5.864e-5)) == "scan tumour 5.86e-05 ml 1 component"


def test_the_table_is_read_back(tmp_path: Path) -> None:
    mask = np.ones((2, 2, 2), np.uint8)
    rows = measure('a "scan", no', mask, Geometry(np.eye(4), (2, 2, 2), (1, 1, 1)), CLASSES)
    write_table(tmp_path / "volumes.csv", rows)
    with (tmp_path / "volumes.csv").open() as stream:
        read = list(csv.DictReader(stream))
    assert [row["scan"] for row in read] == ['a "scan", no'] * 3
    assert read[0] == {
        "scan": 'a "scan", no',
        "label": "1",
        "name": "kidney",
        "voxels": "8",
        "volume_ml": "0.008",
        "components": "1",
    }
    with pytest.raises(UserError, match="cannot be written"):
        write_table(tmp_path / "none" / "volumes.csv", rows)
