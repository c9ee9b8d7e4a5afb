"""What `--scan` names, and where `--output` puts the masks: NIfTI files and DICOM series."""

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

import plugins
from data_loading.volume import FIRST_VOXEL_BYTE, Geometry, Volume, read_geometry, read_nifti, write_nifti
from errors import UserError
from files import replacing

NIFTI = (".nii.gz", ".nii")
DICOM_SEG = ".dcm"
DICOM = "data_loading.extras.dicom"


@dataclass(frozen=True)
class Source:
    """A scan on disk and the file for its mask.

    Attributes:
        name: for tables and messages.
        file: of a NIfTI scan, None for a series.
        series: a `dicom.Series`, None for a NIfTI scan.
    """

    name: str
    output: Path
    file: Path | None = None
    series: Any = None

    def voxels(self) -> int:
        """How many voxels it has by its header or headers; raises UserError as `read` does."""
        if self.file is not None:
            return math.prod(read_geometry(self.file).shape)
        _, geometry = plugins.load(f"{DICOM}:sorted_headers", "--scan", "dicom")(self.series)
        return math.prod(geometry.shape)

    def read(self) -> Volume:
        """The scan, (C, D, H, W) float32. Raises UserError when it is damaged or no volume."""
        if self.file is not None:
            return read_nifti(self.file, np.float32)
        volume: Volume = plugins.load(f"{DICOM}:read_series", "--scan", "dicom")(self.series)
        return volume

    def write(self, mask: Volume, classes: Sequence[str]) -> list[str]:
        """Writes the mask (1, D, H, W) on the scan's grid, atomically; lines for the user."""
        if self.output.suffix == DICOM_SEG:
            write = plugins.load(f"{DICOM}_seg:write_segmentation", "--output", "dicom")
            notes: list[str] = write(self.output, mask.array, self.series, classes)
            return notes
        write_nifti(self.output, mask)
        return []


def is_file_name(output: Path) -> bool:
    """Whether `--output` names a file rather than a folder."""
    return output.name.endswith((*NIFTI, DICOM_SEG)) and not output.is_dir()


def stem(path: Path) -> str:
    """The file's name without its ending."""
    for ending in (*NIFTI, DICOM_SEG):
        if path.name.endswith(ending):
            return path.name.removesuffix(ending)
    return path.name


def find_sources(scan: Path, output: Path, series: str | None) -> list[Source]:
    """The scans that `scan` holds: one file, the NIfTI files of a folder, or its DICOM series.

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
        files = sorted(file for file in visible if file.name.endswith(NIFTI))
        sources = _of_nifti(files, output) if files else _of_dicom(scan, output, series)
    elif scan.name.endswith(NIFTI):
        files, sources = [scan], _of_nifti([scan], output)
    else:
        raise UserError(f"--scan {scan}: expected a .nii or .nii.gz file, a folder of them, or of a DICOM series")
    if files and series is not None:
        raise UserError(f"--series {series} is for DICOM; {scan} is NIfTI")
    if files and output.suffix == DICOM_SEG:
        raise UserError(f"--output {output}: DICOM-SEG refers to DICOM slices, and {scan} is NIfTI; write .nii.gz")
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


def _of_nifti(files: Sequence[Path], output: Path) -> list[Source]:
    return [Source(stem(file), output if is_file_name(output) else output / file.name, file) for file in files]


def _of_dicom(folder: Path, output: Path, wanted: str | None) -> list[Source]:
    found = plugins.load(f"{DICOM}:find_series", "--scan", "dicom")(folder)
    chosen = plugins.load(f"{DICOM}:choose_series", "--series", "dicom")(found, wanted, folder)
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
