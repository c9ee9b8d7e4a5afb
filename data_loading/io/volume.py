"""Volume and Geometry: a scan in memory and its position in space; reads and writes NIfTI.

Files are not trusted: the size in the header is checked before voxels are read, redundant fields of the header must
agree, and a gzip stream is read to its end so that its checksum is verified (nibabel alone silently loads a flipped
byte).
"""

from __future__ import annotations

import gzip
import io
import itertools
import logging
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from common.files import replacing
from common.memory import free_memory_bytes
from data_loading.io.mask_values import whole_numbers
from data_loading.io.nifti_bytes import (
    HEADER_TYPES,
    axes_of,
    header_size,
    open_unpacked,
    read_header_bytes,
    read_up_to,
    read_voxels,
)

ML_PER_MM3 = 1e-3
# Memory needed at once besides the stored voxels: a voxel is converted to float32 and resampled to another float32.
WORKING_BYTES_PER_VOXEL = 12
# Corners of two equal grids may differ by this fraction of a voxel: DICOM positions are rounded decimals.
GRID_TOLERANCE = 0.05
# Largest difference between spacing and affine of one header, as a fraction of the spacing: some programs round one of
# them. A larger one is an error that resampling would act on (in the real scans tested they agree to the last bit).
SPACING_TOLERANCE = 1e-2
# Volume of the parallelepiped spanned by unit vectors along the axes; below this, two axes run the same way.
SINGULAR = 1e-2
# The lowest three bits of xyzt_units; 0 is unspecified, which means mm in practice.
UNSUPPORTED_UNITS = {1: "metres", 3: "microns"}
# Some programs pad the file to a block after the last voxel; a longer stream may never end.
MAX_TRAILING_BYTES = 1 << 20
# nibabel logs header oddities on stderr; those that matter are raised as UserError here.
nib.imageglobals.logger.setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class Geometry:
    """Position of a scan's voxels in space.

    Attributes:
        affine: (4, 4) float64, maps a voxel index (d, h, w, 1) to scanner coordinates (x, y, z, 1) in mm.
        shape: number of voxels along the three stored axes.
        spacing_mm: distance between voxel centres along each axis, from the header's pixdim.
    """

    affine: NDArray[np.float64]
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel in ml."""
        return volume_ml(self.affine[:3, :3])

    def to_json(self) -> dict[str, Any]:
        return {"affine": self.affine.tolist(), "shape": list(self.shape), "spacing_mm": list(self.spacing_mm)}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Geometry:
        d, h, w = (int(n) for n in record["shape"])
        sd, sh, sw = (float(s) for s in record["spacing_mm"])
        return cls(np.asarray(record["affine"], dtype=np.float64), (d, h, w), (sd, sh, sw))

    def cropped(self, start: tuple[int, int, int], shape: tuple[int, int, int]) -> Geometry:
        """Returns the geometry of a crop of this shape whose first voxel is `start`."""
        affine = self.affine.copy()
        affine[:3, 3] = self.affine[:3, :3] @ start + self.affine[:3, 3]
        return Geometry(affine, shape, self.spacing_mm)


def volume_ml(steps_mm: NDArray[np.float64]) -> float:
    """Returns the volume in ml of a voxel whose edges are the columns of a (3, 3) matrix.

    The determinant, not the product of lengths: with a tilted gantry the axes are not orthogonal.
    """
    return abs(float(np.linalg.det(steps_mm))) * ML_PER_MM3


@dataclass(frozen=True)
class Volume:
    """A scan or a mask.

    Attributes:
        array: (C, D, H, W).
        geometry: its position in space.
        notes: what the user should know about its file, one line each.
        whole: for a part of a scan, the whole scan's array, whose intensities decide how the part is scaled.
    """

    array: NDArray[Any]
    geometry: Geometry
    notes: tuple[str, ...] = ()
    whole: NDArray[Any] | None = None


def read_nifti(path: Path, dtype: type[np.generic]) -> Volume:
    """Reads a whole `.nii` or `.nii.gz` file.

    Args:
        path: a 3-D scan, a 4-D one with its channels last, as in the Decathlon, or one slice; trailing axes of one
            voxel do not count, and a vector image (x, y, z, 1, channels) has channels.
        dtype: type of the returned values, np.float32 for scans and an integer for masks.

    Returns:
        The volume, array (C, D, H, W) with its axes in the order of the file.

    Raises:
        UserError: the file is missing, damaged, not NIfTI, has an impossible or inconsistent header, or needs more
            than the free memory.
    """
    is_mask = np.issubdtype(dtype, np.integer)
    notes: tuple[str, ...] = ()
    # Values too large for float32 become infinite, which preprocessing rejects.
    with open_unpacked(path) as stream, np.errstate(over="ignore", invalid="ignore"):
        header = read_header_bytes(path, stream)
        _check_header(path, header)
        image = _parse(path, header)
        array = read_voxels(path, stream, image, None if is_mask else dtype)
        # gzip compares its checksum only at the end of the stream, so trailing bytes are read as well.
        if len(read_up_to(path, stream, MAX_TRAILING_BYTES + 1)) > MAX_TRAILING_BYTES:
            raise UserError(
                f"{path}: continues for more than {MAX_TRAILING_BYTES >> 20} MiB after the last voxel that its header "
                "describes; export it again"
            )
        if is_mask:
            array, notes = whole_numbers(path, array, dtype)
        elif not int(image.header["qform_code"]) and not int(image.header["sform_code"]):
            axes = "".join(nib.aff2axcodes(image.affine))
            notes = (f"{path.name}: its header states no orientation; its axes are taken to run {axes}",)
    return Volume(array, geometry_of(image), notes)


def read_geometry(path: Path) -> Geometry:
    """Reads only the geometry, with the checks of `read_nifti` that need only the header."""
    return geometry_of(_read_header(path))


def read_channels(path: Path) -> int:
    """Reads only the number of channels, from the header."""
    return axes_of(_read_header(path).shape)[3]


def _read_header(path: Path) -> nib.Nifti1Image:
    with open_unpacked(path) as stream:
        header = read_header_bytes(path, stream)
    _check_header(path, header)
    return _parse(path, header)


def geometry_of(image: nib.Nifti1Image) -> Geometry:
    """Returns the geometry of a NIfTI image; the spacing is pixdim[1:4], as in MLPerf's preprocessing."""
    sd, sh, sw = (float(s) for s in image.header["pixdim"][1:4])
    affine = np.asarray(image.affine, dtype=np.float64)
    if len(image.shape) == 2:  # the header may lack the third spacing
        sw = float(np.linalg.norm(affine[:3, 2]))
    return Geometry(affine, axes_of(image.shape)[:3], (sd, sh, sw))


