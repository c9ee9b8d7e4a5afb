"""Voxels are read some columns at a time, with zlib or with ISA-L: the same values as nibabel reads at once."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from common.errors import UserError
from data_loading.io import nifti_bytes
from data_loading.io.nifti_bytes import COLUMNS, DAMAGE_ERRORS, LEAST_BLOCK_BYTES
from data_loading.io.volume import read_nifti

# Three blocks, the last of which is narrower: a column of (64, 128) float64 has 64 KiB.
SHAPE = (64, 128, 2 * COLUMNS + 5)


@pytest.fixture(params=["zlib", "isal"])
def unpacker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Reads with zlib, or with ISA-L if it is installed."""
    name: str = request.param
    module = gzip if name == "zlib" else pytest.importorskip("isal.igzip", reason="pip install '.[gzip]'")
    monkeypatch.setattr(nifti_bytes, "GzipFile", module.GzipFile)
    return name


@pytest.mark.usefixtures("unpacker")
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(
    ("dtype", "slope", "inter"), [("<f8", None, None), (">i2", 0.5, -1024.0), ("<f4", 2.0, 0.0), ("u1", None, None)]
)
def test_blocks_are_what_nibabel_reads_at_once(
    tmp_path: Path, channels: int, dtype: str, slope: float | None, inter: float | None
) -> None:
    assert SHAPE[0] * SHAPE[1] * COLUMNS * 8 >= LEAST_BLOCK_BYTES
    stored = np.random.default_rng(0).integers(0, 255, (*SHAPE, channels)).astype(dtype)
    image = nib.Nifti1Image(stored[..., 0] if channels == 1 else stored, np.eye(4), nib.Nifti1Header(endianness=">"))
    image.header.set_slope_inter(slope, inter)
    content = image.to_bytes()
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(gzip.compress(content, 1))
    expected = np.asarray(nib.Nifti1Image.from_bytes(content).dataobj, dtype=np.float32).reshape(*SHAPE, channels)
    read = read_nifti(path, np.float32).array
    assert read.flags.c_contiguous
    np.testing.assert_array_equal(read, np.moveaxis(expected, -1, 0))
    if slope is None:
        np.testing.assert_array_equal(read_nifti(path, np.uint8).array, read.astype(np.uint8))


def damaged(content: bytes, change: str) -> bytes:
    changed = bytearray(content)
    if change == "cut":
        return bytes(changed[: len(changed) // 2])
    changed[-8 if change == "checksum" else len(changed) // 2] ^= 0x55
    return bytes(changed)


@pytest.mark.parametrize("change", ["checksum", "middle", "cut"])
def test_a_damaged_stream_is_one_line(tmp_path: Path, unpacker: str, change: str) -> None:
    voxels = np.random.default_rng(0).integers(0, 255, SHAPE).astype(np.int16)
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(damaged(gzip.compress(nib.Nifti1Image(voxels, np.eye(4)).to_bytes(), 1), change))
    with pytest.raises(UserError, match=r"scan\.nii\.gz: damaged \(.+\); download or export it again"):
        read_nifti(path, np.float32)


def test_a_stream_that_ends_between_blocks_is_one_line(tmp_path: Path) -> None:
    content: Any = nib.Nifti1Image(np.zeros(SHAPE), np.eye(4)).to_bytes()
    (tmp_path / "scan.nii").write_bytes(content[:-10])
    with pytest.raises(UserError, match=f"ends after {len(content) - 10} of {len(content)} bytes"):
        read_nifti(tmp_path / "scan.nii", np.float32)


def test_isal_is_used_where_it_is_installed() -> None:
    pytest.importorskip("isal", reason="pip install '.[gzip]'")
    from isal import igzip, igzip_lib

    assert nifti_bytes.GzipFile is igzip.IGzipFile
    assert igzip_lib.IsalError in DAMAGE_ERRORS
