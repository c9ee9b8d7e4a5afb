"""Readers of raw data sets, selected by `--dataset` of `preprocess_dataset.py`.

Each reader finds the cases of one layout and returns a `RawDataset` (see `base.py`).
May import: `common`, `data_loading`; pydicom only in `dicom.py`, Pillow only in `images.py`.
To add a data set: a module with a function (data_dir, ReaderOptions) -> RawDataset, and its line in `READERS`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ReaderEntry:
    """A reader's location and the options it accepts; it is imported only when used.

    Attributes:
        function: "package.module:name".
        options: names of the `ReaderOptions` fields that its users may set.
        extra: group of optional dependencies in pyproject.toml that it needs, "" for none.
    """

    function: str
    options: tuple[str, ...]
    extra: str = ""


BASIC = ("split_ratios", "labels", "drop_empty", "ignore_label")
INTENSITY = ("intensity_window", "intensity")
VOLUME = (*INTENSITY, "spacing", "orientation", "foreground_crop")

READERS: dict[str, ReaderEntry] = {
    "kits19": ReaderEntry(function="data_loading.readers.kits19:read_kits19", options=(*BASIC, *VOLUME)),
    "msd": ReaderEntry(function="data_loading.readers.msd:read_msd", options=(*BASIC, *VOLUME)),
    "dicom": ReaderEntry(
        function="data_loading.readers.dicom:read_dicom",
        options=(*BASIC, *VOLUME, "labels_dir", "slices_per_case"),
        extra="dicom",
    ),
    "images": ReaderEntry(
        function="data_loading.readers.images:read_images",
        options=(*BASIC, *INTENSITY, "labels_dir", "size"),
        extra="images",
    ),
    "nifti": ReaderEntry(
        function="data_loading.readers.nifti:read_nifti_folders",
        options=(*BASIC, *VOLUME, "labels_dir", "slices_per_case"),
    ),
    "nnunet": ReaderEntry(function="data_loading.readers.nnunet:read_nnunet", options=(*BASIC, *VOLUME)),
}
