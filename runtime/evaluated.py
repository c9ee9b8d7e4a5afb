"""What `--exec_mode evaluate` scores: one checkpoint's network, or several whose probabilities are averaged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import UserError
from common.messages import counted, is_main_rank, note
from data_loading.spec import DatasetSpec
from runtime.arguments import RunConfig, with_checkpoint_network
from runtime.checkpoint import format as checkpoints
from runtime.checkpoint.format import Checkpoint
from runtime.run_spec import read_dataset
from runtime.test_time_flips import untrained_flips
from runtime.trained_cases import MAY_HAVE_SEEN, training_cases

# Flags that change what a network predicts of a case, so that only equal ones can be averaged slab by slab.
SHARED_FLAGS = ("val_input_shape", "overlap", "test_time_flips", "amp", "amp_dtype")


@dataclass(frozen=True, kw_only=True)
class EvaluatedNetwork:
    """A checkpoint and the flags with which its network is evaluated.

    Attributes:
        config: with the checkpoint's flags where the command line gives none.
        dataset: the constants of `--data_dir`.
        cases: ids of the cases to score.
    """

    checkpoint: Checkpoint
    config: RunConfig
    dataset: DatasetSpec
    cases: list[str]

    def flips_note(self) -> str:
        """Returns a note on `--test_time_flips` that its training did without, or ""."""
        return untrained_flips(self.config.test_time_flips, self.checkpoint.augment, str(self.checkpoint.path))


def read_members(config: RunConfig, given: frozenset[str]) -> list[EvaluatedNetwork]:
    """Reads the checkpoints of `--load_ckpt_path`.

    Args:
        given: names of the flags that are on the command line.

    Raises:
        UserError: one is damaged, there are no cases to score, or they cannot be evaluated together.
    """
    members: list[EvaluatedNetwork] = []
    for path in config.load_ckpt_path:
        members.append(_read(config, given, path, members))
        _check_compatible(members[0], members[-1])
        _check_untrained(members[-1])
        _note_other_preprocessing(members[-1])
    return members


def _read(config: RunConfig, given: frozenset[str], path: Path, others: Sequence[EvaluatedNetwork]) -> EvaluatedNetwork:
    loaded = checkpoints.load(path)
    config = replace(with_checkpoint_network(config, given, loaded.config), load_ckpt_path=(path,))
    for other in others:
        if other.checkpoint.fold == loaded.fold:
            return replace(other, checkpoint=loaded, config=config)
    dataset, split, _ = read_dataset(config, loaded.fold)
    if not (cases := split.get(config.eval_split)):
        found = ", ".join(f"{len(ids)} of {subset}" for subset, ids in split.items() if ids)
        raise UserError(
            f"--data_dir {config.data_dir}: its split has no {config.eval_split} cases, but {found or 'none'}"
        )
    return EvaluatedNetwork(checkpoint=loaded, config=config, dataset=dataset, cases=cases)


def _check_untrained(member: EvaluatedNetwork) -> None:
    """Raises UserError if a network was trained on cases to be scored, unless training cases are asked for."""
    config, path = member.config, member.checkpoint.path
    if config.eval_split == "train":
        return
    trained = training_cases(member.checkpoint, config.data_dir)
    if trained is None and is_main_rank():
        note(f"{path} {MAY_HAVE_SEEN}")
    if seen := sorted((trained or set()).intersection(member.cases)):
        raise UserError(
            f"--load_ckpt_path {path} was trained on {len(seen)} of {counted(len(member.cases), 'case')} to be scored, "
            f"such as {seen[0]}; leave out --fold and --folds, or give --eval_split train to score training cases"
        )


def _note_other_preprocessing(member: EvaluatedNetwork) -> None:
    """Notes constants of the data set that differ from those that the network was trained with."""
    # Through JSON, for which tuples and lists are the same.
    now, then = (json.loads(json.dumps(spec)) for spec in (member.dataset.to_json(), member.checkpoint.spec or {}))
    other = [name for name in now if name != "name" and name in then and now[name] != then[name]]
    if other and is_main_rank():
        listed = "; ".join(f"{name} {then[name]} in training, {now[name]} here" for name in other)
        note(f"{member.checkpoint.path} was trained on data of another kind: {listed}")


def _check_compatible(first: EvaluatedNetwork, other: EvaluatedNetwork) -> None:
    """Raises UserError if two networks cannot be evaluated as one."""
    one, path = first.checkpoint.path, other.checkpoint.path
    if other.cases != first.cases:
        raise UserError(
            f"--load_ckpt_path {path}: its fold evaluates other cases than that of {one}, on which it was trained; "
            "evaluate checkpoints of one fold together, or cases that no fold trained on (--eval_split test)"
        )
    for name in SHARED_FLAGS:
        ours, theirs = getattr(other.config, name), getattr(first.config, name)
        if ours != theirs:
            raise UserError(
                f"--load_ckpt_path {path}: its --{name} is {_text(ours)}, that of {one} {_text(theirs)}; give --{name} "
                "to evaluate both with the same value"
            )


def _text(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value) or "none"