def write_nifti(path: Path, volume: Volume) -> None:
    """Writes a one-channel volume as NIfTI, atomically and reproducibly byte for byte.

    Args:
        path: a `.nii` or `.nii.gz` file in an existing folder.
        volume: array (1, D, H, W).
    """
    image = nib.Nifti1Image(volume.array[0], volume.geometry.affine)
    image.header["pixdim"][1:4] = volume.geometry.spacing_mm
    content = image.to_bytes()
    if path.name.lower().endswith(".gz"):
        # mtime=0: otherwise gzip writes the current time. Level 1: noise hardly compresses.
        content = gzip.compress(content, compresslevel=1, mtime=0)
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def is_same_position(one: Geometry, other: Geometry) -> bool:
    """Returns whether the voxels of two grids of one shape are in the same positions."""
    corners = np.array([[*corner, 1] for corner in itertools.product(*((0, n - 1) for n in one.shape))])
    distances_mm = np.linalg.norm((corners @ (one.affine - other.affine).T)[:, :3], axis=1)
    return bool(distances_mm.max() <= GRID_TOLERANCE * min(one.spacing_mm))


def check_same_geometry(image: Geometry, label: Geometry, case: str) -> None:
    """Raises UserError, naming the axis, unless the voxels of image and mask are in the same positions."""
    if image.shape != label.shape:
        raise UserError(
            f"{case}: the image has shape {image.shape} but its mask {label.shape}; "
            "export the mask again on the image's grid"
        )
    if is_same_position(image, label):
        return
    difference = np.abs(image.affine - label.affine)
    # What an axis' step contributes at its far end.
    axis = int((difference.max(axis=0) * [*(max(1, n - 1) for n in image.shape), 1]).argmax())
    name = f"axis {axis}" if axis < 3 else "the origin"
    raise UserError(
        f"{case}: the affines of image and mask differ by {difference[:, axis].max():.3g} mm at {name}; "
        "export the mask again on the image's grid"
    )


