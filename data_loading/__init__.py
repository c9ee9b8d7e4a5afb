"""From files on disk to (image, label) batches.

`readers/` find the cases of a raw data set, `io/` reads scans; `preprocessing` and `writer` make the preprocessed
folder, which `dataset` and `index` open; `sampler`, `transforms` and the loaders turn it into batches; `phantom` makes
synthetic patients; `download_kits19`, a command of its own, fetches real ones; `mlperf_md5` is what is known of these.
May import: `common`, torch, numpy, scipy, nibabel; never `model`, `runtime` or `torch.distributed`.
To add a data set: a reader and its line in `READERS` of `readers/__init__.py`. To add a loader: a class with the
methods of `TrainingLoader` and its line in `LOADERS` of `data_loader.py`.
"""
