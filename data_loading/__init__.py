"""From files on disk to (image, label) batches.

What lives here: scans and their geometry, preprocessing and its way back, the preprocessed folder,
sampling, cropping, augmentation, the loaders, and phantom patients.
May import: torch, numpy, scipy, nibabel, `errors`; never `model/`, `runtime/` or `torch.distributed`.
To add a raw layout: a reader in `raw_layouts.py` that yields `RawCase`s and its line in `RAW_LAYOUTS`.
To add a loader: a function in `loader.py` that yields samples' batches and its line in `LOADERS`.
"""
