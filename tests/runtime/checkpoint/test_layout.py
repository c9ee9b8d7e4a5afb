"""The files of a run's checkpoints: written atomically, named by step, found and pruned."""

from __future__ import annotations

import os
import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import UserError
from common.files import rotate
from runtime.checkpoint.format import load, snapshot
from runtime.checkpoint.resume import newest_intact
from runtime.checkpoint.writer import find_checkpoints, prepare, save
from runtime.train_state import TrainState
from tests.runtime.checkpoint.conftest import (
    CONFIG,
    SPEC,
    MakeState,
    epochs_in,
    keep_state,
)
from tests.runtime.conftest import file_size_limit

STEPS_PER_EPOCH = 4


def save_epoch(path: Path, state: TrainState, epoch: int, keep: int) -> None:
    """Saves the state as it is after this epoch."""
    state.epoch, state.step = epoch, STEPS_PER_EPOCH * epoch
    keep_state(path, state, seed=epoch, keep=keep)


def after(epoch: int) -> str:
    """Returns the name of this epoch's checkpoint once there is a newer one."""
    return f"checkpoint_{STEPS_PER_EPOCH * epoch:06d}.pth"


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
    state = make_state()
    state.step = 1
    keep_state(path, state, seed=7, keep=2)
    assert steps == ["file", "replace", "replace", "folder"], "nothing is renamed before its successor is complete"


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_earlier_checkpoints_are_named_by_their_step_and_the_oldest_is_deleted(
    keep: int, path: Path, make_state: MakeState
) -> None:
    state = make_state()
    for epoch in range(1, 6):
        save_epoch(path, state, epoch, keep)
        kept = range(epoch, max(0, epoch - keep), -1)
        names = [path.name, *map(after, kept[1:])]
        assert epochs_in(path.parent) == dict(zip(names, kept, strict=True))
        assert [file.name for file in find_checkpoints(path)] == names
    assert (load(path).last_epoch, load(path).seed, load(path).step) == (5, 5, 20)


def test_fewer_are_kept_from_the_next_save_on(path: Path, make_state: MakeState) -> None:
    state = make_state()
    for epoch, keep in [(1, 4), (2, 4), (3, 4), (4, 4), (5, 2)]:
        save_epoch(path, state, epoch, keep)
    assert epochs_in(path.parent) == {"checkpoint.pth": 5, after(4): 4}


def test_a_second_checkpoint_of_a_step_replaces_the_first(path: Path, make_state: MakeState) -> None:
    """As after an epoch and then after its evaluation."""
    state = make_state()
    for epoch in (1, 2):
        save_epoch(path, state, epoch, keep=3)
    state.evaluated = 2
    keep_state(path, state, keep=3)
    assert epochs_in(path.parent) == {"checkpoint.pth": 2, after(1): 1}
    assert load(path).evaluated == 2


def test_damaged_checkpoints_that_a_resumed_run_skipped_take_no_place_of_good_ones(
    path: Path, make_state: MakeState
) -> None:
    """The checkpoints of epochs 3 to 5 are damaged, so the run resumed from epoch 2."""
    state = make_state()
    for epoch in range(1, 6):
        save_epoch(path, state, epoch, keep=4)
    for file in (path, path.with_name(after(4)), path.with_name(after(3))):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    save_epoch(path, state, 3, keep=4)
    assert epochs_in(path.parent) == {"checkpoint.pth": 3, after(2): 2}


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK"])
def test_an_unreadable_file_is_the_first_to_be_deleted(content: bytes, path: Path, make_state: MakeState) -> None:
    state = make_state()
    for epoch in (1, 2):
        save_epoch(path, state, epoch, keep=2)
    path.write_bytes(content)
    save_epoch(path, state, 2, keep=3)
    assert path.with_name(after(0)).read_bytes() == content
    save_epoch(path, state, 3, keep=3)
    assert epochs_in(path.parent) == {"checkpoint.pth": 3, after(2): 2, after(1): 1}


@pytest.mark.parametrize("number", range(2, 12, 3))
def test_former_names_are_found_after_those_with_a_step(number: int, path: Path) -> None:
    assert find_checkpoints(path) == []
    assert find_checkpoints(path / "no folder" / "c.pth") == []
    for name in ("checkpoint.pth.10", f"checkpoint.pth.{number}", "checkpoint.pth.1"):
        path.with_name(name).touch()
    for other in ("checkpoint.1.pth", "checkpoint.pth.0", "checkpoint.pth.01", "checkpoint.pth.x", "checkpointxpth.1"):
        path.with_name(other).touch()
    old = [f"checkpoint.pth.{n}" for n in sorted({1, number, 10})]
    assert [file.name for file in find_checkpoints(path)] == old
    path.touch()
    assert find_checkpoints(path)[0] == path
    stepped = ["checkpoint_1000000.pth", "checkpoint_999999.pth", "checkpoint_000010.pth", "checkpoint_000009.pth"]
    others = ["checkpoint_00001.pth", "checkpoint_000001.pt", "checkpoint_000001.1.pth", "checkpoint_best.pth"]
    for name in (*stepped, *others):
        path.with_name(name).touch()
    assert [file.name for file in find_checkpoints(path)] == [path.name, *stepped, *old]


