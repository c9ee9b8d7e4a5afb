"""Scans on disk and in memory: files to `Volume`s and back.

`volume.py` has Volume, Geometry and NIfTI; `orientation.py` reorients axes; `dicom.py` reads DICOM series and
`dicom_seg.py` reads and writes DICOM-SEG masks; `scan_discovery.py` finds the scans that prediction is run on, by
`file_kinds.py`, which knows files by their names or first bytes.
May import: `common`, numpy, nibabel; pydicom and highdicom only in `dicom.py` and `dicom_seg.py`.
To add a format: a module that returns a `Volume`, and its case in `Source` of `scan_discovery.py`.
"""
