"""Which scan a mask belongs to where several lie on its grid."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

pytest.importorskip("pydicom", reason="pip install '.[dicom]'")
from common.errors import UserError
from data_loading.io.dicom_headers import Series
from data_loading.io.volume import Geometry
from data_loading.readers.dicom import Scan, _make_scan, match_masks

SERIES = Series(name="1", uid="1.2", description="", files=())
GEOMETRY = Geometry(np.eye(4), (3, 4, 5), (1.0, 1.0, 1.0))


def scan(case: str, folder: str) -> Scan:
    return Scan(case=case, path=Path(folder), folder=folder, top_folder=folder, geometry=GEOMETRY, series=None)


SCANS = (scan("P0_arterial", "arterial"), scan("P0_venous", "venous"))


@pytest.mark.parametrize(
    ("mask", "index"),
    [
        ("arterial/P0_venous.nii.gz", 1),
        ("arterial/venous.nii.gz", 1),
        ("venous/venous.nii.gz", 1),
        ("venous/liver.nii.gz", 1),
        ("P0_arterial/liver.nii.gz", 0),
    ],
)
def test_a_mask_s_own_name_says_more_than_its_folder_s(tmp_path: Path, mask: str, index: int) -> None:
    path = tmp_path / mask
    path.parent.mkdir()
    nib.save(nib.Nifti1Image(np.zeros(GEOMETRY.shape, np.uint8), np.eye(4)), path)
    assert match_masks([path], SCANS) == ({index: [path]}, [])


def test_composed_accents_are_the_same_name(tmp_path: Path) -> None:
    folders = [tmp_path / unicodedata.normalize("NFD", name) for name in ("André", "Zoë")]
    scans = [_make_scan(tmp_path, folder, GEOMETRY, series=SERIES) for folder in folders]
    assert [scan.case for scan in scans] == ["André", "Zoë"]
    for form in ("NFC", "NFD"):
        path = tmp_path / form / f"{unicodedata.normalize(form, 'Zoë')}.nii.gz"
        path.parent.mkdir()
        nib.save(nib.Nifti1Image(np.zeros(GEOMETRY.shape, np.uint8), np.eye(4)), path)
        assert match_masks([path], scans) == ({1: [path]}, [])


def test_a_mask_without_a_name_is_refused(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.zeros(GEOMETRY.shape, np.uint8), np.eye(4)), tmp_path / "liver.nii.gz")
    with pytest.raises(UserError, match="is on the grid of 2 scans"):
        match_masks([tmp_path / "liver.nii.gz"], SCANS)
