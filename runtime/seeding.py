"""Random seeds: all derive from one master seed, on rank 0, and are broadcast."""

from __future__ import annotations

import os
import random
import secrets
from dataclasses import dataclass

import numpy as np
import torch

from runtime.distributed.world import World
from runtime.training_flags import SEED_LIMIT


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """The seeds of a run.

    Attributes:
        master: the seed in the log, and of `--seed`.
        order: for each epoch's permutation; equal on all ranks.
        samples: for crops and augmentation, combined with epoch and case; equal on all ranks.
        ranks: one per rank, for everything else that is random (such as dropout).
    """

    master: int
    order: int
    samples: int
    ranks: tuple[int, ...]


def draw_seeds(master: int, world: World, ranks: int | None = None) -> Seeds:
    """Derives all seeds on rank 0 and broadcasts them.

    Args:
        master: the master seed; -1: taken from the operating system's entropy.
        world: all ranks of the run.
        ranks: number of ranks that train; None: all.
    """
    seeds = None
    if world.is_main:
        if master < 0:
            master = secrets.randbelow(SEED_LIMIT)
        count = world.size if ranks is None else ranks
        order, samples, *of_ranks = np.random.SeedSequence(master).generate_state(2 + count).tolist()
        seeds = Seeds(master=master, order=order, samples=samples, ranks=tuple(of_ranks))
    received: Seeds = world.broadcast(seeds)
    return received


def seed_step(seed: int, epoch: int, batch: int) -> None:
    """Seeds the global generators for one micro-batch (for dropout, say).

    The seed is a function of epoch and batch, so that a resumed run needs no generator state.

    Args:
        seed: this rank's seed.
        epoch, batch: the micro-batch, by its epoch and its index in it.
    """
    step_seed = int(np.random.SeedSequence([seed, epoch, batch]).generate_state(1)[0])
    random.seed(step_seed)
    np.random.seed(step_seed)
    torch.manual_seed(step_seed)


def seed_process(seed: int, *, deterministic: bool, autotune: bool) -> None:
    """Seeds this process's global generators, and sets cuDNN's `deterministic` and `benchmark` switches."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = autotune
    torch.backends.cudnn.deterministic = deterministic
    if deterministic:
        # cuBLAS is reproducible only with a workspace of fixed size.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
