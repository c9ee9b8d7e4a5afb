"""DICOM-SEG round trip: every frame refers to its source slice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest

from common.errors import UserError
from data_loading.io.volume import Geometry

pytest.importorskip("highdicom", reason="pip install '.[dicom]'")
import highdicom as hd

from data_loading.io import dicom
from data_loading.io.dicom_seg import read_header, read_segmentation, write_segmentation
from tests.data_loading.io.series import change, write_series

CLASSES = ("background", "kidney", "tumour")
GRID = Geometry(np.diag([-0.8, -0.6, 2.5, 1.0]), (5, 4, 6), (0.8, 0.6, 2.5))


def random_mask(shape: tuple[int, int, int]) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 3, (1, *shape)).astype(np.uint8)


def check(path: Path, mask: np.ndarray, series: dicom.Series) -> None:
    """Checks each slice's mask, looked up by the UID of the slice."""
    segmentation = hd.seg.segread(path)
    assert [segment.SegmentLabel for segment in segmentation.SegmentSequence] == list(CLASSES[1:])
    headers, _ = dicom.sorted_headers(series)
    dicom.fill_missing_uids(headers)
    found = segmentation.get_pixels_by_source_instance(
        [str(header.SOPInstanceUID) for header in headers], combine_segments=True, ignore_spatial_locations=False
    )
    np.testing.assert_array_equal(found.transpose(2, 1, 0), mask[0])
    for header in headers:
        assert segmentation.StudyInstanceUID == header.StudyInstanceUID
        assert segmentation.FrameOfReferenceUID == header.FrameOfReferenceUID


def test_every_frame_refers_to_its_slice(tmp_path: Path) -> None:
    write_series(tmp_path / "in", np.zeros(GRID.shape, np.int16), GRID)
    (series,) = dicom.find_series(tmp_path / "in")
    mask = random_mask(GRID.shape)
    assert write_segmentation(tmp_path / "mask.dcm", mask, series, CLASSES) == []
    check(tmp_path / "mask.dcm", mask, series)
    stored = pydicom.dcmread(tmp_path / "mask.dcm")
    assert (stored.Modality, stored.PatientID) == ("SEG", "1")
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["mask.dcm"]


def test_a_fractional_value_is_inside_from_half_of_the_maximum(tmp_path: Path) -> None:
    write_series(tmp_path / "in", np.zeros(GRID.shape, np.int16), GRID)
    (series,) = dicom.find_series(tmp_path / "in")
    path = tmp_path / "mask.dcm"
    write_segmentation(path, np.full((1, *GRID.shape), 2, np.uint8), series, CLASSES)
    row = np.array([0, 99, 100, 101, 200], np.uint8)
    change(path, SegmentationType="FRACTIONAL", SegmentationFractionalType="OCCUPANCY", MaximumFractionalValue=200)
    change(path, BitsAllocated=8, BitsStored=8, HighBit=7, PixelData=row.tobytes() * 4 * 6)
    found = np.zeros(GRID.shape, np.uint8)

    def add(classes: np.ndarray, index: int) -> None:
        found[:, :, index] = classes

    read_segmentation(path, dicom.sorted_headers(series)[1], CLASSES.index, add)
    np.testing.assert_array_equal(found, np.broadcast_to([[[0]], [[0]], [[2]], [[2]], [[2]]], GRID.shape))


def test_a_mask_with_frames_beyond_a_series_is_not_on_its_grid(tmp_path: Path) -> None:
    write_series(tmp_path / "in", np.zeros(GRID.shape, np.int16), GRID)
    (series,) = dicom.find_series(tmp_path / "in")
    write_segmentation(tmp_path / "mask.dcm", np.ones((1, *GRID.shape), np.uint8), series, CLASSES)
    header = read_header(tmp_path / "mask.dcm")
    geometry = dicom.sorted_headers(series)[1]
    assert header is not None
    assert sorted(header.frames_on(geometry) or []) == [(1, index) for index in range(6)]
    for first in (0, 1):
        assert header.frames_on(geometry.cropped((0, 0, first), (5, 4, 5))) is None


def test_an_empty_mask_is_written_too(tmp_path: Path) -> None:
    write_series(tmp_path / "in", np.zeros(GRID.shape, np.int16), GRID)
    (series,) = dicom.find_series(tmp_path / "in")
    mask = np.zeros((1, *GRID.shape), np.uint8)
    write_segmentation(tmp_path / "mask.dcm", mask, series, CLASSES)
    check(tmp_path / "mask.dcm", mask, series)


def test_uids_that_an_anonymiser_emptied_are_generated_and_reported(tmp_path: Path) -> None:
    for file in write_series(tmp_path / "in", np.zeros(GRID.shape, np.int16), GRID):
        change(file, SOPInstanceUID="", StudyInstanceUID="", SeriesInstanceUID="", FrameOfReferenceUID="")
    (series,) = dicom.find_series(tmp_path / "in")
    mask = random_mask(GRID.shape)
    (note,) = write_segmentation(tmp_path / "mask.dcm", mask, series, CLASSES)
    assert "some UIDs of the source are empty" in note
    check(tmp_path / "mask.dcm", mask, series)
    stored = pydicom.dcmread(tmp_path / "mask.dcm")
    source = stored.ReferencedSeriesSequence[0].SeriesInstanceUID
    uids = {stored.StudyInstanceUID, source, stored.FrameOfReferenceUID, stored.SeriesInstanceUID}
    assert len(uids - {""}) == 4


def test_headers_without_required_elements_are_reported_in_one_line(tmp_path: Path) -> None:
    for file in write_series(tmp_path / "in", np.zeros(GRID.shape, np.int16), GRID):
        change(file, PatientID=None)
    (series,) = dicom.find_series(tmp_path / "in")
    with pytest.raises(UserError, match=r"lacks elements that DICOM-SEG requires.*write NIfTI instead"):
        write_segmentation(tmp_path / "mask.dcm", random_mask(GRID.shape), series, CLASSES)
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == []


@pytest.mark.real_data
def test_a_real_series(real_data: Callable[[str], Path], tmp_path: Path) -> None:
    (series,) = dicom.find_series(real_data("abdomen_ct") / "dicom")
    mask = np.zeros((1, 512, 512, 20), np.uint8)
    mask[0, 100:200, 300:350, 3:9] = 1
    mask[0, 300:310, 20:30, 0] = 2
    write_segmentation(tmp_path / "mask.dcm", mask, series, CLASSES)
    check(tmp_path / "mask.dcm", mask, series)
