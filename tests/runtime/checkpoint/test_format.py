"""Checkpoints: exact, atomic, foreign ones welcome, damaged and dangerous ones refused in one line."""

from __future__ import annotations

import dataclasses
import errno
import os
import pickle
import random
import re
import subprocess
import textwrap
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.errors import UserError
from model.losses import DiceCELoss
from model.unet3d import Unet3d
from runtime.callbacks.base import KeepBest
from runtime.checkpoint.format import (
    FORMAT,
    Checkpoint,
    generations,
    load,
    load_network,
    prepare,
    restore,
    save,
    set_aside,
    snapshot,
)
from runtime.distributed.step_sync import StepSync
from runtime.distributed.world import World
from runtime.logging.events import EpochStopped, EvaluationStopped, Event, StepEnd
from runtime.memory_format import to_device
from runtime.precision import Precision
from runtime.train_state import Stop, TrainState
from runtime.training import StepSettings, TrainingLoader, train_epoch
from tests.runtime.conftest import disk_of

MakeState = Callable[..., TrainState]
MakeBatches = Callable[..., TrainingLoader]
SameWeights = Callable[[nn.Module, nn.Module], bool]
Weights = dict[str, Tensor]

CONFIG: dict[str, Any] = {"model": "unet3d(filters=(3,4))", "val_input_shape": (4, 4, 8), "lr_decay_epochs": ()}
SPEC: dict[str, Any] = {"name": "own", "classes": ("background", "one"), "spacing_mm": (1.5, 1.0, 1.0), "mean": None}

CPU = torch.device("cpu")


def train_epochs(
    state: TrainState,
    loader: TrainingLoader,
    first: int,
    last: int,
    layout: str = "NCDHW",
    leave_after: int | None = None,
) -> list[float]:
    """The epochs' mean losses; `leave_after` ends the last one after that batch."""
    settings, world, events = StepSettings(DiceCELoss(), Precision(CPU, None), 1, layout), World(0, 1, CPU), []

    def emit(event: Event) -> None:
        events.append(event)
        if isinstance(event, StepEnd) and (event.epoch, event.batch) == (last, leave_after):
            state.stop = Stop("aborted", "interrupted")

    for epoch in range(first, last + 1):
        train_epoch(state, epoch, loader, 0.05, settings, world, StepSync(world), emit)
    return [event.loss for event in events if isinstance(event, EpochStopped)]


def keep_state(
    path: Path, state: TrainState, seed: int = 1, keep: int = 1, loss_sums: list[float] | None = None
) -> None:
    save(path, snapshot(state, loss_sums or [0.0], CONFIG, seed, "d1635", SPEC), keep)


