"""The bytes of NIfTI files: packed or not, NIfTI-1 or NIfTI-2, recognised by their first bytes, whatever the name."""

from __future__ import annotations

import gzip
import io
import stat
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.arrayproxy import ArrayProxy
from numpy.typing import NDArray

from common.errors import UserError

GzipFile: type[gzip.GzipFile] = gzip.GzipFile
DAMAGE_ERRORS: tuple[type[Exception], ...] = (gzip.BadGzipFile, zlib.error)
with suppress(ImportError):  # optional: inflates three times as fast as zlib
    from isal import igzip, igzip_lib

    GzipFile = igzip.IGzipFile
    DAMAGE_ERRORS = (*DAMAGE_ERRORS, igzip_lib.IsalError)

GZIP_MAGIC = b"\x1f\x8b"
# The header's first field is its size in bytes. It is followed by 4 bytes that announce extensions; voxels begin there
# or later.
HEADER_TYPES = {348: (nib.Nifti1Header, nib.Nifti1Image), 540: (nib.Nifti2Header, nib.Nifti2Image)}
FIRST_VOXEL_BYTE = 352
# Voxels are converted this many columns at a time: a row of 16 float32 fills a cache line, and the columns of a scan
# stay in the cache. More if the columns are small.
COLUMNS = 16
LEAST_BLOCK_BYTES = 1 << 20

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
        yield GzipFile(fileobj=stream) if is_packed else stream


def read_up_to(path: Path, stream: BinaryStream, size: int) -> bytes:
    """Reads up to `size` bytes. Raises UserError if a packed stream is damaged."""
    try:
        return stream.read(size)
    except EOFError:
        raise UserError(f"{path}: damaged (its packed content ended early); download or export it again") from None
    except DAMAGE_ERRORS:
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


def read_voxels(
    path: Path, stream: BinaryStream, image: nib.Nifti1Image, dtype: type[np.generic] | None
) -> NDArray[Any]:
    """Reads the voxels of a scan, (C, D, H, W), from a stream that is not beyond the first of them.

    A file has D innermost and W outermost. Some columns (D, H, a part of W) at a time are read, scaled and transposed
    while they are in the cache, which is several times as fast as reading the file and transposing it as a whole, and
    needs no memory for the file.

    Args:
        image: the header's, with an `ArrayProxy`.
        dtype: type of the returned values; None: as stored, or as scaling makes it.

    Raises:
        UserError: the stream is damaged or too short.
    """
    proxy: Any = image.dataobj
    read_up_to(path, stream, proxy.offset - stream.tell())
    d, h, w, channels = axes_of(image.shape)
    column_bytes = d * h * proxy.dtype.itemsize
    columns = max(COLUMNS, LEAST_BLOCK_BYTES // column_bytes)
    array: NDArray[Any] | None = None
    for channel in range(channels):
        for first in range(0, w, columns):
            size = min(columns, w - first)
            content = read_up_to(path, stream, size * column_bytes)
            if len(content) < size * column_bytes:
                whole = proxy.offset + channels * w * column_bytes
                raise UserError(f"{path}: ends after {stream.tell()} of {whole} bytes; download or export it again")
            part = (d, h, size), proxy.dtype, 0, proxy.slope, proxy.inter
            block = np.asarray(ArrayProxy(io.BytesIO(content), part))
            if array is None:
                array = np.empty((channels, d, h, w), dtype or block.dtype)
            array[channel, :, :, first : first + size] = block
    assert array is not None
    return array
