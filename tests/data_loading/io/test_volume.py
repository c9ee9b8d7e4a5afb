"""NIfTI files: round trips, header checks, and a one-line error for every kind of damage."""

from __future__ import annotations

import gzip
import os
import struct
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from common.errors import UserError
from data_loading.io import volume as volume_module
from data_loading.io.nifti_bytes import FIRST_VOXEL_BYTE
from data_loading.io.volume import (
    MAX_TRAILING_BYTES,
    WORKING_BYTES_PER_VOXEL,
    Geometry,
    Volume,
    check_same_geometry,
    read_channels,
    read_geometry,
    read_nifti,
    write_nifti,
)

SHAPE = (5, 6, 7)
# Axes permuted and mirrored, as in KiTS19: column i of the affine is a step along axis i.
AFFINE = np.array([[0, 0, -1.5, 10], [0, -0.8125, 0, 20], [-3, 0, 0, 30], [0, 0, 0, 1]], dtype=np.float64)
SPACING_MM = (3.0, 0.8125, 1.5)
GEOMETRY = Geometry(AFFINE, SHAPE, SPACING_MM)

# Byte offsets in a NIfTI-1 header.
DIM, DATATYPE, BITPIX, PIXDIM, VOX_OFFSET, SCL_SLOPE, UNITS = 40, 70, 72, 76, 108, 112, 123
QFORM_CODE, SROW_X, MAGIC = 252, 280, 344


def noise(dtype: type[np.generic]) -> NDArray[Any]:
    return np.random.default_rng(0).integers(0, 100, SHAPE).astype(dtype)


def nifti_bytes(array: NDArray[Any] | None = None, **changes: Any) -> bytes:
    """Returns a NIfTI file's bytes; `at_40=("<h", 2)` overwrites the header from byte 40 with packed values."""
    content = bytearray(nib.Nifti1Image(noise(np.int16) if array is None else array, AFFINE).to_bytes())
    for name, (form, *values) in changes.items():
        struct.pack_into(form, content, int(name.removeprefix("at_")), *values)
    return bytes(content)


def huge_header() -> bytes:
    return nifti_bytes(**{f"at_{DIM}": ("<4h", 3, 32767, 32767, 32767)})[:348]


def flip(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 0x55]) + content[position + 1 :]


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32])
def test_a_written_volume_is_read_back(tmp_path: Path, name: str, dtype: type[np.generic]) -> None:
    array = noise(dtype)[np.newaxis]
    write_nifti(tmp_path / name, Volume(array, GEOMETRY))
    read = read_nifti(tmp_path / name, dtype)
    assert read.array.dtype == dtype
    assert read.array.flags.c_contiguous
    np.testing.assert_array_equal(read.array, array)
    np.testing.assert_allclose(read.geometry.affine, AFFINE, atol=1e-6)
    assert (read.geometry.shape, read.geometry.spacing_mm) == (SHAPE, SPACING_MM)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_axes_are_those_of_the_file_and_other_programs_read_ours(tmp_path: Path) -> None:
    array = np.arange(5 * 6 * 7, dtype=np.int16).reshape(SHAPE)
    nib.save(nib.Nifti1Image(array, AFFINE), tmp_path / "theirs.nii.gz")
    assert read_nifti(tmp_path / "theirs.nii.gz", np.float32).array[0, 1, 2, 3] == array[1, 2, 3]
    write_nifti(tmp_path / "ours.nii.gz", Volume(array[np.newaxis], GEOMETRY))
    theirs = nib.load(tmp_path / "ours.nii.gz")
    np.testing.assert_array_equal(np.asarray(theirs.dataobj), array)
    np.testing.assert_allclose(theirs.affine, AFFINE, atol=1e-6)


