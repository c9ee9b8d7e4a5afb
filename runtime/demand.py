"""What a run will need of each machine, for the pre-flight checks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_loading.preprocessing import Shape
from runtime.evaluation import SlidingWindowConfig
from runtime.memory import BatchMemory

# Each worker of torch's DataLoader prepares two batches ahead; the training loop holds one more (measured with df).
BATCHES_AHEAD = 2


@dataclass(frozen=True, kw_only=True)
class NetworkMemory:
    """What the network needs on each rank's device.

    Attributes:
        step: of a training step, see `memory.step_memory`; nothing on a rank that only evaluates.
        windows: of a batch of evaluation windows, see `memory.window_memory`.
        state_bytes: what the first step adds for good, see `memory.state_bytes`.
    """

    step: BatchMemory
    windows: BatchMemory
    state_bytes: int


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What a run will need of each machine.

    Attributes:
        data_dir: the preprocessed folder; None: samples are synthetic.
        training, evaluation: ids of the cases that will be read; no training cases on a rank that only evaluates.
        loader: the value of `--loader`.
        workers: loader processes per rank.
        batch_size: samples per rank per micro-batch.
        patch: shape (D, H, W) of a sample.
        channels: channels of an image.
        scoring: how evaluation cases are scored.
        network: what a step and a batch of windows take.
        batches: micro-batches per epoch.
        prewarms: whether steps on dummy data come before the data is loaded.
        checkpoint_dir: the folder of the checkpoints, which may not exist yet; None: none are saved.
        checkpoints: number of checkpoints that are kept.
        checkpoint_bytes: the size of one, see `checkpoint_bytes`.
    """

    data_dir: Path | None
    training: Sequence[str]
    evaluation: Sequence[str]
    loader: str
    workers: int
    batch_size: int
    patch: Shape
    channels: int
    scoring: SlidingWindowConfig
    network: NetworkMemory
    batches: int
    prewarms: bool
    checkpoint_dir: Path | None
    checkpoints: int
    checkpoint_bytes: int

    @property
    def sample_bytes(self) -> int:
        """Size of a sample: image in float32, label in uint8."""
        return (4 * self.channels + 1) * math.prod(self.patch)

    @property
    def batches_ahead(self) -> int:
        """Number of batches that the workers of `--loader pytorch` keep ready."""
        return min(BATCHES_AHEAD * self.workers, self.batches)
