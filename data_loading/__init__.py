"""From files on disk to (image, label) batches.

What lives here: scans and their geometry, preprocessing and its way back, the preprocessed folder,
sampling, cropping, augmentation, the loaders, and phantom patients.
May import: torch, numpy, scipy, nibabel, `errors`; never `model/`, `runtime/` or `torch.distributed`.
To add a data set: a reader that returns a `RawDataset`, with the flags that it takes as keywords, in a file of its own
in `extras/`, and its line in `RAW_LAYOUTS` of `raw_layouts.py`.
To add a loader: a function in `loader.py` that yields samples' batches and its line in `LOADERS`.
"""
