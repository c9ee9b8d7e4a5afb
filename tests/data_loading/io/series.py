"""Writes volumes as DICOM series with pydicom."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from data_loading.io.volume import Geometry

LPS = np.diag([-1.0, -1.0, 1.0])


def write_series(
    folder: Path, array: NDArray[np.int16], geometry: Geometry, seed: int = 0, number: int = 4, name: str = "synthetic"
) -> list[Path]:
    """Writes (columns, rows, slices) as single slices; file order, instance numbers and rescaling are random.

    The affine's third column must be orthogonal to the others, or nearly.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    study, series, frame = (generate_uid(entropy_srcs=[kind, str(folder), str(number)]) for kind in "abc")
    columns, rows, _ = array.shape
    step = LPS @ geometry.affine[:3, :3]
    lengths = np.linalg.norm(step, axis=0)
    files = []
    for place, index in enumerate(rng.permutation(array.shape[2])):
        header = Dataset()
        header.file_meta = FileMetaDataset()
        header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        header.SOPClassUID = header.file_meta.MediaStorageSOPClassUID = CTImageStorage
        header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        header.StudyInstanceUID, header.SeriesInstanceUID, header.FrameOfReferenceUID = study, series, frame
        header.Modality, header.PatientID, header.PatientName = "CT", "1", "A^B"
        header.PatientBirthDate = header.PatientSex = header.AccessionNumber = header.StudyID = ""
        header.StudyDate, header.StudyTime = "20200101", "000000"
        header.SeriesNumber, header.SeriesDescription, header.InstanceNumber = number, name, place + 1
        header.SliceThickness = 99.0  # must not be used as the slice distance
        header.Rows, header.Columns = rows, columns
        header.PixelSpacing = [float(np.float32(lengths[1])), float(np.float32(lengths[0]))]
        header.ImageOrientationPatient = [f"{value:.12f}" for value in (step[:, :2] / lengths[:2]).T.ravel()]
        position = LPS @ geometry.affine[:3, 3] + index * step[:, 2]
        header.ImagePositionPatient = [f"{value:.9f}"[:16] for value in position]
        header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
        header.BitsAllocated = header.BitsStored = 16
        header.HighBit, header.PixelRepresentation = 15, 1
        slope, intercept = (1.0, 0.0) if place % 2 else (0.5, -100.0)
        header.RescaleSlope, header.RescaleIntercept = slope, intercept
        header.PixelData = np.round((array[:, :, index].T - intercept) / slope).astype("<i2").tobytes()
        files.append(folder / f"IM{place:04d}")
        pydicom.dcmwrite(files[-1], header, enforce_file_format=True)
    return files


def change(path: Path, **values: object) -> None:
    """Sets attributes of a file; None deletes one."""
    header = pydicom.dcmread(path)
    for keyword, value in values.items():
        if value is None:
            header.pop(keyword, None)
        else:
            setattr(header, keyword, value)
    header.save_as(path)
