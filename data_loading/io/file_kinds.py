"""Which files are scans, by their names or first bytes, and what else a folder holds."""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from common.messages import counted

NIFTI = (".nii.gz", ".nii")
DICOM_SEG = ".dcm"
PNG = ".png"
# 2-D images are read in these formats; their masks are written as PNG.
IMAGE_SUFFIXES = (PNG, ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")


def is_nifti(path: Path) -> bool:
    """Returns whether the file name is that of a NIfTI file, such as scan.nii.gz or SCAN.NII; hidden files are not."""
    return path.name.lower().endswith(NIFTI) and not path.name.startswith(".")


def kits19_file(folder: Path, name: str) -> Path:
    """Returns a file of a KiTS19 case: packed, or plain as some tools leave it if there is no packed one."""
    packed, plain = folder / f"{name}.nii.gz", folder / f"{name}.nii"
    return plain if plain.exists() and not packed.exists() else packed


def kits19_images(folder: Path) -> list[Path]:
    """Returns the scans of a folder with KiTS19's raw layout, case_00000/imaging.nii.gz …."""
    images = (kits19_file(case, "imaging") for case in sorted(folder.glob("case_*")))
    return [image for image in images if image.exists()]


def count_kinds(paths: Iterable[Path]) -> str:
    """Returns how many folders and files of each ending there are, most frequent first; "" without any.

    Files without an ending are counted by their names, in which # stands for a number: IM0001 is IM#. Hidden ones do
    not count.
    """
    kinds = Counter(_kind(path) for path in paths if not path.name.startswith("."))
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5)) + (", …" if len(kinds) > 5 else "")


def _kind(path: Path) -> str:
    if path.is_dir():
        return "folder"
    ending = "".join(path.suffixes[-2:]) if path.suffix.lower() == ".gz" else path.suffix
    return re.sub(r"\d+", "#", path.name) if ending[1:].isdecimal() or not ending else ending


def passed_over(folder: Path, used: Iterable[Path], begin: str) -> str:
    """Returns a line that counts what a folder holds besides the files that are used, by kind; "" for nothing.

    Args:
        begin: what the line begins with.
    """
    others = [path for path in set(folder.iterdir()) - set(used) if not path.name.startswith(".")]
    return f"{begin}{counted(len(others), 'other')} ({count_kinds(sorted(others))})" if others else ""


def is_image_file(path: Path) -> bool:
    """Returns whether the file name is that of a 2-D image; hidden files are not."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def is_dicom(path: Path) -> bool:
    """Returns whether the file begins with the DICOM preamble or, where it lacks that, with a DICOM element.

    The first element of a file without preamble is of group 2 or 8, little-endian, followed by its type, two capital
    letters, or its length.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(132)
    except OSError:
        return False
    if start[128:] == b"DICM":
        return True
    if len(start) < 132:
        return False
    group, element, length = struct.unpack("<HHI", start[:8])
    has_type = start[4:6].isalpha() and start[4:6].isupper()
    return group in (2, 8) and element < 0x100 and (has_type or length <= 64)


def is_file_name(output: Path) -> bool:
    """Returns whether `--output` is a file rather than a folder."""
    return output.name.lower().endswith((*NIFTI, DICOM_SEG, PNG)) and not output.is_dir()


def stem(path: Path) -> str:
    """Returns the file's name without its suffix, such as .nii.gz."""
    for suffix in (*NIFTI, DICOM_SEG, *IMAGE_SUFFIXES):
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.name
