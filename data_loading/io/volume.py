"""Volume and Geometry: a scan in memory with its place in space; reading and writing NIfTI.

Reading trusts nothing: sizes are capped from the header before a voxel is read, what the header says twice
must agree, and a gzip stream is read to its end, so that its checksum is verified (nibabel alone loads a flipped
byte in silence).
"""

from __future__ import annotations

import gzip
import io
import logging
import os
import stat
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from common.files import replacing

# A voxel passes through the stored type, float32 and the resampled float32: about this many bytes
# besides the stored ones are needed at once.
ML_PER_MM3 = 1e-3
WORKING_BYTES_PER_VOXEL = 12
# Image and label of one case must agree this well, in mm (the KiTS19 pairs agree to 1e-5).
AFFINE_TOLERANCE_MM = 1e-3
# Spacing and affine of one header must agree this well, relatively or in mm: programs round one of them, and what is
# beyond this is an error that resampling would act on (in the real scans at hand they agree to the last bit).
SPACING_TOLERANCE = 1e-2
SPACING_TOLERANCE_MM = 1e-2
# xyzt_units, its lowest three bits: 0 says nothing, which is mm everywhere.
FOREIGN_UNITS = {1: "metres", 3: "microns"}
NIFTI_HEADER_BYTES = 348
# NIfTI-1: after the header 4 bytes that announce extensions; voxels begin here or later.
FIRST_VOXEL_BYTE = 352
# Behind the last voxel some programs pad to a block; a stream that goes on for longer may never end.
MAX_TRAILING_BYTES = 1 << 20
# nibabel tells on stderr what it finds odd in a header; a UserError says in one line what matters of it.
nib.imageglobals.logger.setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class Geometry:
    """Where a scan's voxels lie.

    Attributes:
        affine: (4, 4) float64, voxel index (d, h, w, 1) to scanner mm (x, y, z, 1).
        shape: voxels along the three stored axes.
        spacing_mm: distance between voxel centres along each axis, as the header's pixdim states it.
    """

    affine: NDArray[np.float64]
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]

    def to_json(self) -> dict[str, Any]:
        return {"affine": self.affine.tolist(), "shape": list(self.shape), "spacing_mm": list(self.spacing_mm)}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Geometry:
        d, h, w = (int(n) for n in record["shape"])
        sd, sh, sw = (float(s) for s in record["spacing_mm"])
        return cls(np.asarray(record["affine"], dtype=np.float64), (d, h, w), (sd, sh, sw))

    def part(self, start: tuple[int, int, int], shape: tuple[int, int, int]) -> Geometry:
        """The geometry of so many voxels from `start` on: the origin moves, the voxels stay in their places."""
        affine = self.affine.copy()
        affine[:3, 3] = self.affine[:3, :3] @ start + self.affine[:3, 3]
        return Geometry(affine, shape, self.spacing_mm)


@dataclass(frozen=True)
class Volume:
    """A scan or a mask: `array` is (C, D, H, W), `geometry` its place in space."""

    array: NDArray[Any]
    geometry: Geometry


def read_nifti(path: Path, dtype: type[np.generic]) -> Volume:
    """Reads a `.nii` or `.nii.gz` file whole.

    Args:
        path: the file; 3-D, or 4-D with the channels last as the Decathlon stores them.
        dtype: what the values are converted to, np.float32 for scans and np.uint8 for masks.

    Returns:
        The volume, array (C, D, H, W), axes in the order in which the file stores them.

    Raises:
        UserError: the file is missing, damaged, no NIfTI, has impossible dimensions, contradicts itself, or
            claims more voxels than this machine's free memory holds.
    """
    image = _parse(path, _read_bytes(path))
    # What is too large for float32 becomes infinity, and that is for preprocessing to refuse.
    with np.errstate(over="ignore", invalid="ignore"):
        array = np.asarray(image.dataobj)
        array = array[np.newaxis] if array.ndim == 3 else np.moveaxis(array, -1, 0)
        if np.issubdtype(dtype, np.integer):
            _check_labels(path, array, dtype)
        return Volume(np.ascontiguousarray(array, dtype=dtype), geometry_of(image))


