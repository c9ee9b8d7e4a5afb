"""The bytes of NIfTI files: packed or not, NIfTI-1 or NIfTI-2, recognised by their first bytes, whatever the name."""

from __future__ import annotations

import gzip
import io
import stat
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib

from common.errors import UserError

GZIP_MAGIC = b"\x1f\x8b"
# The header's first field is its size in bytes. It is followed by 4 bytes that announce extensions; voxels begin there
# or later.
HEADER_TYPES = {348: (nib.Nifti1Header, nib.Nifti1Image), 540: (nib.Nifti2Header, nib.Nifti2Image)}
FIRST_VOXEL_BYTE = 352

BinaryStream = gzip.GzipFile | io.BufferedReader


@contextmanager
def open_unpacked(path: Path) -> Iterator[BinaryStream]:
    """Opens a file, whose content is unpacked if it begins like gzip's."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # opening a pipe would block
            raise UserError(f"{path}: a pipe or a device; expected a file")
        stream = path.open("rb")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    with stream:
        is_packed = read_up_to(path, stream, len(GZIP_MAGIC)) == GZIP_MAGIC
        stream.seek(0)
        yield gzip.GzipFile(fileobj=stream) if is_packed else stream


def read_up_to(path: Path, stream: BinaryStream, size: int) -> bytes:
    """Reads up to `size` bytes. Raises UserError if a packed stream is damaged."""
    try:
        return stream.read(size)
    except EOFError:
        raise UserError(f"{path}: damaged (its packed content ended early); download or export it again") from None
    except (gzip.BadGzipFile, zlib.error):
        raise UserError(
            f"{path}: damaged (its packed content or its CRC checksum is wrong); download or export it again"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def read_header_bytes(path: Path, stream: BinaryStream) -> bytes:
    """Reads as many bytes as the header has by its own account, or fewer if the file is shorter."""
    content = read_up_to(path, stream, min(HEADER_TYPES))
    missing = max(HEADER_TYPES) - len(content) if header_size(content) == max(HEADER_TYPES) else 0
    return content + (read_up_to(path, stream, missing) if missing else b"")


def header_size(content: bytes) -> int:
    """Returns the header's size in bytes, that of NIfTI-1 if the file does not begin like NIfTI."""
    sizes = [int.from_bytes(content[:4], order) for order in ("little", "big")]
    return next((size for size in sizes if size in HEADER_TYPES), min(HEADER_TYPES))


def axes_of(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """Returns (D, H, W, C) of a stored shape. Raises ValueError for what is neither a scan nor a slice."""
    axes = [int(n) for n in shape]
    while len(axes) > 3 and axes[-1] == 1:
        axes.pop()
    if len(axes) == 5 and axes[3] == 1:  # a vector image, as ITK writes it
        del axes[3]
    axes += [1] * (3 - len(axes)) if len(axes) == 2 else []
    if len(axes) not in (3, 4) or min(axes) < 1:
        raise ValueError(f"not a scan: {tuple(shape)}")
    d, h, w, *channels = axes
    return d, h, w, channels[0] if channels else 1
