"""`--loader device`: training volumes kept in device memory, images in fp16; crops and augmentation are computed there.

The host only draws numbers: a step needs no worker, no copy and no synchronisation. On a CPU, device memory is host
memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from common.errors import UserError
from common.memory import free_memory_bytes
from common.progress import track
from data_loading.base_loader import Batch, LoaderConfig, describe_sample
from data_loading.dataset import map_case
from data_loading.preprocessing import Boxes, Shape, as_shape, edge_padding, pad_with_edges
from data_loading.pytorch_loader import draw_sample
from data_loading.transforms import MLPerfAugmentation, Transform

# Share of free memory for training volumes; the rest is for weights, activations and evaluation volumes.
MEMORY_SHARE = 0.5
# Reading is limited by the disk: more threads gain nothing.
READ_THREADS = 8
HALF_MAX = 65504.0  # the largest float16


class DeviceLoader:
    """Samples the same crops, flips and factors as `PytorchLoader`, from images in fp16 and labels in uint8.

    fp16 represents a normalised intensity (-2.3 to 2.6 for KiTS19) to 1e-3; `--amp` rounds the network's input no
    less. Every rank holds all training volumes (KiTS19: 14.5 GB), since each epoch shards them anew. Noise comes from
    the device's own generator: on a GPU its values differ from those of `PytorchLoader`, its distribution does not.

    Args:
        cases: case ids.
        volumes: (image, label) of each case: (C, D, H, W) fp16 and (1, D, H, W) uint8 on the device, at least as large
            as the patch along each axis.
        boxes: foreground boxes of each case.
        config: shared configuration; `num_workers` is not used.
    """

    def __init__(
        self,
        cases: Sequence[str],
        volumes: Sequence[tuple[Tensor, Tensor]],
        boxes: Sequence[Boxes],
        config: LoaderConfig,
    ) -> None:
        self._cases = cases
        self._volumes = volumes
        self._boxes = boxes
        self._config = config
        self._sampler = config.sampler(len(volumes))
        self._generator = torch.Generator(config.device)

    def __len__(self) -> int:
        return len(self._sampler)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        patch, device = self._config.patch, self._config.device
        channels = self._volumes[0][0].shape[0]
        for keys in self._sampler.batches(epoch)[start:]:
            image = torch.empty(len(keys), channels, *patch, device=device)
            label = torch.empty(len(keys), 1, *patch, dtype=torch.uint8, device=device)
            for n, key in enumerate(keys):
                self._fill(image[n], label[n], key)
            yield {"image": image[:, :, self._config.planes], "label": label[:, :, self._config.planes]}

    def describe(self, epoch: int, batch: int) -> list[str]:
        keys = self._sampler.batches(epoch)[batch]
        return [describe_sample(self._cases[key[1]], *self._draw(key)) for key in keys]

    def _draw(self, key: tuple[int, int]) -> tuple[Shape, Transform]:
        shape = as_shape(self._volumes[key[1]][0].shape[1:])
        return draw_sample(key, shape, self._boxes[key[1]], self._config)

    def _fill(self, image: Tensor, label: Tensor, key: tuple[int, int]) -> None:
        """Writes the sample with this key into image (C, D, H, W) and label (1, D, H, W)."""
        volume, mask = self._volumes[key[1]]
        start, transform = self._draw(key)
        d, h, w = (slice(first, first + length) for first, length in zip(start, self._config.patch, strict=True))
        if not isinstance(transform, MLPerfAugmentation):  # applied on the host; `data_loader` allows it only on a CPU
            crop, cropped_mask = (array[:, d, h, w].cpu().numpy() for array in (volume, mask))
            crop, cropped_mask = transform.apply(crop.astype("float32"), cropped_mask.copy())
            image.copy_(torch.from_numpy(crop))
            label.copy_(torch.from_numpy(cropped_mask))
            return
        axes = [axis for axis, flip in enumerate(transform.flips, start=1) if flip]
        image.copy_(volume[:, d, h, w].flip(axes))
        label.copy_(mask[:, d, h, w].flip(axes))
        if transform.factor != 1.0:
            image *= transform.factor
        if transform.noise_std > 0.0:
            self._generator.manual_seed(transform.noise_seed)
            noise = torch.empty_like(image).normal_(generator=self._generator)
            image.add_(noise, alpha=transform.noise_std)


def bytes_needed(shapes: Sequence[Sequence[int]]) -> int:
    """Returns the bytes of images (C, D, H, W) in fp16 and their labels in uint8."""
    return sum((2 * c + 1) * d * h * w for c, d, h, w in shapes)


def memory_budget(device: torch.device, share: float = MEMORY_SHARE) -> int:
    """Returns the bytes that volumes may use: a share of the device's free memory."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory_bytes()
    return int(share * free)


def load_volumes(data_dir: Path, cases: Sequence[str], config: LoaderConfig) -> list[tuple[Tensor, Tensor]]:
    """Loads every case onto the device, padded with its edge values to at least the patch."""

    def load(case: str) -> tuple[Tensor, Tensor]:
        image, label = map_case(data_dir, case)
        padding = edge_padding(as_shape(image.shape[1:]), config.patch)
        if (largest := max(float(image.max()), -float(image.min()))) > HALF_MAX:
            raise UserError(
                f"{case}: values up to {largest:g} do not fit into the 16 bits of --loader device; use --loader "
                "pytorch, or preprocess with --intensity zscore"
            )
        return (
            torch.from_numpy(pad_with_edges(image, padding).astype("float16")).to(config.device),
            torch.from_numpy(pad_with_edges(label, padding).copy()).to(config.device),
        )

    with ThreadPoolExecutor(READ_THREADS) as threads:
        return list(track(threads.map(load, cases), len(cases), "volumes", "case"))