def test_spacing_is_pixdim_not_the_affines(tmp_path: Path) -> None:
    rounded = (2.984375, 0.8203125, 1.5)  # within the tolerance, and exact in float32
    (tmp_path / "a.nii").write_bytes(nifti_bytes(**{f"at_{PIXDIM + 4}": ("<3f", *rounded)}))
    assert read_nifti(tmp_path / "a.nii", np.int16).geometry.spacing_mm == rounded
    write_nifti(tmp_path / "b.nii", Volume(noise(np.int16)[np.newaxis], Geometry(AFFINE, SHAPE, rounded)))
    assert read_geometry(tmp_path / "b.nii").spacing_mm == rounded


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("read", [lambda path: read_nifti(path, np.int16), read_geometry])
def test_spacing_and_affine_must_agree(tmp_path: Path, axis: int, read: Callable[[Path], object]) -> None:
    tolerance = 0.01 * SPACING_MM[axis]
    for difference, is_same in ((0.95, True), (-0.95, True), (1.05, False), (-1.05, False)):
        spacing = SPACING_MM[axis] + difference * tolerance
        (tmp_path / "a.nii").write_bytes(nifti_bytes(**{f"at_{PIXDIM + 4 + 4 * axis}": ("<f", spacing)}))
        if is_same:
            read(tmp_path / "a.nii")
        else:
            output = (
                rf"a\.nii: along axis {axis} the header's voxel spacing is {spacing:g} mm, but by its affine it is "
                rf"{SPACING_MM[axis]:g} mm"
            )
            with pytest.raises(UserError, match=output):
                read(tmp_path / "a.nii")


def test_the_affine_in_use_is_compared_with_the_spacing(tmp_path: Path) -> None:
    # Without a code there is no affine, and nibabel derives one from the spacing.
    content = bytearray(nifti_bytes(**{f"at_{PIXDIM + 4}": ("<3f", 2.5, 1.0, 0.5)}))
    struct.pack_into("<2h", content, QFORM_CODE, 0, 0)
    (tmp_path / "none.nii").write_bytes(content)
    assert read_geometry(tmp_path / "none.nii").spacing_mm == (2.5, 1.0, 0.5)
    # A quaternion only rotates, so its affine has the header's spacing.
    struct.pack_into("<2h", content, QFORM_CODE, 1, 0)
    (tmp_path / "turned.nii").write_bytes(content)
    assert read_geometry(tmp_path / "turned.nii").spacing_mm == (2.5, 1.0, 0.5)


@pytest.mark.real_data
@pytest.mark.parametrize("folder", ["kits19_segmentations", "hippocampus", "abdomen_ct"])
def test_headers_of_real_scans_are_consistent(real_data: Callable[[str], Path], folder: str) -> None:
    scans = sorted(real_data(folder).rglob("*.nii.gz"))
    assert scans
    for path in scans:
        read_geometry(path)


def test_channels_last_become_channels_first(tmp_path: Path) -> None:
    array = np.random.default_rng(1).normal(size=(*SHAPE, 2)).astype(np.float32)
    nib.save(nib.Nifti1Image(array, AFFINE), tmp_path / "a.nii.gz")
    read = read_nifti(tmp_path / "a.nii.gz", np.float32)
    np.testing.assert_array_equal(read.array, np.moveaxis(array, -1, 0))
    assert read.geometry.shape == SHAPE


def test_scale_byte_order_and_extensions_are_supported(tmp_path: Path) -> None:
    array = noise(np.int16)
    (tmp_path / "scaled.nii").write_bytes(nifti_bytes(array, **{f"at_{SCL_SLOPE}": ("<2f", 2.0, -1024.0)}))
    np.testing.assert_array_equal(read_nifti(tmp_path / "scaled.nii", np.float32).array[0], array * 2.0 - 1024)

    big_endian = nib.Nifti1Image(array.astype(">i2"), AFFINE, nib.Nifti1Header(endianness=">"))
    nib.save(big_endian, tmp_path / "big.nii")
    np.testing.assert_array_equal(read_nifti(tmp_path / "big.nii", np.float32).array[0], array)

    extended = nib.Nifti1Image(array, AFFINE)
    extended.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"made by a scanner's console " * 9))
    nib.save(extended, tmp_path / "extended.nii.gz")
    np.testing.assert_array_equal(read_nifti(tmp_path / "extended.nii.gz", np.float32).array[0], array)
    assert read_geometry(tmp_path / "extended.nii.gz").shape == SHAPE


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "A.NII"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("pack", [bytes, lambda content: gzip.compress(content, mtime=0)])
def test_the_first_bytes_decide_not_the_name(
    tmp_path: Path, name: str, kind: type[nib.Nifti1Image], pack: Callable[[bytes], bytes]
) -> None:
    (tmp_path / name).write_bytes(pack(kind(noise(np.int16), AFFINE).to_bytes()))
    read = read_nifti(tmp_path / name, np.float32)
    np.testing.assert_array_equal(read.array[0], noise(np.int16))
    geometry = read_geometry(tmp_path / name)
    assert (geometry.shape, geometry.spacing_mm) == (SHAPE, SPACING_MM)
    np.testing.assert_allclose(geometry.affine, AFFINE, atol=1e-6)


