"""Optional additions to the data's room; the core imports none of them.

What lives here: scans to predict and where their masks go, DICOM series in and DICOM-SEG out.
May import: what `data_loading/` may, and packages of a named group of `pyproject.toml`, such as pydicom (`dicom`).
To add a kind of scan: a reader of a `Volume`, and its line in `sources.py`.
"""