def same(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def clone(state: TrainState) -> Weights:
    return {name: tensor.clone() for name, tensor in state.network.state_dict().items()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint.pth"


@pytest.fixture
def weights(make_state: MakeState) -> Weights:
    return clone(make_state())


# Our own


def test_last_and_best_come_back_each_with_its_epoch(
    path: Path, make_state: MakeState, make_batches: MakeBatches
) -> None:
    state, loader = make_state(), make_batches(2, 1)
    train_epochs(state, loader, 1, 2)
    KeepBest().on(EvaluationStopped(2, 0.75, [0.75], 0.1, 1.0), state)
    best = clone(state)
    train_epochs(state, loader, 3, 3)
    keep_state(path, state, seed=42)
    loaded = load(path)
    assert same(loaded.best, best)
    assert same(loaded.last, clone(state))
    assert not same(loaded.best, loaded.last)
    assert (loaded.best_epoch, loaded.last_epoch, loaded.best_dice) == (2, 3, 0.75)
    assert (loaded.config, loaded.seed, loaded.path) == (CONFIG, 42, path)


def leaves(content: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every value within, by the names that lead to it."""
    if isinstance(content, dict | list | tuple):
        items = content.items() if isinstance(content, dict) else enumerate(content)
        for key, inner in items:
            yield from leaves(inner, f"{name}.{key}")
    else:
        yield name, content


def equal(a: Any, b: Any) -> bool:
    """The same values bit for bit, tensors in the same memory order."""
    ours, theirs = list(leaves(a)), list(leaves(b))
    return [name for name, _ in ours] == [name for name, _ in theirs] and all(
        torch.equal(x, y) and x.stride() == y.stride() and x.dtype == y.dtype
        if isinstance(x, Tensor)
        else x == y and type(x) is type(y)
        for (_, x), (_, y) in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("layout", ["NCDHW", "NDHWC"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "lamb"])
def test_every_field_comes_back_bit_for_bit(
    optimizer: str, layout: str, path: Path, make_state: MakeState, make_batches: MakeBatches
) -> None:
    state = make_state(optimizer)
    to_device(state.network, CPU, layout)
    train_epochs(state, make_batches(2, 1), 1, 1, layout)
    KeepBest().on(EvaluationStopped(1, 0.1 + 0.2, [0.3], 0.1, 1.0), state)
    assert state.best_network is not None
    best = {name: tensor.clone() for name, tensor in state.best_network.items()}
    train_epochs(state, make_batches(3, 1), 2, 3, layout, leave_after=1)
    state.evaluated = 1
    state.scaler = torch.amp.GradScaler("cpu", init_scale=512.0, enabled=True)
    assert state.loss_sum is not None
    sums = [state.loss_sum.item(), 1 / 3]
    keep_state(path, state, seed=2**31 - 1, loss_sums=sums)
    expected = Checkpoint(
        path,
        CONFIG,
        2**31 - 1,
        "d1635",
        SPEC,
        best,
        dict(state.network.state_dict()),
        1,
        2,
        0.1 + 0.2,
        2,
        1,
        sums,
        state.optimizer.state_dict(),
        state.scaler.state_dict(),
    )
    loaded = load(path)
    for field in dataclasses.fields(Checkpoint):
        assert equal(getattr(loaded, field.name), getattr(expected, field.name)), field.name
    moments = [tensor for _, tensor in leaves(loaded.optimizer) if isinstance(tensor, Tensor) and tensor.dim() == 5]
    assert len(moments) >= 5
    order = torch.contiguous_format if layout == "NCDHW" else torch.channels_last_3d
    assert all(moment.is_contiguous(memory_format=order) for moment in moments if moment[0, 0].numel() > 1)


def test_a_snapshot_does_not_change_with_what_it_is_of(make_state: MakeState, make_batches: MakeBatches) -> None:
    """It is written while training goes on."""
    state = make_state("adam")
    train_epochs(state, make_batches(2, 1), 1, 1)
    taken = snapshot(state, [0.0], CONFIG, 1, "", SPEC)
    copied = pickle.loads(pickle.dumps(taken))
    train_epochs(state, make_batches(2, 1), 2, 2)
    assert equal(taken["last"], copied["last"])
    assert not same(taken["last"]["network"], clone(state))


def test_without_an_evaluation_the_last_is_the_best(path: Path, make_state: MakeState) -> None:
    state = make_state()
    state.epoch = 5
    keep_state(path, state)
    loaded = load(path)
    assert same(loaded.best, loaded.last)
    assert (loaded.best_epoch, loaded.last_epoch, loaded.best_dice) == (5, 5, -1.0)
    fresh = make_state()
    restore(fresh, loaded)
    assert (fresh.best_epoch, fresh.best_dice, fresh.best_network) == (5, -1.0, None)


OPTIMIZERS: dict[str, dict[str, float]] = {"sgd": {"momentum": 0.9}, "adam": {}, "lamb": {"weight_decay": 0.01}}


@pytest.mark.parametrize("layout", ["NCDHW", "NDHWC"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resuming_equals_never_stopping_bit_for_bit(
    optimizer: str,
    layout: str,
    path: Path,
    make_state: MakeState,
    make_batches: MakeBatches,
    same_weights: SameWeights,
) -> None:
    def start() -> TrainState:
        state = make_state(optimizer, **OPTIMIZERS[optimizer])
        to_device(state.network, CPU, layout)
        return state

    straight, loader = start(), make_batches(3, 1)
    train_epochs(straight, loader, 1, 4, layout)
    first = start()
    train_epochs(first, loader, 1, 1, layout)
    KeepBest().on(EvaluationStopped(1, 0.5, [0.5], 0.1, 1.0), first)
    train_epochs(first, loader, 2, 2, layout)
    keep_state(path, first)
    second = start()
    restore(second, load(path))
    assert (second.epoch, second.best_epoch, second.best_dice) == (2, 1, 0.5)
    assert second.best_network is not None
    assert first.best_network is not None
    assert same(second.best_network, first.best_network)
    train_epochs(second, loader, 3, 4, layout)
    assert same_weights(second.network, straight.network)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_resuming_in_the_middle_of_an_epoch_too(
    batch: int, optimizer: str, path: Path, make_state: MakeState, make_batches: MakeBatches, same_weights: SameWeights
) -> None:
    """Weights and mean loss; 3 is the epoch's last batch."""
    straight, first, second = (make_state(optimizer, **OPTIMIZERS[optimizer]) for _ in range(3))
    losses = train_epochs(straight, make_batches(4, 1), 1, 3)
    begun = train_epochs(first, make_batches(4, 1), 1, 2, leave_after=batch)
    assert first.loss_sum is not None
    first.evaluated = 1
    keep_state(path, first, loss_sums=[first.loss_sum.item()])
    restore(second, load(path))
    assert (second.epoch, second.batch, second.evaluated) == (1, batch + 1, 1)
    assert begun + train_epochs(second, make_batches(4, 1), 2, 3) == losses
    assert same_weights(second.network, straight.network)


def test_every_rank_takes_its_own_sum_of_losses(path: Path, make_state: MakeState) -> None:
    state = make_state()
    state.batch = 2
    keep_state(path, state, loss_sums=[0.5, 0.1])
    found = []
    for rank in range(3):
        fresh = make_state()
        restore(fresh, load(path), rank)
        found.append(None if fresh.loss_sum is None else fresh.loss_sum.item())
    assert found == [0.5, torch.tensor(0.1).item(), None], "a rank more than there were has none"
    state.batch = 0
    keep_state(path, state, loss_sums=[0.5, 0.1])
    restore(fresh, load(path))
    assert fresh.loss_sum is None, "between epochs there is nothing to add to"


def test_a_loss_scale_comes_back(path: Path, make_state: MakeState) -> None:
    state, fresh = make_state(), make_state()
    state.scaler = torch.amp.GradScaler("cpu", init_scale=512.0, enabled=True)
    state.scaler.scale(torch.ones(1))  # the scale becomes a tensor with its first use
    keep_state(path, state)
    fresh.scaler = torch.amp.GradScaler("cpu", enabled=True)
    restore(fresh, load(path))
    assert fresh.scaler.get_scale() == 512.0
    assert fresh.scaler.state_dict() == state.scaler.state_dict()
    restore(make_state(), load(path))  # without a scaler: fp32 goes on from fp16


def test_momentum_and_decay_are_this_runs_own(path: Path, make_state: MakeState, make_batches: MakeBatches) -> None:
    """The log states the flags: a checkpoint's settings must not silently replace them."""
    state = make_state("sgd", momentum=0.9, weight_decay=0.0)
    train_epochs(state, make_batches(1, 1), 1, 1)
    keep_state(path, state)
    fresh = make_state("sgd", momentum=0.95, weight_decay=0.1)
    restore(fresh, load(path))
    (group,) = fresh.optimizer.param_groups
    assert (group["momentum"], group["weight_decay"]) == (0.95, 0.1)
    bias = fresh.network.output.conv.bias
    buffer = state.optimizer.state[state.network.output.conv.bias]["momentum_buffer"]
    assert torch.equal(fresh.optimizer.state[bias]["momentum_buffer"], buffer)


@pytest.mark.parametrize("trained", ["sgd", "adam", "lamb"])
@pytest.mark.parametrize("asked", ["sgd", "adam", "lamb"])
def test_another_optimizer_is_refused(
    trained: str, asked: str, path: Path, make_state: MakeState, make_batches: MakeBatches
) -> None:
    state, fresh, loader = make_state(trained), make_state(asked), make_batches(1, 1)
    train_epochs(state, loader, 1, 1)
    keep_state(path, state)
    if trained == asked:
        restore(fresh, load(path))
        train_epochs(fresh, loader, 2, 2)
        assert fresh.epoch == 2
    else:
        with pytest.raises(UserError, match="of another --optimizer"):
            restore(fresh, load(path))


# Atomic


def test_a_save_that_fails_midway_leaves_the_old_file_and_nothing_else(
    path: Path, make_state: MakeState, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = make_state()
    keep_state(path, state)
    before = path.read_bytes()

    def disk_full(content: Any, stream: Any) -> None:
        stream.write(b"half of it")
        stream.flush()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    state.epoch = 9
    with pytest.raises(OSError, match="No space left"):
        keep_state(path, state)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]
    assert load(path).last_epoch == 0


def test_the_file_is_complete_and_synced_before_it_takes_the_name(
    path: Path, make_state: MakeState, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        steps.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    def replaced(source: Path, target: Path) -> None:
        steps.append("replace")
        assert Path(source).parent == Path(target).parent, "a rename across file systems is a copy"
        assert load(Path(source)).seed == 7
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    keep_state(path, make_state(), seed=7)
    assert steps == ["file", "replace", "folder"]
    assert os.listdir(path.parent) == [path.name]
    steps.clear()
    keep_state(path, make_state(), seed=7, keep=2)
    assert steps == ["file", "replace", "replace", "folder"], "nothing is moved before its successor is whole"


def epochs_in(folder: Path) -> dict[str, int]:
    """Of every file in the folder, the epoch that it holds; each must be whole."""
    return {file.name: load(file).last_epoch for file in folder.iterdir()}


@pytest.fixture(params=[True, False], ids=["links", "no links"])
def links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the file system has hard links."""
    if not request.param:

        def refuse(self: Path, target: Path) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(Path, "hardlink_to", refuse)
    return request.param


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_older_generations_move_on_and_the_oldest_goes(
    keep: int, links: bool, path: Path, make_state: MakeState
) -> None:
    state = make_state()
    names = [path.name, f"{path.name}.1", f"{path.name}.2"][:keep]
    for epoch in range(1, 6):
        state.epoch = epoch
        keep_state(path, state, seed=epoch, keep=keep)
        newest_first = range(epoch, max(0, epoch - keep), -1)
        assert epochs_in(path.parent) == dict(zip(names, newest_first, strict=False))
        assert [file.name for file in generations(path)] == names[:epoch]
    assert (load(path).last_epoch, load(path).seed) == (5, 5)


def test_fewer_are_kept_from_the_next_save_on(path: Path, make_state: MakeState) -> None:
    state = make_state()
    for epoch, keep in [(1, 4), (2, 4), (3, 4), (4, 4), (5, 2)]:
        state.epoch = epoch
        keep_state(path, state, keep=keep)
    assert epochs_in(path.parent) == {"checkpoint.pth": 5, "checkpoint.pth.1": 4}


@pytest.mark.parametrize("number", range(2, 12, 3))
def test_generations_come_newest_first_and_are_no_other_files(number: int, path: Path) -> None:
    assert generations(path) == []
    assert generations(path / "no folder" / "c.pth") == []
    for name in ("checkpoint.pth.10", f"checkpoint.pth.{number}", "checkpoint.pth.1"):
        path.with_name(name).touch()
    for other in ("checkpoint.1.pth", "checkpoint.pth.0", "checkpoint.pth.01", "checkpoint.pth.x", "checkpointxpth.1"):
        path.with_name(other).touch()
    assert [file.name for file in generations(path)] == [f"checkpoint.pth.{n}" for n in sorted({1, number, 10})]
    path.touch()
    assert generations(path)[0] == path


def test_a_file_that_has_two_names_already_leaves_no_third(path: Path, make_state: MakeState) -> None:
    """As after a kill between giving the second name and taking the first."""
    state = make_state()
    keep_state(path, state)
    path.with_name("checkpoint.pth.1").hardlink_to(path)
    state.epoch = 2
    keep_state(path, state, keep=2)
    assert epochs_in(path.parent) == {"checkpoint.pth": 2, "checkpoint.pth.1": 0}


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.97, 0.999])
def test_a_disk_that_is_full_is_an_os_error_and_every_older_file_is_untouched(
    share: float, path: Path, make_state: MakeState
) -> None:
    """torch's writer turns most of them into a RuntimeError about a position, where a tensor is no small one."""
    content = snapshot(make_state(), [0.0], CONFIG, 1, "", SPEC) | {"more": torch.rand(20_000)}
    for seed in (1, 2, 3):
        save(path, content | {"seed": seed}, keep=3)
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    with disk_of(int(share * path.stat().st_size)), pytest.raises(OSError, match="File too large"):
        save(path, content, keep=3)
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


KILLED = """
    import os, sys
    from pathlib import Path
    from runtime.checkpoint import format as checkpoint
    from runtime.checkpoint.format import save

    def content(epoch):
        best = {"epoch": 0, "mean_dice": -1.0, "network": None}
        parts = {"network": {}, "optimizer": {}, "scaler": {}}
        last = {"epoch": epoch, "batch": 0, "evaluated": 0, "loss_sums": [], **parts}
        return {"format": checkpoint.FORMAT, "config": {}, "seed": 1, "data": "", "last": last, "best": best}

    def killed_at(count):
        left = [count]
        def counted(name, original):
            def call(*arguments, **named):
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)
                return original(*arguments, **named)
            setattr(os, name, call)
        for name in ("link", "replace", "rename", "unlink", "fsync"):
            counted(name, getattr(os, name))

    def refuse(self, target):
        raise OSError("no links")

    if sys.argv[2] == "False":
        Path.hardlink_to = refuse
    count, status = 0, 9
    while os.waitstatus_to_exitcode(status):
        path = Path(sys.argv[1], str(count), "c.pth")
        path.parent.mkdir()
        for epoch in (1, 2):
            save(path, content(epoch), 2)
        if os.fork() == 0:
            killed_at(count)
            save(path, content(3), 2)
            os._exit(0)
        status = os.wait()[1]
        count += 1
    print(count)
"""


@pytest.mark.parametrize("has_links", [True, False])
def test_killed_at_any_moment_whole_files_are_left_and_an_older_one_of_them(
    has_links: bool, tmp_path: Path, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Before each call that changes the folder; what the next start cleans away is no checkpoint."""
    done = run_python("-c", textwrap.dedent(KILLED), tmp_path, has_links)
    assert done.returncode == 0, done.stderr
    folders = sorted(tmp_path.iterdir(), key=lambda folder: int(folder.name))
    assert len(folders) == int(done.stdout) >= 5
    newest = []
    for folder in folders:
        prepare(folder / "c.pth")
        found = epochs_in(folder)
        assert found.keys() <= {"c.pth", "c.pth.1"}
        assert 2 in found.values()
        newest.append(max(found.values()))
    assert newest == sorted(newest)
    assert (newest[0], newest[-1]) == (2, 3)


def test_an_earlier_run_s_newest_is_kept_under_a_free_name(path: Path, make_state: MakeState) -> None:
    set_aside(path)
    assert os.listdir(path.parent) == []
    state = make_state()
    for run in (10, 20, 30):
        for epoch in (1, 2, 3):
            state.epoch = run + epoch
            keep_state(path, state, keep=2)
        set_aside(path)
    assert epochs_in(path.parent) == {"checkpoint.1.pth": 13, "checkpoint.2.pth": 23, "checkpoint.3.pth": 33}
    assert generations(path) == [], "none is taken for the new run's"


def test_what_was_set_aside_is_no_generation_where_the_name_has_no_suffix(
    tmp_path: Path, make_state: MakeState
) -> None:
    path, state = tmp_path / "newest", make_state()
    for epoch in (1, 2):
        state.epoch = epoch
        keep_state(path, state, keep=2)
    set_aside(path)
    assert generations(path) == []
    for epoch in (11, 12, 13):
        state.epoch = epoch
        keep_state(path, state, keep=2)
    assert sorted(epochs_in(tmp_path).values()) == [2, 12, 13]


def test_names_with_brackets_and_spaces(tmp_path: Path, make_state: MakeState) -> None:
    """Neither patterns of files nor regular expressions."""
    path, state = tmp_path / "a [b]* (c)?" / "check point[1]+.pth", make_state()
    prepare(path)
    for epoch in (1, 2, 3):
        state.epoch = epoch
        keep_state(path, state, keep=2)
    (path.parent / f".{path.name}.77.tmp").touch()
    prepare(path)
    assert epochs_in(path.parent) == {path.name: 3, f"{path.name}.1": 2}
    set_aside(path)
    assert epochs_in(path.parent) == {"check point[1]+.1.pth": 3}


# Foreign


def test_a_plain_state_dict_loads(path: Path, weights: Weights) -> None:
    torch.save(weights, path)
    loaded = load(path)
    assert same(loaded.best, weights)
    assert same(loaded.last, weights)
    assert (loaded.config, loaded.seed, loaded.last_epoch, loaded.optimizer) == ({}, None, 0, None)


def test_the_references_checkpoint_loads(path: Path, weights: Weights) -> None:
    last = {name: tensor + 1 for name, tensor in weights.items()}
    content = {"epoch": 7, "best_model_state_dict": weights, "last_model_state_dict": last, "optimizer_state_dict": {}}
    torch.save(content, path)
    loaded = load(path)
    assert same(loaded.best, weights)
    assert same(loaded.last, last)
    assert (loaded.best_epoch, loaded.last_epoch, loaded.best_dice) == (7, 7, -1.0)


def test_the_references_best_alone_loads(path: Path, weights: Weights) -> None:
    torch.save({"best_model_state_dict": weights, "epoch": 7}, path)
    loaded = load(path)
    assert same(loaded.best, weights)
    assert same(loaded.last, weights)
    assert loaded.best_epoch == 7


@pytest.mark.parametrize("key", ["model_state_dict", "state_dict", "model"])
@pytest.mark.parametrize("extra", [{}, {"epoch": None}, {"epoch": torch.tensor(3)}, {"loss": 0.5}])
def test_the_common_keys_load(key: str, extra: dict[str, Any], path: Path, weights: Weights) -> None:
    torch.save({key: weights, **extra}, path)
    loaded = load(path)
    assert same(loaded.last, weights)
    assert loaded.last_epoch == 0


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"best_model_state_dict": w}])
def test_names_of_a_wrapped_network_lose_their_prefix(
    wrap: Callable[[Weights], Any], path: Path, weights: Weights
) -> None:
    torch.save(wrap({f"module.{name}": tensor for name, tensor in weights.items()}), path)
    assert same(load(path).last, weights)


def test_a_foreign_checkpoint_starts_a_training(
    path: Path, make_state: MakeState, make_batches: MakeBatches, weights: Weights
) -> None:
    torch.save({"state_dict": {name: tensor + 0.5 for name, tensor in weights.items()}, "epoch": 7}, path)
    state = make_state()
    restore(state, load(path))
    assert same(clone(state), {name: tensor + 0.5 for name, tensor in weights.items()})
    assert (state.epoch, state.best_network) == (7, None)
    train_epochs(state, make_batches(1, 1), 8, 8)
    assert state.epoch == 8


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({}, "holds no network"),
        ({"a": 1, "b": "c"}, r"holds no network \(a, b\)"),
        ({"state_dict": {"w": 1.0}}, "holds no network"),
        ({"state_dict": {}}, "holds no network"),
        ({"state_dict": {"w": torch.ones(1)}, "epoch": "seven"}, "damaged or of another version"),
        ([1, 2], "damaged or of another version"),
        (torch.ones(2), "damaged or of another version"),
        ("text", "damaged or of another version"),
        ({"format": 1}, "damaged or of another version"),
        ({"format": 1, "config": {}, "seed": 1, "last": None, "best": None}, "damaged or of another version"),
        ({"format": torch.ones(2)}, "damaged or of another version"),
    ],
)
def test_a_file_without_a_network(content: Any, told: str, path: Path) -> None:
    torch.save(content, path)
    with pytest.raises(UserError, match=f"^--load_ckpt_path {path}: {told}"):
        load(path)


# Another network


@pytest.mark.parametrize(
    ("network", "told"),
    [
        (Unet3d(1, 3, filters=(3, 4, 4)), "lacks downsample.0.conv1.0.weight"),
        (Unet3d(1, 3, filters=(3, 5)), r"has bottleneck.conv1.0.weight as \(4, 3, 3, 3, 3\), not \(5, 3, 3, 3, 3\)"),
        (Unet3d(2, 3, filters=(3, 4)), r"has input_block.conv1.0.weight as \(3, 1, 3, 3, 3\), not \(3, 2, 3, 3, 3\)"),
        (Unet3d(1, 4, filters=(3, 4)), r"has output.conv.weight as \(3, 3, 1, 1, 1\), not \(4, 3, 1, 1, 1\)"),
        (Unet3d(1, 3, "batchnorm", filters=(3, 4)), "lacks input_block.conv1.1.running_mean"),
        (nn.Identity(), "also holds input_block.conv1.0.weight"),
    ],
)
def test_another_networks_weights_are_refused_with_the_first_difference(
    network: nn.Module, told: str, weights: Weights
) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(UserError, match=rf"^old\.pth: of another network than --model.*{told}"):
        load_network(network, weights, Path("old.pth"))
    assert same(network.state_dict(), before), "half loaded is worse than not"


def test_load_network_copies_every_value(weights: Weights) -> None:
    network = Unet3d(1, 3, filters=(3, 4))
    load_network(network, weights, Path("old.pth"))
    assert same(network.state_dict(), weights)


# Dangerous and damaged


class Payload:
    """Unpickling it would make a file."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return (open, (str(self.witness), "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_refused_and_does_not_run(zipped: bool, path: Path, tmp_path: Path, weights: Weights) -> None:
    witness = tmp_path / "executed"
    content = {"state_dict": weights, "extra": Payload(witness)}
    if zipped:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps({"extra": Payload(witness)}, protocol=2))
    with pytest.raises(UserError, match="could run code and is not loaded"):
        load(path)
    assert not witness.exists()


def test_reading_is_restricted_whatever_torch_s_default(
    path: Path, make_state: MakeState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment can turn torch.load's own default off; an explicit argument it cannot."""
    keep_state(path, make_state())
    asked: list[dict[str, Any]] = []
    original = torch.load

    def spy(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(torch, "load", spy)
    load(path)
    assert [kwargs["weights_only"] for kwargs in asked] == [True]
    assert [str(kwargs["map_location"]) for kwargs in asked] == ["cpu"]


def test_what_we_write_is_tensors_and_plain_values(
    path: Path, make_state: MakeState, make_batches: MakeBatches
) -> None:
    state = make_state("adam")
    train_epochs(state, make_batches(1, 1), 1, 1)
    KeepBest().on(EvaluationStopped(1, 0.5, [0.5], 0.1, 1.0), state)
    keep_state(path, state)
    assert isinstance(load(path), Checkpoint)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 100,
        b"not a checkpoint\n",
        b"PK\x03\x04 half a zip",
        b"\x80\x02}q\x00.",
        b"0",
        b"\x80\x02(lp0\n",
        b"B1",
    ],
    ids=["empty", "zeros", "text", "zip head", "empty pickle", "pop", "open list", "struct"],
)
def test_garbage_is_a_users_mistake(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    with pytest.raises(
        UserError, match=f"^--load_ckpt_path {re.escape(str(path))}: (damaged|not a checkpoint|holds no)"
    ):
        load(path)


def rewrite(path: Path, content: bytes) -> None:
    """As a new file: some file systems wait for the disk when one is emptied and filled again."""
    path.unlink()
    path.write_bytes(content)


@pytest.fixture
def kept(path: Path, make_state: MakeState, make_batches: MakeBatches) -> bytes:
    """A checkpoint at `path` with all that it can hold."""
    state = make_state("adam")
    train_epochs(state, make_batches(1, 1), 1, 1)
    KeepBest().on(EvaluationStopped(1, 0.5, [0.5], 0.1, 1.0), state)
    keep_state(path, state)
    return path.read_bytes()


def test_a_file_cut_off_at_any_length(path: Path, make_state: MakeState) -> None:
    """Of the smallest network, so that it can be every single one."""
    state = make_state()
    state.network = nn.Conv3d(1, 1, 1)
    state.optimizer = torch.optim.SGD(state.network.parameters(), 0.1)
    keep_state(path, state)
    whole = path.read_bytes()
    for length in range(len(whole)):
        rewrite(path, whole[:length])
        with pytest.raises(UserError, match=f"^--load_ckpt_path {path}: (damaged|not a checkpoint)"):
            load(path)
    rewrite(path, whole)
    assert same(load(path).last, clone(state))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file(share: float, path: Path, kept: bytes) -> None:
    path.write_bytes(kept[: int(share * len(kept))])
    with pytest.raises(UserError, match="damaged"):
        load(path)


def test_a_flipped_bit_anywhere(path: Path, kept: bytes) -> None:
    """Every bit of the checksum and its mark, and 300 others at random."""
    drawn = random.Random(0)
    tail = range(8 * (len(kept) - 100), 8 * len(kept))
    for bit in [*drawn.sample(range(8 * len(kept)), 300), *tail]:
        damaged = bytearray(kept)
        damaged[bit // 8] ^= 1 << bit % 8
        rewrite(path, damaged)
        with pytest.raises(UserError, match="damaged"):
            load(path)


@pytest.mark.parametrize("length", [1, 22, 512, 4096])
def test_a_block_of_zeros_as_after_a_power_cut(length: int, path: Path, kept: bytes) -> None:
    drawn = random.Random(length)
    for first in [*drawn.sample(range(len(kept) - length), 20), len(kept) - length]:
        damaged = kept[:first] + bytes(length) + kept[first + length :]
        if damaged != kept:
            rewrite(path, damaged)
            with pytest.raises(UserError, match="damaged"):
                load(path)


@pytest.mark.parametrize("extra", [b"\0", b"\0" * 71, b"sha256:", b"more of the same"])
def test_a_file_with_more_at_its_end(extra: bytes, path: Path, kept: bytes) -> None:
    path.write_bytes(kept + extra)
    with pytest.raises(UserError, match="damaged"):
        load(path)


def test_a_flipped_bit_in_a_weight(path: Path, make_state: MakeState) -> None:
    """torch.load would take it in silence."""
    state = make_state()
    with torch.no_grad():
        state.network.output.conv.bias.fill_(1234.5)
    keep_state(path, state)
    content = bytearray(path.read_bytes())
    at = content.find(state.network.output.conv.bias.detach().numpy().tobytes())
    assert at > 0
    content[at] ^= 1
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["seed"] == 1
    with pytest.raises(UserError, match="its checksum does not match"):
        load(path)


def test_a_flipped_bit_in_a_foreign_weight(path: Path) -> None:
    """The archive's own sums are looked at, which torch.load does not."""
    torch.save({"state_dict": {"w": torch.full((50,), 1234.5)}}, path)
    content = bytearray(path.read_bytes())
    content[content.find(torch.full((50,), 1234.5).numpy().tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"the checksum of .* does not match"):
        load(path)


def test_our_format_without_its_checksum_is_damaged(path: Path, kept: bytes) -> None:
    torch.save(torch.load(path, weights_only=True), path)
    with pytest.raises(UserError, match="its checksum is missing"):
        load(path)


@pytest.mark.parametrize("version", [1, FORMAT + 1, "2", None])
def test_another_format_is_refused(version: object, path: Path, make_state: MakeState) -> None:
    content = snapshot(make_state(), [0.0], CONFIG, 1, "", SPEC)
    assert content["format"] == 2
    save(path, content | {"format": version})
    with pytest.raises(UserError, match=re.escape(f"format {version!r}, not 2")):
        load(path)


def test_any_program_reads_the_file(path: Path, kept: bytes) -> None:
    content = torch.load(path, map_location="cpu", weights_only=True)
    assert same(content["last"]["network"], load(path).last)
    assert same(content["best"]["network"], load(path).best)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert re.fullmatch(rb"sha256:[0-9a-f]{64}", archive.comment)


def test_the_flag_that_named_a_file_is_told(path: Path) -> None:
    with pytest.raises(UserError, match=f"^--resume {path}: no such file$"):
        load(path, "--resume")
    path.write_bytes(b"damaged")
    with pytest.raises(UserError, match=f"^--resume {path}: "):
        load(path, "--resume")


def test_a_missing_file_and_a_folder(path: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"checkpoint\.pth: no such file$"):
        load(path)
    with pytest.raises(UserError, match="damaged or no checkpoint"):
        load(tmp_path)


def test_a_checkpoint_s_folder_is_made_and_tried_before_the_run(tmp_path: Path) -> None:
    prepare(tmp_path / "new" / "folder" / "c.pth")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="its folder cannot be written"):
        prepare(tmp_path / "file" / "c.pth")


def test_the_folder_is_cleaned_of_a_killed_run_s_halves_and_of_nothing_else(path: Path) -> None:
    others = [path.name, f"{path.name}.1", f"{path.name}.tmp", f".{path.name}.bak", ".other.pth.12.tmp", ".tmp"]
    for name in (*others, f".{path.name}.123.tmp", f".{path.name}.1.123.tmp"):
        path.with_name(name).touch()
    prepare(path)
    assert sorted(os.listdir(path.parent)) == sorted(others)
