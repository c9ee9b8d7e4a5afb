"""Finds the scans of `--scan` (NIfTI files, 2-D images, DICOM series) and the output file of each mask."""

from __future__ import annotations

import gzip
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from common import registry
from common.errors import UserError
from common.files import files_below, replacing
from common.messages import counted, is_main_rank, logger, note
from data_loading.io.channel_files import channels_beside, check_channels, read_channel_files, scans_of
from data_loading.io.file_kinds import (
    DICOM_SEG,
    PNG,
    count_kinds,
    is_dicom,
    is_file_name,
    is_image_file,
    is_nifti,
    kits19_images,
    passed_over,
    stem,
)
from data_loading.io.nifti_bytes import FIRST_VOXEL_BYTE
from data_loading.io.volume import Geometry, Volume, read_geometry, read_nifti, write_nifti
from data_loading.readers.mask_matching import matching_grids

DICOM = "data_loading.io.dicom"
IMAGES = "data_loading.readers.images"


@dataclass(frozen=True, kw_only=True)
class Source:
    """A scan on disk and the output file of its mask.

    Attributes:
        name: its name in tables and messages.
        output: the file of the mask.
        file: a NIfTI scan or a 2-D image; None for a DICOM series.
        series: a `dicom.Series`; None for a file.
        channels: NIfTI files of a scan whose channels are files of their own; `file` is the first.
    """

    name: str
    output: Path
    file: Path | None = None
    series: Any = None
    channels: tuple[Path, ...] = ()

    def voxels(self) -> int:
        """Returns the number of voxels, from the headers only. Raises UserError as `read` does."""
        if self.file is None:
            _, geometry = registry.load(f"{DICOM}:sorted_headers", "--scan", "dicom")(self.series)
        else:
            geometry = (_image_io("read_image_geometry") if is_image_file(self.file) else read_geometry)(self.file)
        return math.prod(geometry.shape)

    def read(self, channels: int) -> Volume:
        """Reads the scan as (C, D, H, W) float32.

        Args:
            channels: input channels of the network; a grey image is repeated over three.

        Raises:
            UserError: the scan is damaged, not a volume, or lacks the file of a channel.
        """
        if self.file is None:
            return registry.load(f"{DICOM}:read_series", "--scan", "dicom")(self.series)
        if is_image_file(self.file):
            return _image_io("read_image")(self.file, channels)
        if self.channels:
            check_channels(self.channels, self.name, channels)
            return read_channel_files(self.channels, self.name)
        return read_nifti(self.file, np.float32)

    def write(self, mask: Volume, classes: Sequence[str]) -> list[str]:
        """Writes the mask (1, D, H, W) on the scan's grid, atomically. Returns messages for the user."""
        if self.output.suffix.lower() == DICOM_SEG:
            write = registry.load(f"{DICOM}_seg:write_segmentation", "--output", "dicom")
            return write(self.output, mask.array, self.series, classes)
        if is_image_file(self.output):
            _image_io("write_mask")(self.output, mask.array)
        else:
            write_nifti(self.output, mask)
        return []


def _image_io(name: str) -> Callable[..., Any]:
    return registry.load(f"{IMAGES}:{name}", "--scan", "images")


