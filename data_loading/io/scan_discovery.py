"""What `--scan` names, and where `--output` puts the masks: NIfTI files, pictures and DICOM series."""

from __future__ import annotations

import gzip
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from common import registry
from common.errors import UserError
from common.files import replacing
from data_loading.io.volume import FIRST_VOXEL_BYTE, Geometry, Volume, read_geometry, read_nifti, write_nifti

NIFTI = (".nii.gz", ".nii")
DICOM_SEG = ".dcm"
PICTURE = ".png"
# What is read as a picture; masks of pictures are written as PNG.
PICTURES = (PICTURE, ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
DICOM = "data_loading.io.dicom"
IMAGES = "data_loading.readers.images"


@dataclass(frozen=True)
class Source:
    """A scan on disk and the file for its mask.

    Attributes:
        name: for tables and messages.
        file: of a NIfTI scan or a picture, None for a series.
        series: a `dicom.Series`, None for a file.
    """

    name: str
    output: Path
    file: Path | None = None
    series: Any = None

    def voxels(self) -> int:
        """How many voxels it has by its header or headers; raises UserError as `read` does."""
        if self.file is not None:
            geometry = self._picture("picture_geometry") if is_picture(self.file) else read_geometry
            return math.prod(geometry(self.file).shape)
        _, geometry = registry.load(f"{DICOM}:sorted_headers", "--scan", "dicom")(self.series)
        return math.prod(geometry.shape)

    def read(self, channels: int) -> Volume:
        """The scan, (C, D, H, W) float32. Raises UserError when it is damaged or no volume.

        Args:
            channels: the network's; a picture in grey is as good as one in colour.
        """
        if self.file is not None and is_picture(self.file):
            picture: Volume = self._picture("read_picture")(self.file, channels)
            return picture
        if self.file is not None:
            return read_nifti(self.file, np.float32)
        volume: Volume = registry.load(f"{DICOM}:read_series", "--scan", "dicom")(self.series)
        return volume

    def write(self, mask: Volume, classes: Sequence[str]) -> list[str]:
        """Writes the mask (1, D, H, W) on the scan's grid, atomically; lines for the user."""
        if self.output.suffix == DICOM_SEG:
            write = registry.load(f"{DICOM}_seg:write_segmentation", "--output", "dicom")
            notes: list[str] = write(self.output, mask.array, self.series, classes)
            return notes
        if is_picture(self.output):
            self._picture("write_mask")(self.output, mask.array)
            return []
        write_nifti(self.output, mask)
        return []

    def _picture(self, name: str) -> Callable[..., Any]:
        found: Callable[..., Any] = registry.load(f"{IMAGES}:{name}", "--scan", "images")
        return found


def is_picture(path: Path) -> bool:
    """Whether it is one by its name."""
    return path.suffix.lower() in PICTURES and not path.name.startswith(".")


def is_file_name(output: Path) -> bool:
    """Whether `--output` names a file rather than a folder."""
    return output.name.endswith((*NIFTI, DICOM_SEG, PICTURE)) and not output.is_dir()


def stem(path: Path) -> str:
    """The file's name without its ending."""
    for ending in (*NIFTI, DICOM_SEG, *PICTURES):
        if path.name.lower().endswith(ending):
            return path.name[: -len(ending)]
    return path.name


def find_sources(scan: Path, output: Path, series: str | None) -> list[Source]:
    """The scans that `scan` holds: one file, the NIfTI files or else the pictures of a folder, or its DICOM series.

    Args:
        output: a file for a single scan; else a folder, in which masks get their scans' names.
        series: which DICOM series, where there are several.

    Raises:
        UserError: nothing to predict, a choice to make, or masks that would replace their scans.
    """
    if not scan.exists():
        raise UserError(f"--scan {scan}: no such file or folder")
    if scan.is_dir():
        visible = (file for file in scan.iterdir() if file.is_file() and not file.name.startswith("."))
        found = sorted(visible)
        files = [file for file in found if file.name.endswith(NIFTI)] or [file for file in found if is_picture(file)]
        sources = _of_files(files, output) if files else _of_dicom(scan, output, series)
    elif scan.name.endswith(NIFTI) or is_picture(scan):
        files, sources = [scan], _of_files([scan], output)
    else:
        raise UserError(f"--scan {scan}: expected a .nii or .nii.gz file, a folder of them, or of a DICOM series")
    kind, ending = ("pictures", PICTURE) if files and is_picture(files[0]) else ("NIfTI", ".nii.gz")
    if files and series is not None:
        raise UserError(f"--series {series} is for DICOM; {scan} is {kind}")
    if files and output.suffix == DICOM_SEG:
        raise UserError(f"--output {output}: DICOM-SEG refers to DICOM slices, and {scan} is {kind}; write {ending}")
    if kind == "NIfTI" and output.suffix == PICTURE and not output.is_dir():
        raise UserError(f"--output {output}: a picture has one slice, and {scan} is a volume; write .nii.gz")
    if is_file_name(output) and len(sources) > 1:
        raise UserError(f"--output {output} is a file, but {scan} holds {len(sources)} scans; give a folder")
    _check_targets(sources)
    return sources


def _check_targets(sources: Sequence[Source]) -> None:
    """Raises UserError where a mask would replace a scan or another mask."""
    taken = {source.file.resolve() for source in sources if source.file}
    for source in sources:
        target = source.output.resolve()
        if target in taken:
            raise UserError(f"--output: {source.output} is a scan or another scan's mask; give another folder")
        taken.add(target)


def _of_files(files: Sequence[Path], output: Path) -> list[Source]:
    names = [stem(file) + PICTURE if is_picture(file) else file.name for file in files]
    return [
        Source(stem(file), output if is_file_name(output) else output / name, file)
        for file, name in zip(files, names, strict=True)
    ]


def _of_dicom(folder: Path, output: Path, wanted: str | None) -> list[Source]:
    found = registry.load(f"{DICOM}:find_series", "--scan", "dicom")(folder)
    chosen = registry.load(f"{DICOM}:choose_series", "--series", "dicom")(found, wanted, folder)
    sources = []
    for series in chosen:
        # A UID or a number becomes part of a file name; a folder's own name is one already.
        name = folder.resolve().name if len(found) == 1 else "series_" + re.sub(r"[^\w.-]", "_", series.name)
        target = output if is_file_name(output) else output / f"{name}.nii.gz"
        sources.append(Source(name, target, series=series))
    return sources


@contextmanager
def probabilities_file(path: Path, geometry: Geometry, classes: int) -> Iterator[Callable[[NDArray[np.float32]], None]]:
    """A 4-D NIfTI file (D, H, W, K) float32, written class by class, so that one at a time lies in memory; atomic.

    Yields:
        What takes the next class, (D, H, W).
    """
    header = nib.Nifti1Header()
    header.set_data_dtype(np.float32)
    header.set_data_shape((*geometry.shape, classes))
    header.set_sform(geometry.affine, code="aligned")
    header["pixdim"][1:4] = geometry.spacing_mm
    header["magic"], header["vox_offset"] = b"n+1", FIRST_VOXEL_BYTE
    opener: Any = partial(gzip.open, compresslevel=1) if path.name.endswith(".gz") else open
    with replacing(path) as temporary, opener(temporary, "wb") as stream:
        stream.write(header.binaryblock.ljust(FIRST_VOXEL_BYTE, b"\0"))

        def add(values: NDArray[np.float32]) -> None:
            for plane in np.moveaxis(values, 2, 0):  # in NIfTI the first axis runs fastest
                stream.write(plane.astype(np.float32).tobytes(order="F"))

        yield add
