"""Preprocesses KiTS19 in the reference's way, written plainly from its description: one process, one case at a time.

    python3 -m benchmarks.naive_preprocessing RAW RESULTS

The baseline of `--suite preprocess`, which compares its files and its time with those of `preprocess_dataset.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F


def preprocess_plainly(case: Path, results: Path) -> None:
    """Writes one case's image and label, and prints a line."""
    files: list[Any] = [nib.load(case / f"{name}.nii.gz") for name in ("imaging", "segmentation")]
    scan, mask = files
    image = torch.from_numpy(np.asarray(scan.dataobj, np.float32))[None, None]
    label = torch.from_numpy(np.asarray(mask.dataobj, np.uint8))[None, None]
    spacing, target = scan.header["pixdim"][1:4].astype(np.float64), np.array([1.6, 1.2, 1.2])
    if (spacing != target).any():
        size = tuple((spacing / target * image.shape[2:]).astype(int).tolist())
        image = F.interpolate(image, size=size, mode="trilinear", align_corners=True)
        label = F.interpolate(label, size=size, mode="nearest")
    normal = (np.clip(image[0].numpy(), np.float32(-79), np.float32(304)) - np.float32(101)) / np.float32(76.9)
    missing = [max(0, 128 - size) for size in normal.shape[1:]]
    padding = [(0, 0), *((n // 2, n - n // 2) for n in missing)]
    normal, classes = (np.pad(array, padding, mode="edge") for array in (normal, label[0].numpy()))
    print(f"{case.name}: shape {normal.shape}, mean {normal.mean():.2f}, std {normal.std():.2f}")
    for kind, array in (("x", normal), ("y", classes)):
        np.save(results / f"{case.name}_{kind}.npy", array, allow_pickle=False)


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    folder.mkdir()
    for each in sorted(Path(sys.argv[1]).iterdir()):
        preprocess_plainly(each, folder)
