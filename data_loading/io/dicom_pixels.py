"""Pixels of a DICOM slice. Needs `pip install '.[dicom]'`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.pixels.processing import apply_modality_lut

from common.compat import is_missing_dicom_decoder
from common.errors import UserError
from data_loading.io.dicom_headers import DAMAGED, read_dataset

EXPORT_AGAIN = "export it again"


def stored_pixels(dataset: Any) -> bytes:
    """Returns the pixels of a file as stored, perhaps compressed; b"" for none."""
    for keyword in ("PixelData", "FloatPixelData", "DoubleFloatPixelData"):
        if values := dataset.get(keyword):
            return bytes(values)
    return b""


def are_copies(one: Path, other: Path) -> bool:
    """Returns whether two files hold the same pixels."""
    return stored_pixels(read_dataset(one)) == stored_pixels(read_dataset(other))


def read_pixels(path: Path, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Reads a slice (rows, columns), rescaled, which gives HU for CT. Values beyond float32 become infinite."""
    dataset = read_dataset(path)
    if not stored_pixels(dataset):
        raise UserError(f"{path}: holds no pixels; {EXPORT_AGAIN}")
    try:
        with warnings.catch_warnings(action="ignore"):
            stored = dataset.pixel_array
    except Exception as error:  # pydicom raises many types on a damaged file
        if isinstance(error, NotImplementedError | RuntimeError) and is_missing_dicom_decoder(error):
            syntax = dataset.file_meta.TransferSyntaxUID.name
            raise UserError(f"{path}: no installed package decodes {syntax}; pip install '.[dicom]'") from None
        raise UserError(f"{path}: its pixels cannot be decoded: {DAMAGED}; {EXPORT_AGAIN}") from None
    if stored.shape != shape:
        raise UserError(f"{path}: holds pixels of shape {stored.shape}, but its header states {shape}")
    with np.errstate(over="ignore", invalid="ignore"):
        return _rescale(stored, dataset, path).astype(np.float32)


def _rescale(stored: NDArray[Any], dataset: Any, path: Path) -> NDArray[Any]:
    """Applies the modality LUT, or slope and intercept, of which an empty one is absent."""
    if dataset.get("ModalityLUTSequence"):
        try:
            return apply_modality_lut(stored, dataset)
        except Exception:  # pydicom raises many types on a damaged file
            raise UserError(f"{path}: its ModalityLUTSequence is damaged; {EXPORT_AGAIN}") from None
    numbers = {}
    for keyword, absent in (("RescaleSlope", 1.0), ("RescaleIntercept", 0.0)):
        value = dataset.get(keyword)
        try:
            numbers[keyword] = absent if value in (None, "") else float(value)
        except (TypeError, ValueError):
            raise UserError(f"{path}: {keyword} is {value!s}, not a number; {EXPORT_AGAIN}") from None
    if numbers["RescaleSlope"] == 0:
        raise UserError(f"{path}: RescaleSlope is 0, which makes all pixels equal; {EXPORT_AGAIN}")
    return stored.astype(np.float64) * numbers["RescaleSlope"] + numbers["RescaleIntercept"]