def read_geometry(path: Path) -> Geometry:
    """The geometry alone, from the header; checks what `read_nifti` checks before it reads voxels."""
    return geometry_of(_read_header(path))


def read_channels(path: Path) -> int:
    """How many channels `read_nifti` finds in the file, from the header alone."""
    shape = _read_header(path).shape
    return 1 if len(shape) == 3 else int(shape[3])


def _read_header(path: Path) -> nib.Nifti1Image:
    with _open(path) as stream:
        header = _read_up_to(path, stream, NIFTI_HEADER_BYTES)
    _claimed_bytes(path, header)
    return _parse(path, header)


def geometry_of(image: nib.Nifti1Image) -> Geometry:
    """The geometry of a NIfTI image; spacing is pixdim[1:4], as MLPerf's preprocessing reads it."""
    d, h, w = (int(n) for n in image.shape[:3])
    sd, sh, sw = (float(s) for s in image.header["pixdim"][1:4])
    return Geometry(np.asarray(image.affine, dtype=np.float64), (d, h, w), (sd, sh, sw))


def write_nifti(path: Path, volume: Volume) -> None:
    """Writes a one-channel volume as NIfTI, atomically; the same volume gives the same bytes.

    Args:
        path: a `.nii` or `.nii.gz` file; its folder must exist.
        volume: array (1, D, H, W).
    """
    image = nib.Nifti1Image(volume.array[0], volume.geometry.affine)
    image.header["pixdim"][1:4] = volume.geometry.spacing_mm
    content = image.to_bytes()
    if path.name.endswith(".gz"):
        # mtime=0: gzip would write the time of day into the file. Level 1: noise hardly compresses.
        content = gzip.compress(content, compresslevel=1, mtime=0)
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def check_same_geometry(image: Geometry, label: Geometry, case: str) -> None:
    """Raises UserError, naming the axis, unless image and mask have one shape and one affine."""
    if image.shape != label.shape:
        raise UserError(
            f"{case}: the image has shape {image.shape} but its mask {label.shape}; "
            "export the mask again on the image's grid"
        )
    difference = np.abs(image.affine - label.affine)
    if difference.max() > AFFINE_TOLERANCE_MM:
        axis = int(difference.max(axis=0).argmax())
        name = f"axis {axis}" if axis < 3 else "the origin"
        raise UserError(
            f"{case}: the affines of image and mask differ by {difference.max():.3g} mm at {name}; "
            "export the mask again on the image's grid"
        )