def test_a_big_endian_or_truncated_nifti_2_is_read_or_refused(tmp_path: Path) -> None:
    content = nib.Nifti2Image(noise(np.int16).astype(">i2"), AFFINE, nib.Nifti2Header(endianness=">")).to_bytes()
    (tmp_path / "a.nii").write_bytes(content)
    np.testing.assert_array_equal(read_nifti(tmp_path / "a.nii", np.float32).array[0], noise(np.int16))
    for size in (200, 400, len(content) - 1):
        (tmp_path / "a.nii").write_bytes(content[:size])
        with pytest.raises(UserError, match=r"not a NIfTI file|ends after"):
            read_nifti(tmp_path / "a.nii", np.float32)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((5, 6, 7, 1), (1, 5, 6, 7)),
        ((5, 6, 7, 1, 1), (1, 5, 6, 7)),
        ((5, 6, 7, 1, 3), (3, 5, 6, 7)),
        ((5, 6, 7, 2, 1), (2, 5, 6, 7)),
        ((5, 6, 1), (1, 5, 6, 1)),
        ((5, 6), (1, 5, 6, 1)),
    ],
)
def test_trailing_axes_of_one_voxel_do_not_count(
    tmp_path: Path, shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    array = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    nib.save(nib.Nifti1Image(array, AFFINE), tmp_path / "a.nii")
    read = read_nifti(tmp_path / "a.nii", np.float32)
    assert read.array.shape == expected
    np.testing.assert_array_equal(read.array, np.moveaxis(array.reshape(*expected[1:], expected[0]), -1, 0))
    assert read.geometry.shape == expected[1:]
    assert read_channels(tmp_path / "a.nii") == expected[0]


@pytest.mark.parametrize("factor", [1.0, -2.0])
def test_an_affine_of_dependent_axes_is_refused(tmp_path: Path, factor: float) -> None:
    affine = AFFINE.copy()
    affine[:3, 1] = factor * AFFINE[:3, 0]
    (tmp_path / "a.nii").write_bytes(nib.Nifti1Image(noise(np.int16), affine).to_bytes())
    with pytest.raises(UserError, match="the header's affine is singular: two axes run the same way; export it again"):
        read_geometry(tmp_path / "a.nii")


def test_a_voxel_of_a_tilted_gantry_is_as_large_as_an_upright_one() -> None:
    tilted = AFFINE.copy()
    tilted[:3, 2] += 0.7 * AFFINE[:3, 1]
    assert Geometry(tilted, SHAPE, SPACING_MM).voxel_ml == pytest.approx(GEOMETRY.voxel_ml) == 3 * 0.8125 * 1.5e-3


def test_geometry_needs_the_header_alone(tmp_path: Path) -> None:
    write_nifti(tmp_path / "whole.nii", Volume(noise(np.int16)[np.newaxis], GEOMETRY))
    (tmp_path / "head.nii").write_bytes((tmp_path / "whole.nii").read_bytes()[:348])
    geometry = read_geometry(tmp_path / "head.nii")
    assert (geometry.shape, geometry.spacing_mm) == (SHAPE, SPACING_MM)
    np.testing.assert_allclose(geometry.affine, AFFINE, atol=1e-6)


def test_a_crop_s_first_voxel_stays_where_it_was() -> None:
    # Steps of 5, 2 and 1 mm: along z, along (0.6, 0.8, 0) and along (-0.8, 0.6, 0).
    affine = np.array([[0, 1.2, -0.8, 10], [0, 1.6, 0.6, 20], [5, 0, 0, 30], [0, 0, 0, 1]])
    cropped = Geometry(affine, (4, 6, 9), (5.0, 2.0, 1.0)).cropped((1, 2, 4), (3, 2, 5))
    np.testing.assert_allclose(cropped.affine[:3, 3], [10 + 2.4 - 3.2, 20 + 3.2 + 2.4, 30 + 5])
    np.testing.assert_array_equal(cropped.affine[:, :3], affine[:, :3])
    assert (cropped.shape, cropped.spacing_mm) == ((3, 2, 5), (5.0, 2.0, 1.0))
    assert affine[:3, 3].tolist() == [10, 20, 30]


def test_geometry_survives_json() -> None:
    again = Geometry.from_json(GEOMETRY.to_json())
    np.testing.assert_array_equal(again.affine, AFFINE)
    assert (again.shape, again.spacing_mm) == (SHAPE, SPACING_MM)


def test_the_same_volume_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = Volume(noise(np.int16)[np.newaxis], GEOMETRY)
    write_nifti(tmp_path / "a.nii.gz", scan)
    monkeypatch.setattr("time.time", lambda: 1e9)  # gzip would write the current time into its header
    write_nifti(tmp_path / "b.nii.gz", scan)
    write_nifti(tmp_path / "C.NII.GZ", scan)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "C.NII.GZ").read_bytes()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.nii.gz"
    write_nifti(path, Volume(noise(np.int16)[np.newaxis], GEOMETRY))
    before = path.read_bytes()

    def half(self: Path, content: bytes) -> int:
        with self.open("wb") as stream:
            stream.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="No space"):
        write_nifti(path, Volume(noise(np.int16)[np.newaxis] + 1, GEOMETRY))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