def test_files_with_former_names_are_deleted_first(path: Path, make_state: MakeState) -> None:
    state = make_state()
    for number in (3, 2, 1):
        save_epoch(path, state, 4 - number, keep=9)
        path.rename(path.with_name(f"checkpoint.pth.{number}"))
    save_epoch(path, state, 4, keep=3)
    assert epochs_in(path.parent) == {"checkpoint.pth": 4, "checkpoint.pth.1": 3, "checkpoint.pth.2": 2}


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.97, 0.999])
def test_a_disk_that_is_full_is_an_os_error_and_every_older_file_is_untouched(
    share: float, path: Path, make_state: MakeState
) -> None:
    """For larger tensors torch's writer turns the error into a RuntimeError about a position."""
    content = snapshot(make_state(), [0.0], config=CONFIG, seed=1, data="", spec=SPEC) | {"more": torch.rand(20_000)}
    for seed in (1, 2, 3):
        save(path, content | {"seed": seed, "last": content["last"] | {"step": seed}}, keep=3)
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    with file_size_limit(int(share * path.stat().st_size)), pytest.raises(OSError, match="File too large"):
        save(path, content, keep=3)
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


KILLED = """
    import os, sys
    from pathlib import Path
    from runtime.checkpoint.format import FORMAT
    from runtime.checkpoint.writer import save

    def content(epoch):
        best = {"epoch": 0, "mean_dice": -1.0, "network": None}
        parts = {"network": {}, "optimizer": {}, "scaler": {}}
        last = {"epoch": epoch, "step": epoch, "batch": 0, "evaluated": 0, "loss_sums": [], **parts}
        return {"format": FORMAT, "config": {}, "seed": 1, "data": "", "last": last, "best": best}

    def killed_at(count):
        left = [count]
        def counted(name, original):
            def call(*arguments, **named):
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)
                return original(*arguments, **named)
            setattr(os, name, call)
        for name in ("replace", "rename", "unlink", "fsync"):
            counted(name, getattr(os, name))

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


def test_killed_at_any_moment_whole_files_are_left_and_an_older_one_of_them(
    tmp_path: Path, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Before each call that changes the folder; the temporary files that the next start removes are no checkpoints."""
    done = run_python("-c", textwrap.dedent(KILLED), tmp_path)
    assert done.returncode == 0, done.stderr
    folders = sorted(tmp_path.iterdir(), key=lambda folder: int(folder.name))
    assert len(folders) == int(done.stdout) >= 5
    newest = []
    for folder in folders:
        prepare(folder / "c.pth")
        found = epochs_in(folder)
        assert found.keys() <= {"c.pth", "c_000002.pth", "c_000001.pth"}
        assert 2 in found.values()
        newest.append(max(found.values()))
        resumed = newest_intact(folder / "c.pth")
        assert resumed is not None
        assert resumed.last_epoch == newest[-1], "it is what --resume finds"
    assert newest == sorted(newest)
    assert (newest[0], newest[-1]) == (2, 3)


@pytest.mark.parametrize("name", ["checkpoint.pth", "newest"])
def test_a_run_without_resume_keeps_an_earlier_runs_checkpoints_under_free_names(
    name: str, tmp_path: Path, make_state: MakeState
) -> None:
    path, state = tmp_path / name, make_state()
    rotate(find_checkpoints(path))
    assert os.listdir(tmp_path) == []
    for run in (10, 20, 30):
        for epoch in (1, 2, 3):
            state.step, state.epoch = epoch, run + epoch
            keep_state(path, state, keep=2)
        rotate(find_checkpoints(path))
        assert find_checkpoints(path) == [], "none is taken for the new run's"
    expected = {}
    for number, run in enumerate((10, 20, 30), 1):
        expected |= {
            f"{path.stem}.{number}{path.suffix}": run + 3,
            f"{path.stem}_000002.{number}{path.suffix}": run + 2,
        }
    assert epochs_in(tmp_path) == expected


def test_names_with_brackets_and_spaces(tmp_path: Path, make_state: MakeState) -> None:
    """They are no file patterns and no regular expressions."""
    path, state = tmp_path / "a [b]* (c)?" / "check point[1]+.pth", make_state()
    prepare(path)
    for epoch in (1, 2, 3):
        save_epoch(path, state, epoch, keep=2)
    (path.parent / f".{path.name}.77.tmp").touch()
    prepare(path)
    assert epochs_in(path.parent) == {path.name: 3, "check point[1]+_000008.pth": 2}
    rotate(find_checkpoints(path))
    assert epochs_in(path.parent) == {"check point[1]+.1.pth": 3, "check point[1]+_000008.1.pth": 2}


def test_a_checkpoints_folder_is_made_and_checked_before_the_run(tmp_path: Path) -> None:
    prepare(tmp_path / "new" / "folder" / "c.pth")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="its folder cannot be written"):
        prepare(tmp_path / "file" / "c.pth")


def test_only_the_temporary_files_of_a_killed_run_are_removed(path: Path) -> None:
    others = [path.name, f"{path.name}.1", f"{path.name}.tmp", f".{path.name}.bak", ".other.pth.12.tmp", ".tmp"]
    for name in (*others, f".{path.name}.123.tmp", f".{path.name}.1.123.tmp"):
        path.with_name(name).touch()
    prepare(path)
    assert sorted(os.listdir(path.parent)) == sorted(others)
