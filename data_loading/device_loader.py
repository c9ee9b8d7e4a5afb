"""`--loader device`: the training volumes lie in device memory in 16 bit; crops and augmentation are made there.

The host only draws numbers: no worker, no copy and no wait in a step. On a CPU the "device" is its memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data_loading.dataset import map_case
from data_loading.io.volume import free_memory_bytes
from data_loading.preprocessing import Boxes, Shape, as_shape, edge_padding, pad_with_edges
from data_loading.pytorch_loader import Batch, LoaderSettings, describe_sample, draw_sample
from data_loading.transforms import Augmentation, Transform

# The rest is for weights, activations and the evaluation's volumes.
MEMORY_SHARE = 0.5
# Reading is a disk's work: more threads than that gain nothing.
READERS = 8


class DeviceLoader:
    """Samples the same crops, flips and factors as the `pytorch` loader, from volumes in fp16 and labels in uint8.

    fp16 keeps a normalised intensity (-2.3 to 2.6 for KiTS19) to 1e-3, and `--amp` rounds the network's input no less.
    Every rank holds all training volumes (KiTS19: 14.5 GB), since an epoch deals them out anew. The noise comes from
    the device's own generator: on a GPU other numbers than the `pytorch` loader's, of the same distribution.

    Args:
        cases: their ids.
        volumes: (image, label) of each case: (C, D, H, W) fp16 and (1, D, H, W) uint8 on the device, at least as large
            as the patch in each axis.
        boxes: of `foreground_boxes`, a case each.
        settings: `num_workers` and `pin_memory` mean nothing here.
    """

    def __init__(
        self,
        cases: Sequence[str],
        volumes: Sequence[tuple[Tensor, Tensor]],
        boxes: Sequence[Boxes],
        settings: LoaderSettings,
    ) -> None:
        self._cases = cases
        self._volumes = volumes
        self._boxes = boxes
        self._settings = settings
        self._order = settings.order(len(volumes))
        self._generator = torch.Generator(settings.device)

    def __len__(self) -> int:
        return len(self._order)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` from batch `start` on, on the device."""
        settings = self._settings
        channels = self._volumes[0][0].shape[0]
        for keys in self._order.batches(epoch)[start:]:
            image = torch.empty(len(keys), channels, *settings.patch, device=settings.device)
            label = torch.empty(len(keys), 1, *settings.patch, dtype=torch.uint8, device=settings.device)
            for place, key in enumerate(keys):
                self._fill(image[place], label[place], *key)
            yield {"image": image, "label": label}

    def describe(self, epoch: int, batch: int) -> list[str]:
        return [
            describe_sample(self._cases[index], *self._draw(permutation, index))
            for permutation, index in self._order.batches(epoch)[batch]
        ]

    def _draw(self, permutation: int, index: int) -> tuple[Shape, Transform]:
        shape = as_shape(self._volumes[index][0].shape[1:])
        return draw_sample(permutation, index, shape, self._boxes[index], self._settings)

    def _fill(self, image: Tensor, label: Tensor, permutation: int, index: int) -> None:
        volume, mask = self._volumes[index]
        start, drawn = self._draw(permutation, index)
        d, h, w = (slice(first, first + length) for first, length in zip(start, self._settings.patch, strict=True))
        if not isinstance(drawn, Augmentation):  # made by the host, which a CPU is (see `loaders`)
            crop, cut = (array[:, d, h, w].cpu().numpy() for array in (volume, mask))
            crop, cut = drawn.apply(crop.astype("float32"), cut.copy())
            image.copy_(torch.from_numpy(crop))
            label.copy_(torch.from_numpy(cut))
            return
        axes = [axis for axis, flip in enumerate(drawn.flips, start=1) if flip]
        image.copy_(volume[:, d, h, w].flip(axes))
        label.copy_(mask[:, d, h, w].flip(axes))
        if drawn.factor != 1.0:
            image *= drawn.factor
        if drawn.noise_deviation > 0.0:
            self._generator.manual_seed(drawn.noise_seed)
            noise = torch.empty_like(image).normal_(generator=self._generator)
            image.add_(noise, alpha=drawn.noise_deviation)


def bytes_needed(shapes: Sequence[Sequence[int]]) -> int:
    """Of images (C, D, H, W) in 16 bit and their labels in 8."""
    return sum((2 * c + 1) * d * h * w for c, d, h, w in shapes)


def memory_budget(device: torch.device, share: float = MEMORY_SHARE) -> int:
    """Bytes that volumes may take: a share of the device's free memory."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory_bytes()
    return int(share * free)


def load_volumes(data_dir: Path, cases: Sequence[str], settings: LoaderSettings) -> list[tuple[Tensor, Tensor]]:
    """Every case on the device, padded with its edges to at least the patch."""

    def load(case: str) -> tuple[Tensor, Tensor]:
        image, label = map_case(data_dir, case)
        padding = edge_padding(as_shape(image.shape[1:]), settings.patch)
        return (
            torch.from_numpy(pad_with_edges(image, padding).astype("float16")).to(settings.device),
            torch.from_numpy(pad_with_edges(label, padding).copy()).to(settings.device),
        )

    with ThreadPoolExecutor(READERS) as readers:
        return list(tqdm(readers.map(load, cases), "volumes", len(cases), unit="case", disable=None))
