"""The cases that a checkpoint was trained on: scores of these say nothing about new ones."""

from __future__ import annotations

from pathlib import Path

from common.errors import UserError
from data_loading.dataset import read_spec_and_split
from data_loading.integrity import split_digest
from data_loading.split import leave_out
from runtime.checkpoint.format import Checkpoint
from runtime.run_spec import evaluation_ids


def training_cases(checkpoint: Checkpoint, data_dir: Path) -> set[str]:
    """Returns the cases of a preprocessed folder that a checkpoint was trained on, as far as it can be known."""
    spec, whole = read_spec_and_split(data_dir, evaluation_ids())
    if checkpoint.fold is not None:
        is_same = checkpoint.spec is not None and checkpoint.spec["name"] == spec.name
        return set(checkpoint.fold.train) if is_same else set()
    try:
        split = leave_out(whole, checkpoint.config.get("exclude", ()))
    except UserError:  # cases that this folder does not have
        return set()
    return set(split["train"]) if checkpoint.data == split_digest(data_dir, split) else set()
