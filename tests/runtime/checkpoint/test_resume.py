"""`--resume`: finds the newest intact state, on every rank; reports changed flags, and their consequences."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import UserError
from common.messages import notes_held, take_notes
from runtime.arguments import RunConfig
from runtime.checkpoint.format import Checkpoint, snapshot
from runtime.checkpoint.resume import (
    INCIDENTAL_FLAGS,
    ORDER_FLAGS,
    STRUCTURAL_FLAGS,
    changes,
    describe,
    find,
    is_done,
    newest_intact,
    skip_partial_epoch,
)
from runtime.checkpoint.writer import find_checkpoints, save, set_aside_damaged
from runtime.distributed.world import World
from runtime.eval_schedule import EvalSchedule
from runtime.train_state import PendingEvaluation, TrainState

MakeState = Callable[..., TrainState]
MakeConfig = Callable[..., RunConfig]

LOADED = Checkpoint(
    path=Path("c.pth"),
    seed=7,
    data="d1635",
    best={},
    last={},
    best_epoch=3,
    last_epoch=4,
    best_dice=0.5,
    step=12,
    evaluated=4,
    loss_sums=[0.0],
    optimizer={},
    scaler={},
)


def of(**changed: Any) -> Checkpoint:
    return dataclasses.replace(LOADED, **changed)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint.pth"


@pytest.fixture
def three(path: Path, make_state: MakeState) -> list[Path]:
    """Three checkpoints, the newest first, of epochs 3, 2 and 1."""
    state = make_state()
    for epoch in (1, 2, 3):
        state.epoch, state.step = epoch, 5 * epoch
        save(path, snapshot(state, [0.0], config={}, seed=1, data="", spec={}), keep=3)
    return [path, path.with_name("checkpoint_000010.pth"), path.with_name("checkpoint_000005.pth")]


# Finding the file


@pytest.mark.parametrize("damaged", [0, 1, 2])
def test_the_newest_intact_file_and_a_warning_for_each_damaged_one(
    damaged: int, path: Path, three: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for file in three[:damaged]:
        file.write_bytes(file.read_bytes()[:-9])
    found = newest_intact(path)
    assert found is not None
    assert (found.last_epoch, found.path) == (3 - damaged, three[damaged])
    warned = [line.split(": damaged")[0] for line in capsys.readouterr().err.splitlines()]
    assert warned == [f"warning: --resume {file}" for file in three[:damaged]]


def test_a_damaged_checkpoint_takes_no_intact_one_s_place(path: Path, three: list[Path], make_state: MakeState) -> None:
    for file in three[:2]:
        file.write_bytes(file.read_bytes()[:-9])
    content = three[0].read_bytes()
    found = newest_intact(path)
    assert found is not None
    set_aside_damaged(path, found.path)
    assert find_checkpoints(path) == [three[2]]
    assert path.with_name("checkpoint.pth.damaged").read_bytes() == content
    state = make_state()
    state.step = 20
    save(path, snapshot(state, [0.0], config={}, seed=1, data="", spec={}), keep=2)
    path.write_bytes(b"")
    again = newest_intact(path)
    assert again is not None
    assert again.path == three[2]


def test_older_files_are_not_read(path: Path, three: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    three[1].write_bytes(b"")
    assert newest_intact(path) is not None
    assert capsys.readouterr().err == ""


def test_the_newest_may_be_missing_altogether(path: Path, three: list[Path]) -> None:
    path.unlink()
    found = newest_intact(path)
    assert found is not None
    assert found.last_epoch == 2


def test_nothing_there_is_a_first_start(path: Path) -> None:
    assert newest_intact(path) is None
    assert newest_intact(path.parent / "no folder" / "c.pth") is None


def test_if_every_file_is_damaged_the_user_must_decide_to_start_over(path: Path, three: list[Path]) -> None:
    for file in three:
        file.write_bytes(b"PK")
    with pytest.raises(UserError, match=rf"none of the 3 checkpoint\(s\) of {path} is intact.*without --resume$"):
        newest_intact(path)


def test_a_runs_own_checkpoint_comes_before_the_one_to_start_from(path: Path, three: list[Path], world: World) -> None:
    start = three[2].rename(path.with_name("start.pth"))
    found = find(path, start, world)
    assert found is not None
    assert found.last_epoch == 3
    for file in three[:2]:
        file.unlink()
    found = find(path, start, world)
    assert found is not None
    assert (found.last_epoch, found.path) == (1, start)
    assert find(path, None, world) is None
    assert find(None, None, world) is None


def test_without_resume_a_runs_own_checkpoint_is_not_read(path: Path, three: list[Path], world: World) -> None:
    assert find(None, None, world) is None


def test_a_file_to_start_from_must_be_there(path: Path, world: World) -> None:
    with pytest.raises(UserError, match=r"^--load_ckpt_path .*: no such file$"):
        find(None, path, world)


@dataclasses.dataclass(frozen=True)
class Wire(World):
    """Ranks in one process: the others receive the value that rank 0 has put in the box."""

    box: list[Any] = dataclasses.field(default_factory=list)

    def broadcast(self, value: Any) -> Any:
        if self.is_main:
            self.box.append(value)
        else:
            assert value is None, "only rank 0 reads"
        return self.box[-1]


def test_rank_0_reads_for_all(path: Path, three: list[Path]) -> None:
    """The folder may be on its disk alone."""
    box: list[Any] = []
    first, second = (find(path, None, Wire(rank, 2, torch.device("cpu"), box=box)) for rank in (0, 1))
    assert first is second is box[0]


def test_if_rank_0_cannot_read_every_rank_raises(path: Path) -> None:
    box: list[Any] = []
    for rank in (0, 1):
        with pytest.raises(UserError, match="no such file"):
            find(None, path, Wire(rank, 2, torch.device("cpu"), box=box))


# Whether anything is left to do


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"best_dice": 0.908, "best_epoch": 3}, "reached a mean Dice of 0.9080 at epoch 3"),
        ({"last_epoch": 6, "evaluated": 6}, "has completed 6 epochs"),
        ({"last_epoch": 7, "evaluated": 6}, "has completed 7 epochs"),
        ({"last_epoch": 6, "evaluated": 4}, ""),  # the run ended during its last evaluation
        ({"last_epoch": 7, "pending": PendingEvaluation(6, {})}, ""),  # ... during one on evaluating ranks
        ({"last_epoch": 5, "evaluated": 4}, ""),
        ({"last_epoch": 5, "batch": 3}, ""),
        ({"best_dice": 0.9079}, ""),
        ({"best_dice": -1.0}, ""),
    ],
)
def test_a_run_is_done_at_its_target_or_its_last_epochs_evaluation(changed: dict[str, Any], said: str) -> None:
    assert is_done(of(**changed), EvalSchedule(6, 2, 2), 0.908) == said


def test_without_evaluations_nothing_is_pending() -> None:
    assert is_done(of(last_epoch=6, evaluated=0), EvalSchedule(6, None, 2), 0.908) == "has completed 6 epochs"


# Changed flags


def test_nothing_changed(make_config: MakeConfig) -> None:
    config = make_config(lr_decay_epochs=(3, 5)).to_json()
    assert changes(of(config=config), config, "d1635") == []


def test_changed_flags_are_listed_with_what_they_were(make_config: MakeConfig) -> None:
    stored = make_config().to_json()
    current = make_config(epochs=9, lr_decay_epochs=(3, 5), learning_rate=0.5, input_shape=(64, 64, 64)).to_json()
    assert changes(of(config=stored), current, "d1635") == [
        "--epochs 9, was 1",
        "--input_shape 64 64 64, was 128 128 128",
        "--learning_rate 0.5, was 1.0",
        "--lr_decay_epochs 3 5, was none",
    ]


OTHERS = {
    "model": "unet3d(filters=(4,8))",
    "normalization": "batchnorm",
    "activation": "leaky_relu",
    "optimizer": "adam",
    "freeze": ("input_block.*",),
    "exclude": ("case_00023",),
    "folds": 5,
    "fold": 1,
    "folds_of": "train",
}


@pytest.mark.parametrize("flag", STRUCTURAL_FLAGS)
def test_another_network_or_optimizer_is_another_run(flag: str, make_config: MakeConfig) -> None:
    stored, current = make_config().to_json(), make_config(**{flag: OTHERS[flag]}, epochs=9).to_json()
    with pytest.raises(UserError) as caught:
        changes(of(config=stored), current, "d1635")
    other, was = (" ".join(OTHERS[flag]), "none") if flag in ("freeze", "exclude") else (OTHERS[flag], stored[flag])
    assert str(caught.value) == (
        f"c.pth belongs to another run: --{flag} {other}, was {was}; give those flags as they were"
    )


def test_flags_without_influence_on_the_numbers_are_not_mentioned(make_config: MakeConfig) -> None:
    stored = make_config().to_json()
    assert set(INCIDENTAL_FLAGS) < set(stored), "each is a flag"
    assert not {*STRUCTURAL_FLAGS, *ORDER_FLAGS} & set(INCIDENTAL_FLAGS)
    current = stored | {name: f"another than {stored[name]}" for name in INCIDENTAL_FLAGS} | {"seed": -1}
    assert changes(of(config=stored), current, "d1635") == []


def test_every_other_flag_is_mentioned(make_config: MakeConfig) -> None:
    stored = make_config().to_json()
    expected = [name for name in stored if name not in {*INCIDENTAL_FLAGS, *STRUCTURAL_FLAGS}]
    current = stored | dict.fromkeys(expected, "x")
    note = changes(of(config=stored), current, "d1635")
    assert [text.split()[0].removeprefix("--") for text in note] == expected
    assert {"epochs", "batch_size", "learning_rate", "amp", "ga_steps", "loader"} <= set(expected)


@pytest.mark.parametrize(("given", "listed"), [(-1, []), (7, []), (8, ["--seed 8, was 7"])])
def test_another_seed_than_the_runs_is_mentioned(given: int, listed: list[str], make_config: MakeConfig) -> None:
    stored, current = make_config(seed=-1).to_json(), make_config(seed=given).to_json()
    assert changes(of(config=stored, seed=7), current, "d1635") == listed


def test_a_flag_added_since_the_save_is_no_change(make_config: MakeConfig) -> None:
    """As after an update."""
    stored = make_config().to_json()
    del stored["oversampling"]
    assert changes(of(config=stored | {"gone": 1}), make_config().to_json(), "d1635") == []


def test_another_data_set_or_split_is_refused() -> None:
    with pytest.raises(UserError, match=r"^c\.pth was trained on another data set or split than that of --data_dir$"):
        changes(of(), {}, "d1636")
    # A file of another program does not identify its data, and random volumes have no digest.
    assert changes(of(data=""), {}, "d1636") == []
    assert changes(of(), {}, "") == []


# The rest of an epoch


FLAGS = {"batch_size": 2, "ga_steps": 1, "loader": "pytorch", "epochs": 9}


def resumed(make_state: MakeState, loaded: Checkpoint, ranks: int = 1, seed: int = 7, **flags: Any) -> Any:
    """Returns (notes, epoch, batch, loss sum) of a state resumed from the checkpoint."""
    state = make_state()
    state.epoch, state.batch = loaded.last_epoch, loaded.batch
    state.loss_sum = torch.tensor(1.5) if loaded.batch else None
    with notes_held():
        skip_partial_epoch(state, loaded, FLAGS | flags, ranks=ranks, seed=seed)
        notes = take_notes()
    return notes, state.epoch, state.batch, None if state.loss_sum is None else state.loss_sum.item()


MIDWAY = of(config=FLAGS, batch=6, loss_sums=[1.5])


def test_an_unchanged_run_continues_in_the_middle_of_its_epoch(make_state: MakeState) -> None:
    assert resumed(make_state, MIDWAY) == ([], 4, 6, 1.5)
    assert resumed(make_state, MIDWAY, epochs=50) == ([], 4, 6, 1.5)
    assert resumed(make_state, of(config={}, batch=6), batch_size=9) == ([], 4, 6, 1.5), "a flag it does not state"


@pytest.mark.parametrize(
    ("changed", "because"),
    [
        ({"batch_size": 4}, "--batch_size has changed"),
        ({"ga_steps": 2}, "--ga_steps has changed"),
        ({"loader": "device"}, "--loader has changed"),
        ({"seed": 8}, "the seed has changed"),
        ({"batch_size": 4, "seed": 8}, "--batch_size and the seed have changed"),
    ],
)
def test_the_rest_of_an_epoch_with_another_order_is_skipped(
    changed: dict[str, Any], because: str, make_state: MakeState
) -> None:
    notes, *place = resumed(make_state, MIDWAY, **changed)
    assert notes == [f"the rest of epoch 5 from batch 6 on is skipped, since {because}"]
    assert place == [5, 0, None]


@pytest.mark.parametrize("changed", [{"batch_size": 4}, {"seed": 8}])
def test_between_epochs_nothing_is_skipped(changed: dict[str, Any], make_state: MakeState) -> None:
    assert resumed(make_state, of(config=FLAGS), **changed) == ([], 4, 0, None)


def test_another_number_of_ranks_is_reported_and_skips_the_rest_of_the_epoch(make_state: MakeState) -> None:
    note = "resumed on 3 rank(s), was 2: the global batch is 6, was 4"
    notes, *place = resumed(make_state, dataclasses.replace(MIDWAY, loss_sums=[1.5, 1.5]), ranks=3)
    assert notes == [note, "the rest of epoch 5 from batch 6 on is skipped, since the number of ranks has changed"]
    assert place == [5, 0, None]
    between = of(config=FLAGS, loss_sums=[0.0, 0.0])
    assert resumed(make_state, between, ranks=3) == ([note], 4, 0, None)
    assert resumed(make_state, between, ranks=2) == ([], 4, 0, None)


def test_with_more_ranks_to_a_sample_the_global_batch_stays(make_state: MakeState) -> None:
    loaded = dataclasses.replace(MIDWAY, loss_sums=[1.5, 1.5], config={**FLAGS, "ranks_per_sample": 1})
    notes, *_ = resumed(make_state, loaded, ranks=4, ranks_per_sample=2)
    assert notes[0] == "resumed on 4 rank(s), was 2"
    assert "since --ranks_per_sample and the number of ranks have changed" in notes[1]


@pytest.mark.parametrize(
    ("before", "ranks", "flags"), [(1, 2, {"batch_size": 1}), (2, 1, {"ga_steps": 2}), (2, 4, {"ranks_per_sample": 2})]
)
def test_other_ranks_with_batches_to_match_keep_the_global_batch(
    before: int, ranks: int, flags: dict[str, int], make_state: MakeState
) -> None:
    loaded = of(config=FLAGS, loss_sums=[0.0] * before)
    notes, *_ = resumed(make_state, loaded, ranks=ranks, **flags)
    assert notes == [f"resumed on {ranks} rank(s), was {before}"]


def test_a_foreign_checkpoint_has_no_number_of_ranks(make_state: MakeState) -> None:
    assert resumed(make_state, of(seed=None, loss_sums=[]), ranks=3) == ([], 4, 0, None)


@pytest.mark.parametrize(
    ("loaded", "changed", "line"),
    [
        (LOADED, [], "resumed from c.pth after epoch 4"),
        (MIDWAY, [], "resumed from c.pth after batch 6 of epoch 5"),
        (
            MIDWAY,
            ["--a 1, was 2", "--b 3, was 4"],
            "resumed from c.pth after batch 6 of epoch 5; changed: --a 1, was 2, --b 3, was 4",
        ),
    ],
)
def test_where_a_run_resumes_is_reported_in_a_line(loaded: Checkpoint, changed: list[str], line: str) -> None:
    assert describe(loaded, changed) == line
