"""One master seed; every other one derives from it on rank 0 and is broadcast."""

from __future__ import annotations

import os
import random
import secrets
from dataclasses import dataclass

import numpy as np
import torch

from runtime.distributed.world import World
from runtime.flags import SEED_LIMIT


@dataclass(frozen=True)
class Seeds:
    """The seeds of a run.

    Attributes:
        master: what the log states and `--seed` takes.
        order: of every epoch's permutation, equal on all ranks.
        samples: of crops and augmentation, together with epoch and case; equal on all ranks.
        ranks: one a rank, of whatever else draws (dropout, say).
    """

    master: int
    order: int
    samples: int
    ranks: tuple[int, ...]


def draw_seeds(master: int, world: World) -> Seeds:
    """Derives all seeds on rank 0 and broadcasts them; -1 takes the master from the operating system's entropy."""
    seeds = None
    if world.is_main:
        if master < 0:
            master = secrets.randbelow(SEED_LIMIT)
        order, samples, *ranks = np.random.SeedSequence(master).generate_state(2 + world.size).tolist()
        seeds = Seeds(master, order, samples, tuple(ranks))
    received: Seeds = world.broadcast(seeds)
    return received


def seed_step(seed: int, epoch: int, batch: int) -> None:
    """Seeds what a network draws in one micro-batch (dropout, say): a function of the place, so no state to save.

    Args:
        seed: of this rank.
    """
    drawn = int(np.random.SeedSequence([seed, epoch, batch]).generate_state(1)[0])
    random.seed(drawn)
    np.random.seed(drawn)
    torch.manual_seed(drawn)


def seed_process(seed: int, deterministic: bool, autotune: bool) -> None:
    """Seeds this process's global generators, and sets cuDNN's two switches."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = autotune
    torch.backends.cudnn.deterministic = deterministic
    if deterministic:
        # cuBLAS is reproducible only with a workspace of fixed size.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