def find_sources(scan: Path, output: Path, series: str | None, channels: int = 1) -> list[Source]:
    """Finds the scans of `--scan`: a file, or a folder's DICOM series, NIfTI files or 2-D images (see `_in_folder`).

    Args:
        output: a file for the mask of a single scan, or a folder in which masks are named after their scans.
        series: selects a DICOM series (see `dicom.choose_series`).
        channels: of the network, for scans under nnU-Net's names, which have a file for each (see `channel_files.py`).

    Raises:
        UserError: no scans, an ambiguous series, an unsuitable output format, or a mask that would replace a scan.
    """
    if not scan.exists():
        raise UserError(f"--scan {scan}: no such file or folder")
    if scan.is_dir():
        sources = _in_folder(scan, output, series, channels)
        files = [source.file for source in sources if source.file]
    elif is_nifti(scan) or is_image_file(scan):
        beside = channels_beside(scan)
        is_joined = bool(scans_of(beside, channels))
        sources = _nifti_sources(beside, output, channels) if is_joined else _file_sources([scan], output, [stem(scan)])
        files = [scan]
    elif is_dicom(scan):
        raise UserError(
            f"--scan {scan}: one file of DICOM; give the folder of its series, such as --scan {scan.parent}"
        )
    else:
        raise UserError(
            f"--scan {scan}: expected a .nii or .nii.gz file, a folder of them, or a folder with a DICOM series"
        )
    kind, suffix = ("2-D images", PNG) if files and is_image_file(files[0]) else ("NIfTI", ".nii.gz")
    if files and series not in (None, "all"):
        raise UserError(f"--series {series} applies only to DICOM, but {scan} contains {kind}")
    if files and output.suffix.lower() == DICOM_SEG:
        raise UserError(
            f"--output {output}: DICOM-SEG refers to DICOM slices, but {scan} contains {kind}; write {suffix}"
        )
    if kind == "NIfTI" and output.suffix.lower() == PNG and not output.is_dir():
        raise UserError(f"--output {output}: an image has one slice, but {scan} is a volume; write .nii.gz")
    if is_file_name(output) and len(sources) > 1:
        raise UserError(f"--output {output} is a file, but {scan} holds {len(sources)} scans; give a folder")
    _check_targets(sources)
    return sources


def _check_targets(sources: Sequence[Source]) -> None:
    """Raises UserError if a mask would replace a scan or another mask."""
    taken = {file.resolve() for source in sources for file in (source.file, *source.channels) if file}
    for source in sources:
        target = source.output.resolve()
        if target in taken:
            raise UserError(f"--output: {source.output} is a scan or another scan's mask; choose another folder")
        taken.add(target)


def _file_sources(files: Sequence[Path], output: Path, names: Sequence[str]) -> list[Source]:
    endings = [PNG if is_image_file(file) else file.name[len(stem(file)) :].lower() for file in files]
    return [
        Source(name=name, output=output if is_file_name(output) else output / f"{name}{ending}", file=file)
        for name, ending, file in zip(names, endings, files, strict=True)
    ]


def _nifti_sources(files: Sequence[Path], output: Path, channels: int) -> list[Source]:
    """Returns the sources of NIfTI files or 2-D images; masks of scans with nnU-Net's names are called CASE.nii.gz."""
    if not (scans := scans_of(files, channels)):
        return _file_sources(files, output, [stem(file) for file in files])
    sources = _file_sources([parts[0] for parts in scans.values()], output, list(scans))
    return [replace(source, channels=tuple(scans[source.name])) for source in sources] if channels > 1 else sources


def _in_folder(folder: Path, output: Path, wanted: str | None, channels: int) -> list[Source]:
    """Finds the scans in a folder, of one kind: DICOM series in it and its subfolders, NIfTI files, or 2-D images.

    Where DICOM images lie, pictures are their previews, and NIfTI files are their copies or masks if they are on the
    grid of a series. KiTS19's raw layout is NIfTI files called after their folders. What else lies beside the scans is
    counted.

    Raises:
        UserError: no scans, or NIfTI files beside DICOM that are on no series' grid.
    """
    found = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    files = [file for file in found if is_nifti(file)] or [file for file in found if is_image_file(file)]
    named: list[Path] = []  # in notes
    everything = files_below(folder)
    if any(map(is_dicom, everything)):
        dicom = registry.load(f"{DICOM}:search_folder", "--scan", "dicom")(folder)
        if dicom.holds_scans() or not files:
            _explain_files_beside(dicom.require("--scan", folder), folder, found, wanted)
            return _series_sources(dicom, folder, output, wanted)
        _note_once(dicom.notes())
        named = [each.path for each in dicom.unread]
    if files:
        if line := passed_over(folder, [*files, *named], f"--scan {folder}: passed over "):
            logger.info(line)
        return _nifti_sources(files, output, channels)
    if cases := kits19_images(folder):
        if line := passed_over(folder, [case.parent for case in cases], f"--scan {folder}: passed over "):
            logger.info(line)
        return _file_sources(cases, output, [case.parent.name for case in cases])
    below = [path for path in everything if is_nifti(path) or is_image_file(path)]
    if below:
        raise UserError(
            f"--scan {folder}: its scans are in sub-folders ({counted(len(below), 'file')}, such as "
            f"{below[0].relative_to(folder)}); give one of them, such as --scan {below[0].parent}"
        )
    held = count_kinds(found)
    raise UserError(
        f"--scan {folder}: no NIfTI file, 2-D image or DICOM series in it{f'; it holds {held}' if held else ''}"
    )