GZIPPED = gzip.compress(nifti_bytes(), mtime=0)
# The header inside claims one slice less; only the checksum at the end of the stream detects that.
SHRUNK = bytearray(gzip.compress(nifti_bytes(**{f"at_{DIM + 2}": ("<h", SHAPE[0] - 1)}), mtime=0))
SHRUNK[-8:-4] = GZIPPED[-8:-4]
FAULTS: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.nii", b"", "not a NIfTI file"),
    "empty gz": ("a.nii.gz", b"", "not a NIfTI file"),
    "text": ("a.nii", b"patient,age\n" * 99, "not a NIfTI file"),
    "flipped byte in the middle": ("a.nii.gz", flip(GZIPPED, len(GZIPPED) // 2), "damaged"),
    "flipped byte of the checksum": ("a.nii.gz", flip(GZIPPED, len(GZIPPED) - 6), "damaged .*CRC"),
    "claims less than it holds": ("a.nii.gz", bytes(SHRUNK), "damaged .*CRC"),
    "truncated gz": ("a.nii.gz", GZIPPED[: len(GZIPPED) // 2], "damaged .*ended"),
    "truncated nii": ("a.nii", nifti_bytes()[:-1], r"ends after 771 of 772 bytes"),
    "32767 cubed": ("a.nii", huge_header(), r"claims \(32767, 32767, 32767\) voxels.* GiB are free"),
    "32767 cubed in 70 bytes": ("a.nii.gz", gzip.compress(huge_header()), r"claims \(32767, 32767, 32767\) voxels"),
    "1-D": ("a.nii", nifti_bytes(np.zeros(4, np.int16)), r"expected a 3-D scan .*\(4,\)"),
    "5-D": ("a.nii", nifti_bytes(np.zeros((2,) * 5, np.int16)), "expected a 3-D scan"),
    "no slices": ("a.nii", nifti_bytes(**{f"at_{DIM}": ("<4h", 3, 0, 6, 7)}), "expected a 3-D scan"),
    "negative axis": ("a.nii", nifti_bytes(**{f"at_{DIM}": ("<4h", 3, -5, 6, 7)}), "3-D scan|not a NIfTI"),
    "nine axes": ("a.nii", nifti_bytes(**{f"at_{DIM}": ("<h", 9)}), "not a NIfTI file"),
    "zero spacing": ("a.nii", nifti_bytes(at_84=("<f", 0.0)), r"spacing \[3.0, 0.0, 1.5\] mm is impossible"),
    "NaN spacing": ("a.nii", nifti_bytes(at_84=("<f", np.nan)), "spacing .*impossible|not a NIfTI"),
    "kilometre spacing": ("a.nii", nifti_bytes(at_84=("<f", 1e6)), "spacing .*impossible"),
    "a metre's spacing": ("a.nii", nifti_bytes(**{f"at_{UNITS}": ("<B", 1)}), "voxel spacing is in metres"),
    "micron's spacing": ("a.nii", nifti_bytes(**{f"at_{UNITS}": ("<B", 3 + 8)}), "voxel spacing is in microns"),
    "8 bits of int16": ("a.nii", nifti_bytes(**{f"at_{BITPIX}": ("<h", 8)}), "int16 but 8 bits per voxel"),
    "another type": ("a.nii", nifti_bytes(**{f"at_{DATATYPE}": ("<h", 2)}), "uint8 but 16 bits per voxel"),
    "steps of 9 mm": (
        "a.nii",
        nifti_bytes(**{f"at_{SROW_X + 8}": ("<f", 9.0)}),
        "along axis 2 .* 1.5 mm, but by its affine it is 9 mm",
    ),
    "colours": ("a.nii", nifti_bytes(**{f"at_{DATATYPE}": ("<2h", 128, 24)}) + bytes(999), "not colours"),
    "complex": ("a.nii", nifti_bytes(np.zeros(SHAPE, np.complex64)), "not colours or complex numbers"),
    "voxels in the header": ("a.nii", nifti_bytes(**{f"at_{VOX_OFFSET}": ("<f", 0.0)}), "not a NIfTI file"),
    "voxels a petabyte on": ("a.nii", nifti_bytes(**{f"at_{VOX_OFFSET}": ("<f", 1e15)}), "GiB are free"),
    "voxels beyond any file": ("a.nii", nifti_bytes(**{f"at_{VOX_OFFSET}": ("<f", 1e30)}), "GiB are free"),
    "voxels nowhere": ("a.nii", nifti_bytes(**{f"at_{VOX_OFFSET}": ("<f", np.nan)}), "not a NIfTI file"),
    "NaN intercept": ("a.nii", nifti_bytes(**{f"at_{SCL_SLOPE}": ("<2f", 1.0, np.nan)}), "not a readable NIfTI"),
    "NaN affine": ("a.nii", nifti_bytes(**{f"at_{SROW_X}": ("<f", np.nan)}), "affine holds NaN"),
    "no rotation": (
        "a.nii",
        nifti_bytes(**{f"at_{QFORM_CODE}": ("<2h3f", 1, 0, 3.0, 4.0, 5.0)}),
        "not a readable NIfTI",
    ),
    "pair magic of nobody": ("a.nii", nifti_bytes(**{f"at_{MAGIC}": ("4s", b"abcd")}), "not a NIfTI file"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_file_is_one_clear_line(tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture) -> None:
    name, content, message = FAULTS[fault]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_nifti(tmp_path / name, np.float32)
    assert str(caught.value).startswith(str(tmp_path / name))
    # nibabel's own messages would be printed before that line on stderr.
    assert not caplog.records


HEADER_FAULTS = ["empty", "text", "32767 cubed", "1-D", "zero spacing", "colours", "NaN affine", "no rotation"]
HEADER_FAULTS += ["a metre's spacing", "8 bits of int16", "steps of 9 mm"]


@pytest.mark.parametrize("fault", [*HEADER_FAULTS, "NaN intercept", "voxels beyond any file"])
def test_a_damaged_header_has_no_geometry(tmp_path: Path, fault: str) -> None:
    name, content, message = FAULTS[fault]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_geometry(tmp_path / name)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_bytes_after_the_last_voxel_are_read_up_to_a_limit(tmp_path: Path, name: str) -> None:
    def write(extra: int, end: bytes = b"") -> None:
        content = nifti_bytes() + bytes(extra)
        (tmp_path / name).write_bytes(gzip.compress(content, mtime=0) + end if name.endswith(".gz") else content)

    write(MAX_TRAILING_BYTES)
    np.testing.assert_array_equal(read_nifti(tmp_path / name, np.float32).array[0], noise(np.int16))
    # If much more were read (streams read some KB ahead), the junk would be reported as "not a gzipped file".
    write(MAX_TRAILING_BYTES + (1 << 16), end=b"junk")
    with pytest.raises(UserError, match="continues for more than 1 MiB after the last voxel"):
        read_nifti(tmp_path / name, np.float32)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("read", [lambda path: read_nifti(path, np.uint8), read_geometry])
def test_a_pipe_does_not_block(tmp_path: Path, name: str, read: Callable[[Path], object]) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=r"a\.nii(\.gz)?: a pipe or a device; expected a file"):
        read(tmp_path / name)


def test_an_odd_extension_is_ignored_silently(tmp_path: Path) -> None:
    # 17 bytes, not a multiple of 16, before voxels that begin 32 bytes later.
    content = nifti_bytes(**{f"at_{VOX_OFFSET}": ("<f", FIRST_VOXEL_BYTE + 32.0)})
    extension = struct.pack("<4B2i", 1, 0, 0, 0, 17, 6) + bytes(24)
    (tmp_path / "a.nii").write_bytes(content[: FIRST_VOXEL_BYTE - 4] + extension + content[FIRST_VOXEL_BYTE:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(read_nifti(tmp_path / "a.nii", np.float32).array[0], noise(np.int16))


@pytest.mark.parametrize("read", [lambda path: read_nifti(path, np.uint8), read_geometry])
def test_a_missing_file_and_a_folder_have_different_messages(tmp_path: Path, read: Callable[[Path], object]) -> None:
    with pytest.raises(UserError, match=r"none\.nii\.gz: no such file"):
        read(tmp_path / "none.nii.gz")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read(tmp_path)


def test_memory_is_checked_before_voxels_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.nii"
    path.write_bytes(nifti_bytes())
    needed = FIRST_VOXEL_BYTE + 5 * 6 * 7 * (2 + WORKING_BYTES_PER_VOXEL)
    monkeypatch.setattr(volume_module, "free_memory_bytes", lambda: needed)
    read_nifti(path, np.float32)
    monkeypatch.setattr(volume_module, "free_memory_bytes", lambda: needed - 1)
    path.write_bytes(nifti_bytes()[:352])
    with pytest.raises(UserError, match=r"claims \(5, 6, 7\) voxels"):
        read_nifti(path, np.float32)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0, 0.5, 1.02, 256.0])
def test_a_mask_holds_whole_numbers_that_fit_a_byte(tmp_path: Path, value: float) -> None:
    array = np.zeros(SHAPE, np.float32)
    array[4, 5, 6] = value
    (tmp_path / "a.nii").write_bytes(nifti_bytes(array))
    with pytest.raises(UserError, match=r"a\.nii: .*whole numbers"):
        read_nifti(tmp_path / "a.nii", np.uint8)
    # A scan may hold any of them; preprocessing rejects some.
    np.testing.assert_array_equal(read_nifti(tmp_path / "a.nii", np.float32).array[0], array)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16, np.uint16])
def test_a_mask_may_be_stored_as_any_number(tmp_path: Path, dtype: type[np.generic]) -> None:
    array = (noise(np.uint8) % 3).astype(dtype)
    array[0, 0, 0] = 255
    (tmp_path / "a.nii").write_bytes(nifti_bytes(array))
    read = read_nifti(tmp_path / "a.nii", np.uint8).array
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read[0], array)


def test_labels_that_are_whole_in_float32_are_whole(tmp_path: Path) -> None:
    array = np.zeros(SHAPE)
    array[0, 0, :2] = 1.9999999995, 3
    (tmp_path / "a.nii").write_bytes(nifti_bytes(array))
    read = read_nifti(tmp_path / "a.nii", np.uint8)
    assert (read.array[0, 0, 0, :3].tolist(), read.notes) == ([2, 3, 0], ())


@pytest.mark.parametrize(("qform", "sform"), [(0, 0), (1, 0), (0, 2)])
def test_a_scan_without_an_orientation_is_read_with_a_note(tmp_path: Path, qform: int, sform: int) -> None:
    image = nib.Nifti1Image(np.arange(24, dtype=np.float32).reshape(2, 3, 4), None)
    image.set_qform(np.eye(4), qform)
    image.set_sform(np.eye(4), sform)
    nib.save(image, tmp_path / "scan.nii")
    read = read_nifti(tmp_path / "scan.nii", np.float32)
    guessed = ("scan.nii: its header states no orientation; its axes are taken to run LAS",)
    assert read.notes == (() if qform or sform else guessed)


def test_labels_close_to_whole_numbers_are_rounded_with_a_note(tmp_path: Path) -> None:
    labels = noise(np.uint8) % 3
    stored = nib.Nifti1Image(labels.astype(np.float64), AFFINE)
    stored.set_data_dtype(np.uint16)  # nibabel scales to the whole range of the type
    nib.save(stored, tmp_path / "a.nii")
    read = read_nifti(tmp_path / "a.nii", np.uint8)
    np.testing.assert_array_equal(read.array[0], labels)
    (line,) = read.notes
    assert line.startswith("a.nii: rounded to whole numbers: 1.0000153 among")
    (tmp_path / "a.nii").write_bytes(nifti_bytes(np.full(SHAPE, 0.985)))
    with pytest.raises(UserError, match=r"found 0\.985 among 210 voxels that are not whole; export it without interp"):
        read_nifti(tmp_path / "a.nii", np.uint8)


def test_any_integer_is_a_label(tmp_path: Path) -> None:
    array = np.resize(np.array([-3, 0, 14175], np.int16), SHAPE)
    (tmp_path / "a.nii").write_bytes(nifti_bytes(array))
    np.testing.assert_array_equal(read_nifti(tmp_path / "a.nii", np.int32).array[0], array)
    with pytest.raises(UserError, match="from 0 to 255, found -3 to 14175; --labels reaches other numbers"):
        read_nifti(tmp_path / "a.nii", np.uint8)


def test_values_beyond_float32_become_infinite_without_a_warning(tmp_path: Path) -> None:
    (tmp_path / "a.nii").write_bytes(nifti_bytes(np.full(SHAPE, 1e300)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isinf(read_nifti(tmp_path / "a.nii", np.float32).array).all()


def test_image_and_mask_must_agree_in_shape() -> None:
    other = Geometry(AFFINE, (5, 6, 8), SPACING_MM)
    with pytest.raises(UserError, match=r"case_7: the image has shape \(5, 6, 7\) but its mask \(5, 6, 8\)"):
        check_same_geometry(GEOMETRY, other, "case_7")


@pytest.mark.parametrize(("column", "name"), [(0, "axis 0"), (1, "axis 1"), (2, "axis 2"), (3, "the origin")])
@pytest.mark.parametrize("row", [0, 1, 2])
@pytest.mark.parametrize("scale", [1.0, 1e-2])  # micro-CT has voxels of some µm
def test_image_and_mask_may_be_a_twentieth_of_a_voxel_apart(row: int, column: int, name: str, scale: float) -> None:
    size = np.diag([scale] * 3 + [1])
    image = Geometry(size @ AFFINE, SHAPE, tuple(scale * s for s in SPACING_MM))
    tolerance_mm = scale * 0.05 * min(SPACING_MM) / (*(n - 1 for n in SHAPE), 1)[column]
    for difference, is_same in ((0.99, True), (-0.99, True), (1.01, False), (-50.0, False)):
        affine = size @ AFFINE
        affine[row, column] += difference * tolerance_mm
        other = Geometry(affine, SHAPE, image.spacing_mm)
        if is_same:
            check_same_geometry(image, other, "case_7")
        else:
            with pytest.raises(UserError, match=f"case_7: the affines .* differ by .* mm at {name};"):
                check_same_geometry(image, other, "case_7")


def read_bytes_as(name: str, content: bytes) -> Volume:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        return read_nifti(path, np.float32)


def corrupted(content: bytes) -> st.SearchStrategy[bytes]:
    """The bytes with some replaced, mostly near the beginning, and possibly truncated or extended."""
    position = st.one_of(st.integers(0, min(351, len(content) - 1)), st.integers(0, len(content) - 1))

    def change(edits: list[tuple[int, int]], length: int) -> bytes:
        changed = bytearray(content)
        for place, value in edits:
            changed[place] = value
        return bytes(changed[:length]) + bytes(max(0, length - len(content)))

    lengths = st.one_of(st.just(len(content)), st.integers(0, len(content) + 40))
    return st.builds(change, st.lists(st.tuples(position, st.integers(0, 255)), max_size=6), lengths)


@settings(max_examples=400, deadline=None)
@given(content=corrupted(nifti_bytes()))
def test_any_corruption_of_a_plain_file_is_refused_or_read(content: bytes) -> None:
    try:
        read = read_bytes_as("a.nii", content)
    except UserError:
        return
    assert read.array.dtype == np.float32
    assert read.array.shape[1:] == read.geometry.shape
    assert np.isfinite(read.geometry.affine).all()


@settings(max_examples=400, deadline=None)
@given(content=corrupted(GZIPPED))
def test_any_corruption_of_a_gzip_file_is_refused_or_harmless(content: bytes) -> None:
    try:
        read = read_bytes_as("a.nii.gz", content)
    except UserError:
        return
    np.testing.assert_array_equal(read.array[0], noise(np.int16))


def test_voxels_of_a_plain_file_have_no_checksum() -> None:
    # The damage cannot be detected, which is why scans are distributed as .nii.gz.
    assert read_bytes_as("a.nii", flip(nifti_bytes(), 400)).array.shape == (1, *SHAPE)
