"""What is refused before anything is built because flags do not fit the data set, and what reaches what is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from runtime.arguments import RunConfig
from runtime.build import make_checkpoint_writer, make_step_config, open_training_data
from runtime.checkpoint.writer import find_checkpoints
from runtime.distributed.sample_parallel import SampleGroups
from runtime.distributed.world import World
from runtime.run_spec import make_run_spec
from runtime.train_state import Stop, TrainState

SYNTHETIC = {"loader": "synthetic", "data_dir": Path("synthetic"), "input_shape": (8, 8, 8)}


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 2.0, 3.0), (0.0, 0.0)])
def test_each_foreground_class_needs_a_sampling_weight(
    weights: tuple[float, ...], make_config: Callable[..., RunConfig], world: World
) -> None:
    with pytest.raises(UserError, match=r"--class_sampling_weights .*: give one weight for each of kidney, tumour"):
        make_run_spec(make_config(**SYNTHETIC, class_sampling_weights=weights), world)


def test_the_weights_reach_the_crops(
    make_config: Callable[..., RunConfig], world: World, tmp_path: Path, write_preprocessed: Callable[..., Path]
) -> None:
    label = np.zeros((1, 16, 16, 16), np.uint8)
    label[0, 0, 0, 0], label[0, 15, 15, 15] = 1, 2
    data_dir = write_preprocessed(tmp_path, {name: (np.zeros((1, 16, 16, 16)), label) for name in "abcd"})
    flags = {"data_dir": data_dir, "input_shape": (4, 4, 4), "num_workers": 0, "batch_size": 2, "loader": "device"}
    config = make_config(**flags, oversampling=1.0, class_sampling_weights=(0.0, 1.0), steps_per_epoch=5)
    loader, _ = open_training_data(make_run_spec(config, world))
    assert [batch["label"].unique().tolist() for batch in loader.epoch(1)] == [[0, 2]] * 5


def test_clipping_reaches_the_step(make_config: Callable[..., RunConfig], world: World) -> None:
    assert make_step_config(make_run_spec(make_config(**SYNTHETIC, max_grad_norm=2.5), world)).max_grad_norm == 2.5


@pytest.mark.parametrize(("ranks_per_sample", "seeds"), [(1, [11, 12, 13, 14]), (2, [11, 11, 12, 12])])
def test_each_rank_draws_from_its_own_seed_and_a_groups_ranks_from_one(
    ranks_per_sample: int, seeds: list[int], make_config: Callable[..., RunConfig], world: World
) -> None:
    """The ranks that share a sample must mix the same samples."""
    run = make_run_spec(make_config(**SYNTHETIC), world)
    run = replace(run, seeds=replace(run.seeds, ranks=(11, 12, 13, 14)))
    groups = [SampleGroups.divide(rank, 4, ranks_per_sample) for rank in range(4)]
    assert [make_step_config(replace(run, groups=group)).seed for group in groups] == seeds


@pytest.mark.parametrize("keep", [1, 3])
def test_as_many_checkpoints_stay_as_asked_for(
    keep: int,
    make_config: Callable[..., RunConfig],
    make_state: Callable[..., TrainState],
    world: World,
    tmp_path: Path,
) -> None:
    path, state = tmp_path / "c.pth", make_state()
    writer = make_checkpoint_writer(make_run_spec(make_config(**SYNTHETIC, save_ckpt_path=path, ckpt_keep=keep), world))
    for step in range(1, 6):
        state.step = step
        writer.finish(state, Stop("aborted", "enough"))
    steps = ["c.pth", "c_000004.pth", "c_000003.pth"]
    assert [file.name for file in find_checkpoints(path)] == steps[:keep]