def _explain_files_beside(series: Sequence[Any], folder: Path, files: Sequence[Path], wanted: str | None) -> None:
    """Notes which files beside DICOM series are not predicted. Raises UserError if one may be a scan of its own.

    Args:
        wanted: the series that the user chose, which answers the question.
    """
    grids = {}
    for each in series:
        with suppress(UserError):  # a localiser; reading the series reports others
            grids[each.name] = registry.load(f"{DICOM}:sorted_headers", "--scan", "dicom")(each)[1]
    of_series: list[str] = []
    unknown: list[Path] = []
    for file in files:
        if is_nifti(file):
            on = [list(grids)[index] for index in matching_grids(file, list(grids.values()))]
            of_series += [f"{file.name} is on the grid of series {on[0]}, so a copy or a mask of it"] if on else []
            unknown += [] if on else [file]
    pictures = [file.name for file in files if is_image_file(file)]
    if unknown and wanted is None:
        raise UserError(
            f"--scan {folder} holds DICOM series ({'; '.join(map(str, series))}) and NIfTI files on other grids "
            f"({', '.join(file.name for file in unknown[:3])}); choose a series with --series, or give a file, such as "
            f"--scan {unknown[0]}"
        )
    lines = of_series + [f"{file.name} is NIfTI beside DICOM" for file in unknown]
    lines += [f"{len(pictures)} picture{'s' * (len(pictures) > 1)} beside DICOM ({pictures[0]})"] if pictures else []
    _note_once([f"--scan {folder}: only its DICOM is predicted; {'; '.join(lines)}"] if lines else [])


def _note_once(lines: Sequence[str]) -> None:
    """Prints notes on rank 0 only: every rank looks for the scans."""
    for line in lines if is_main_rank() else ():
        note(line)


def _series_sources(dicom: Any, folder: Path, output: Path, wanted: str | None) -> list[Source]:
    chosen = registry.load(f"{DICOM}:choose_series", "--series", "dicom")(dicom.series, wanted, folder)
    _note_once(dicom.notes())
    sources = []
    for series in chosen:
        # The name of a folder is a valid file name; a series' UID or number may not be.
        only = len(dicom.series) == 1
        name = folder.resolve().name if only else "series_" + re.sub(r"[^\w.-]", "_", series.name)
        target = output if is_file_name(output) else output / f"{name}.nii.gz"
        sources.append(Source(name=name, output=target, series=series))
    return sources


@contextmanager
def probabilities_file(path: Path, geometry: Geometry, classes: int) -> Iterator[Callable[[NDArray[np.float32]], None]]:
    """Writes a 4-D NIfTI file (D, H, W, K) float32 atomically, class by class, so that only one class is in memory.

    Yields:
        A function that writes the next class, (D, H, W).
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

        def write_class(values: NDArray[np.float32]) -> None:
            for plane in np.moveaxis(values, 2, 0):  # in NIfTI the first axis varies fastest
                stream.write(plane.astype(np.float32).tobytes(order="F"))

        yield write_class
