"""The cases that a checkpoint was trained on: scores of these say nothing about new ones."""

from __future__ import annotations

from pathlib import Path

from common.errors import UserError
from data_loading.dataset import find_index, read_spec_and_split
from data_loading.integrity import split_digest
from data_loading.split import leave_out
from runtime.checkpoint.format import Checkpoint
from runtime.run_spec import evaluation_ids, split_of_fold

MAY_HAVE_SEEN = (
    "was trained on another split of this data set, or on other volumes: it may have seen the cases to score"
)


def training_cases(checkpoint: Checkpoint, data_dir: Path) -> set[str] | None:
    """Returns the cases of a preprocessed folder that a checkpoint was trained on; none of another data set.

    Returns:
        None if it is of this data set, but not of this split and these volumes.
    """
    spec, _ = read_spec_and_split(data_dir, evaluation_ids())
    if checkpoint.spec is not None and checkpoint.spec["name"] != spec.name:
        return set()
    if checkpoint.fold is not None:
        return set(checkpoint.fold.train)
    if (split := training_split(checkpoint, data_dir)) is not None:
        return set(split["train"])
    return None if checkpoint.data else set()


def training_split(checkpoint: Checkpoint, data_dir: Path) -> dict[str, list[str]] | None:
    """Returns the split of a preprocessed folder with which a checkpoint was trained, its fold's if it has one.

    A network may be older than the folder's pseudo-labelled cases, as the one that labelled them is; then the split is
    without them.

    Returns:
        None if it was trained with another split or on other volumes, or does not say.
    """
    exclude = checkpoint.config.get("exclude", ())
    try:
        if checkpoint.fold is None:
            split = leave_out(read_spec_and_split(data_dir, evaluation_ids())[1], exclude)
        else:
            split = split_of_fold(data_dir, checkpoint.fold, exclude)
    except UserError:  # cases that this folder does not have
        return None
    index = find_index(data_dir)
    pseudo_labelled = {*index.pseudo_labels.cases} if index and index.pseudo_labels else set()
    earlier = {**split, "train": [case for case in split["train"] if case not in pseudo_labelled]}
    return next((each for each in (split, earlier) if checkpoint.data == split_digest(data_dir, each)), None)
