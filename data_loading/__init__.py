"""From files on disk to batches of images and labels.

`readers/` finds the cases of a raw data set, `io/` reads and writes volumes, `preprocessing.py` and `writer.py` make
the preprocessed folder (`dataset.py`, `index.py`), and the loaders (`data_loader.py`) make batches of it with
`transforms.py` and `sampler.py`. `phantom.py` writes synthetic patients.
May import: torch, numpy, scipy, nibabel and `common`; never `model`, `runtime` or torch.distributed.
To add a data set: see `readers/__init__.py`.
To add a loader: a class that follows `base_loader.TrainingLoader`, and its line in `LOADERS` of `data_loader.py`.
"""
