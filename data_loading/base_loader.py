"""Interface and configuration of the training loaders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from data_loading.preprocessing import Shape
from data_loading.sampler import EpochSampler, PseudoLabelCap
from data_loading.transforms import RandomTransform, Transform, draw_augmentation

# {"image": (N, C, D, H, W) float32, "label": (N, 1, D, H, W) uint8}
Batch = dict[str, Tensor]

CPU = torch.device("cpu")


class TrainingLoader(Protocol):
    """Makes the training batches of one rank."""

    def __len__(self) -> int:
        """Returns the number of batches per epoch, equal on every rank."""
        ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yields the batches of `epoch` (from 1), beginning with batch `start` (from 0); earlier ones are skipped."""
        ...

    def describe(self, epoch: int, batch: int) -> list[str]:
        """Returns one phrase per sample of a batch, for reports: the case and the first voxel of its crop."""
        ...


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """Configuration that all training loaders share.

    Attributes:
        patch: shape (D, H, W) of a crop.
        oversampling: probability that a crop contains foreground.
        class_weights: with which its class is drawn, see `draw_crop`.
        batch_size: samples per rank per micro-batch.
        num_workers: worker processes of `--loader pytorch`.
        worker_timeout_s: limit for the wait for a batch from a worker.
        rank, ranks: this process's rank (from 0), and the number of ranks; of groups where ranks share each sample.
        slab, slabs: which part of every crop this rank gets (from 0), and the number of equal parts along D.
        order_seed: seed of the order of the cases.
        sample_seed: seed of crops and augmentations.
        device: device that runs the network.
        augment: draws the augmentation of a sample.
        fixed_batches, pseudo_labels: see `EpochSampler`.
    """

    patch: Shape
    oversampling: float
    batch_size: int
    num_workers: int
    worker_timeout_s: int = 40
    rank: int
    ranks: int
    slab: int = 0
    slabs: int = 1
    order_seed: int
    sample_seed: int
    device: torch.device = CPU
    augment: RandomTransform = draw_augmentation
    fixed_batches: int | None = None
    class_weights: tuple[float, ...] = ()
    pseudo_labels: PseudoLabelCap = PseudoLabelCap()  # noqa: RUF009

    @property
    def planes(self) -> slice:
        """This rank's planes of a crop."""
        planes = self.patch[0] // self.slabs
        return slice(self.slab * planes, (self.slab + 1) * planes)

    def sampler(self, cases: int) -> EpochSampler:
        """Returns this rank's sampler of `cases` training cases. Raises UserError if an epoch has no batch."""
        sampler = EpochSampler(
            cases=cases,
            batch_size=self.batch_size,
            rank=self.rank,
            ranks=self.ranks,
            seed=self.order_seed,
            fixed_batches=self.fixed_batches,
            pseudo_labels=self.pseudo_labels,
        )
        len(sampler)  # raises if there is no batch
        return sampler


def describe_sample(case: str, start: Shape, transform: Transform) -> str:
    """Describes a sample in one phrase: the case, the crop's first voxel (D, H, W) and its augmentation."""
    return f"{case} at {start}, {transform}"
