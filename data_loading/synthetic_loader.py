"""`--loader synthetic`: random volumes made once, in device memory: training without disk and augmentation."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from data_loading.base_loader import Batch, LoaderConfig

# As in the reference: 32 random volumes, of which an epoch takes 64 samples.
VOLUMES = 32
SAMPLES_PER_EPOCH = 64


class SyntheticLoader:
    """Serves uniform random images with random labels, the same on every rank.

    Args:
        samples: samples per epoch over all ranks.
        channels: C of the images.
        classes: K; label values are 0 to K - 1.
    """

    def __init__(self, samples: int, channels: int, classes: int, config: LoaderConfig) -> None:
        generator = torch.Generator().manual_seed(config.sample_seed)
        images = torch.rand(VOLUMES, channels, *config.patch, generator=generator)
        labels = torch.randint(classes, (VOLUMES, 1, *config.patch), generator=generator, dtype=torch.uint8)
        # On the device: a copy from memory that is not pinned would make the host wait in every step.
        self._images = images[:, :, config.planes].to(config.device)
        self._labels = labels[:, :, config.planes].to(config.device)
        self._batch_size = config.batch_size
        self._batches = len(config.sampler(samples))

    def __len__(self) -> int:
        return self._batches

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for batch in range(start, self._batches):
            indices = self._indices(batch)
            # One by one, since a list as index would be copied to the device.
            image, label = (torch.stack([own[i] for i in indices]) for own in (self._images, self._labels))
            yield {"image": image, "label": label}

    def describe(self, epoch: int, batch: int) -> list[str]:
        return [f"synthetic volume {index}" for index in self._indices(batch)]

    def _indices(self, batch: int) -> list[int]:
        first = batch * self._batch_size
        return [(first + sample) % VOLUMES for sample in range(self._batch_size)]


def synthetic_cases() -> list[str]:
    """Returns a name for each sample of an epoch."""
    return [f"synthetic_{index}" for index in range(SAMPLES_PER_EPOCH)]