def check_memory(subject: str, needed_bytes: int) -> None:
    """Raises UserError if more memory is needed than is free; the message begins with `subject`."""
    if needed_bytes > (free_bytes := free_memory_bytes()):
        raise UserError(
            f"{subject} need {needed_bytes / 2**30:.1f} GiB of memory, but only {free_bytes / 2**30:.1f} GiB are free; "
            "a header is damaged, or this machine is too small"
        )


def _check_header(path: Path, header: bytes) -> None:
    """Raises UserError for a bad header or too large a scan."""
    header_type, _ = HEADER_TYPES[header_size(header)]
    try:
        parsed = header_type.from_fileobj(io.BytesIO(header))
        shape = [int(n) for n in parsed.get_data_shape()]
        stored = parsed.get_data_dtype()
        offset = int(parsed["vox_offset"])
        # Unchecked, because nibabel would replace a spacing of 0 by 1 mm, drop a sign, and correct bitpix.
        as_stored = header_type(header, check=False)
        spacing = np.abs(as_stored["pixdim"][1:4]).tolist()[: max(2, min(3, len(shape)))]
        bits, unit = int(as_stored["bitpix"]), int(as_stored["xyzt_units"]) & 7
        if offset < header_size(header) + 4:
            raise ValueError("the voxels overlap the header")
    except Exception:  # nibabel raises many types on a bad header
        raise UserError(f"{path}: not a NIfTI file, or its header is damaged; export it again") from None
    if stored.kind not in "iuf":
        raise UserError(
            f"{path}: stores {stored} values; expected one real number per voxel, not colours or complex numbers"
        )
    if bits != 8 * stored.itemsize:
        raise UserError(f"{path}: the header states {stored} but {bits} bits per voxel; export it again")
    try:
        axes_of(shape)
    except ValueError:
        raise UserError(
            f"{path}: expected a 3-D scan (or 4-D with channels last), the header states {tuple(shape)}"
        ) from None
    if not all(0 < s < 1e4 for s in spacing):
        raise UserError(f"{path}: the header's voxel spacing {spacing} mm is impossible; export it again")
    if unit in UNSUPPORTED_UNITS:
        raise UserError(f"{path}: the header's voxel spacing is in {UNSUPPORTED_UNITS[unit]}; export it in mm")
    voxels = math.prod(shape)
    needed = offset + voxels * (stored.itemsize + WORKING_BYTES_PER_VOXEL)
    check_memory(f"{path}: the header claims {tuple(shape)} voxels, which", needed)


def _parse(path: Path, content: bytes) -> nib.Nifti1Image:
    try:
        with warnings.catch_warnings(action="ignore"):  # about odd extensions, which are not used
            image = HEADER_TYPES[header_size(content)][1].from_bytes(content)
    except Exception:  # nibabel raises many types on a bad header
        raise UserError(
            f"{path}: not a readable NIfTI file: the header's scaling or rotation is impossible; export it again"
        ) from None
    if not np.isfinite(image.affine).all():
        raise UserError(f"{path}: the header's affine holds NaN or infinity; export it again")
    _check_spacing(path, geometry_of(image))
    return image


def _check_spacing(path: Path, geometry: Geometry) -> None:
    """Raises UserError, naming the axis, unless the spacing agrees with the affine, whose axes must be independent."""
    of_affine = np.linalg.norm(geometry.affine[:3, :3], axis=0)
    for axis, (spacing, step) in enumerate(zip(geometry.spacing_mm, of_affine.tolist(), strict=True)):
        if abs(spacing - step) > SPACING_TOLERANCE * spacing:
            raise UserError(
                f"{path}: along axis {axis} the header's voxel spacing is {spacing:g} mm, but by its affine it is "
                f"{step:g} mm; export it again"
            )
    if not abs(np.linalg.det(geometry.affine[:3, :3] / of_affine)) > SINGULAR:
        raise UserError(f"{path}: the header's affine is singular: two axes run the same way; export it again")
