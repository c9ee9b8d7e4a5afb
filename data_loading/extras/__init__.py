"""Optional additions to the data's room; the core imports none of them.

What lives here: the data sets `dicom`, `images` and `nifti`; scans to predict and where their masks go; DICOM series,
DICOM-SEG in and out.
May import: what `data_loading/` may, and packages of a named group of `pyproject.toml`, such as pydicom (`dicom`).
To add a data set: a reader of a `RawDataset` in a file of its own, and its line in `RAW_LAYOUTS` of `raw_layouts.py`.
To add a kind of scan: a reader of a `Volume`, and its line in `sources.py`.
"""