def free_memory_bytes() -> int:
    """Memory that can be had without swapping: MemAvailable on Linux, else all physical pages."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _open(path: Path) -> IO[bytes]:
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # opening a pipe would wait for its other end
            raise UserError(f"{path}: a pipe or a device; expected a file")
        opener: Any = gzip.open if path.name.endswith(".gz") else open
        return opener(path, "rb")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _read_up_to(path: Path, stream: IO[bytes], size: int) -> bytes:
    try:
        return stream.read(size)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged ({error}); fetch or export it again") from None


def _claimed_bytes(path: Path, header: bytes) -> int:
    """How long the file must be by its own header; refuses what cannot be a scan or cannot fit."""
    try:
        parsed = nib.Nifti1Header.from_fileobj(io.BytesIO(header))
        shape = [int(n) for n in parsed.get_data_shape()]
        stored = parsed.get_data_dtype()
        offset = int(parsed["vox_offset"])
        # As stored: nibabel makes 1 mm of a spacing of 0, drops a sign, and corrects bitpix.
        as_stored = nib.Nifti1Header(header, check=False)
        spacing = np.abs(as_stored["pixdim"][1:4]).tolist()
        bits, unit = int(as_stored["bitpix"]), int(as_stored["xyzt_units"]) & 7
        if offset < FIRST_VOXEL_BYTE:
            raise ValueError("the voxels overlap the header")
    except Exception:  # nibabel raises half a dozen types of its own on a bad header
        raise UserError(f"{path}: not a NIfTI-1 file, or its header is damaged; export it again") from None
    if stored.kind not in "iuf":
        raise UserError(f"{path}: stores {stored} values; expected one number a voxel, no colours or complex numbers")
    if bits != 8 * stored.itemsize:
        raise UserError(f"{path}: the header says {stored} and {bits} bits a voxel, which differ; export it again")
    if len(shape) not in (3, 4) or min(shape) < 1:
        raise UserError(f"{path}: expected a 3-D scan (or 4-D with channels last), the header says {tuple(shape)}")
    if not all(0 < s < 1e4 for s in spacing):
        raise UserError(f"{path}: the header's voxel spacing {spacing} mm is impossible; export it again")
    if unit in FOREIGN_UNITS:
        raise UserError(f"{path}: the header's voxel spacing is in {FOREIGN_UNITS[unit]}; export it in mm")
    # Python integers: 32767 cubed would overflow numpy's.
    voxels = 1
    for n in shape:
        voxels *= n
    needed = offset + voxels * (stored.itemsize + WORKING_BYTES_PER_VOXEL)
    free = free_memory_bytes()
    if needed > free:
        raise UserError(
            f"{path}: the header claims {tuple(shape)} voxels, {needed / 2**30:.1f} GiB to work on, "
            f"and {free / 2**30:.1f} GiB are free; the header is damaged or this machine is too small"
        )
    return offset + voxels * stored.itemsize


def _read_bytes(path: Path) -> bytes:
    with _open(path) as stream:
        header = _read_up_to(path, stream, NIFTI_HEADER_BYTES)
        claimed = _claimed_bytes(path, header)
        rest = _read_up_to(path, stream, claimed - len(header))
        if len(header) + len(rest) < claimed:
            raise UserError(
                f"{path}: ends after {len(header) + len(rest)} of {claimed} bytes; fetch or export it again"
            )
        # Only at its very end does gzip compare its checksum; what lies behind the last voxel is read for that alone.
        if len(_read_up_to(path, stream, MAX_TRAILING_BYTES + 1)) > MAX_TRAILING_BYTES:
            raise UserError(
                f"{path}: goes on for more than {MAX_TRAILING_BYTES >> 20} MiB behind the last voxel that its header "
                "tells of; export it again"
            )
    return header + rest


def _parse(path: Path, content: bytes) -> nib.Nifti1Image:
    try:
        with warnings.catch_warnings(action="ignore"):  # of odd extensions, which nothing here reads
            image = nib.Nifti1Image.from_bytes(content)
    except Exception as error:  # as above
        raise UserError(f"{path}: not a readable NIfTI-1 file ({error})") from None
    if not np.isfinite(image.affine).all():
        raise UserError(f"{path}: the header's affine holds NaN or infinity; export it again")
    _check_spacing(path, geometry_of(image))
    return image


def _check_spacing(path: Path, geometry: Geometry) -> None:
    """Raises UserError, naming the axis, unless the spacing is the length of the affine's steps."""
    steps = np.linalg.norm(geometry.affine[:3, :3], axis=0)
    for axis, (spacing, step) in enumerate(zip(geometry.spacing_mm, steps.tolist(), strict=True)):
        if abs(spacing - step) > max(SPACING_TOLERANCE * spacing, SPACING_TOLERANCE_MM):
            raise UserError(
                f"{path}: along axis {axis} the header's voxel spacing is {spacing:g} mm, but {step:g} mm by its "
                "affine; export it again"
            )


def _check_labels(path: Path, array: NDArray[Any], dtype: type[np.generic]) -> None:
    if not np.isfinite(array).all():
        raise UserError(f"{path}: the mask holds NaN or infinity; masks are whole numbers")
    low, high = float(array.min()), float(array.max())
    limit = np.iinfo(dtype).max  # type: ignore[type-var]
    if low < 0 or high > limit or (array.dtype.kind == "f" and not (array == np.rint(array)).all()):
        raise UserError(f"{path}: a mask holds whole numbers from 0 to {limit}, this one {low:g} to {high:g}")
