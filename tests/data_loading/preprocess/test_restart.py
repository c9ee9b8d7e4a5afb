"""Restarts of preprocess_dataset.py: finished cases are skipped, an interruption loses only the case in progress."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import UserError
from data_loading import writer
from data_loading.index import INDEX_NAME, PARTIAL_INDEX_NAME, read_index
from data_loading.integrity import VERIFIED_NAME
from tests.data_loading.preprocess.program import (
    PROGRAM,
    ROOT,
    RunPython,
    WriteRaw,
    contents,
    flip_byte,
    preprocess,
    redone,
    times,
    to_hash,
    verify,
)

AXES = [[0, 0, -1], [0, -1, 0], [-1, 0, 0]]  # KiTS19's: slices, rows, columns


def test_a_second_run_does_nothing(copy: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    raw, out = copy
    before, files = times(out), contents(out)
    # shutil.copytree keeps the times of the sources.
    preprocess(raw, out)
    assert redone(out, before) == set()
    assert contents(out) == files
    assert "3 cases (0 now, 3 already done)" in capsys.readouterr().out


def test_damaged_and_missing_results_are_recomputed(copy: tuple[Path, Path]) -> None:
    raw, out = copy
    before, files = times(out), contents(out)
    flip_byte(out / "case_00001_y.npy")
    (out / "case_00002_x.npy").unlink()
    preprocess(raw, out)
    assert redone(out, before) == {f"case_{number:05d}_{kind}.npy" for number in (1, 2) for kind in "xy"}
    assert contents(out) == files


def test_a_changed_source_is_preprocessed_again(copy: tuple[Path, Path], write_scan: Callable[..., None]) -> None:
    raw, out = copy
    before = times(out)
    mask = np.zeros((10, 12, 14), np.uint8)
    mask[5, 5, 5] = 2
    write_scan(raw / "case_00001" / "segmentation.nii.gz", mask, (3.0, 1.5, 2.0), AXES)
    preprocess(raw, out)
    assert redone(out, before) == {"case_00001_x.npy", "case_00001_y.npy"}
    assert sorted(read_index(out / INDEX_NAME).cases["case_00001"].boxes) == [2]


def test_copied_files_and_those_of_an_earlier_version_get_stamps(copy: tuple[Path, Path]) -> None:
    raw, out = copy
    assert to_hash(out) == []
    os.utime(out / "case_00001_y.npy")
    content = json.loads((out / INDEX_NAME).read_text())
    content.pop("digest", None)
    del content["cases"]["case_00002"]["stamps"]
    (out / INDEX_NAME).write_text(json.dumps(content))
    assert to_hash(out) == ["case_00001_y.npy", "case_00002_x.npy", "case_00002_y.npy"]
    before = times(out)
    preprocess(raw, out)
    assert redone(out, before) == set()
    assert to_hash(out) == []


def test_verified_content_does_not_vouch_for_later_content(
    copy: tuple[Path, Path], tmp_path: Path, write_scan: Callable[..., None]
) -> None:
    raw, out = copy
    os.utime(out / "case_00001_y.npy")
    assert verify(out) == 0
    assert (out / VERIFIED_NAME).exists()
    assert to_hash(out) == []
    shutil.copy2(out / "case_00001_y.npy", tmp_path)
    write_scan(raw / "case_00001" / "segmentation.nii.gz", np.ones((10, 12, 14), np.uint8), (3.0, 1.5, 2.0), AXES)
    preprocess(raw, out)
    assert not (out / VERIFIED_NAME).exists()
    assert to_hash(out) == []
    shutil.copy2(tmp_path / "case_00001_y.npy", out)
    assert to_hash(out) == ["case_00001_y.npy"]


@pytest.mark.parametrize("index", [b"", b'{"format": 1'])
def test_a_damaged_index_starts_over(copy: tuple[Path, Path], capsys: pytest.CaptureFixture[str], index: bytes) -> None:
    raw, out = copy
    files = contents(out)
    (out / INDEX_NAME).write_bytes(index)
    preprocess(raw, out)
    assert contents(out) == files
    output = capsys.readouterr().out
    assert "starting over" in output
    assert "3 cases (3 now" in output


def test_a_bad_case_keeps_the_others_and_the_set_incomplete(copy: tuple[Path, Path], done: Path) -> None:
    raw, out = copy
    shutil.rmtree(out)
    path = raw / "case_00001" / "imaging.nii.gz"
    good, written = path.read_bytes(), path.stat().st_mtime_ns
    flip_byte(path, len(good) // 2)
    with pytest.raises(UserError, match=r"case_00001/imaging\.nii\.gz: damaged"):
        preprocess(raw, out)
    kept = [f"case_0000{number}_{kind}.npy" for number in (0, 2) for kind in "xy"]
    assert sorted(contents(out)) == [*kept, PARTIAL_INDEX_NAME]
    before = times(out)
    path.write_bytes(good)
    os.utime(path, ns=(written, written))
    preprocess(raw, out)
    assert contents(out) == contents(done)
    assert set(kept).isdisjoint(redone(out, before))


def test_no_complete_index_exists_while_cases_are_missing(
    copy: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, out = copy
    (out / "case_00001_x.npy").unlink()
    real, seen = writer.preprocess_case, []

    def watched(*arguments: Any, **more: Any) -> Any:
        seen.append(((out / INDEX_NAME).exists(), (out / PARTIAL_INDEX_NAME).exists()))
        return real(*arguments, **more)

    monkeypatch.setattr(writer, "preprocess_case", watched)
    preprocess(raw, out)
    assert seen == [(False, True)]
    assert not (out / PARTIAL_INDEX_NAME).exists()


# Kills the process when half of a file is on disk.
KILLED_WHILE_SAVING = """
import io, os, signal, sys
import numpy, preprocess_dataset
whole, calls = numpy.save, []
def save(stream, array, **how):
    calls.append(0)
    if len(calls) < 4:
        return whole(stream, array, **how)
    content = io.BytesIO()
    whole(content, array, **how)
    stream.write(content.getvalue()[:content.tell() // 2])
    stream.flush()
    os.kill(os.getpid(), signal.SIGKILL)
numpy.save = save
preprocess_dataset.main(sys.argv[1:])
"""


def test_killed_while_saving_and_started_again(raw: Path, done: Path, tmp_path: Path, run_python: RunPython) -> None:
    arguments = ["--data_dir", raw, "--results_dir", tmp_path, "--num_workers", 1]
    killed = run_python("-c", KILLED_WHILE_SAVING, *arguments)
    assert killed.returncode == -signal.SIGKILL
    left = contents(tmp_path)
    names = ["case_00000_x.npy", "case_00000_y.npy", "case_00001_x.npy"]
    assert sorted(name for name in left if not name.startswith(".")) == [*names, PARTIAL_INDEX_NAME]
    complete = contents(done)
    assert all(left[name] == complete[name] for name in names)
    before = times(tmp_path)
    preprocess(raw, tmp_path)
    assert contents(tmp_path) == complete
    assert redone(tmp_path, before) == {f"case_{number:05d}_{kind}.npy" for number in (1, 2) for kind in "xy"}


def test_a_full_disk_leaves_nothing_half_written(
    copy: tuple[Path, Path], done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, out = copy
    shutil.rmtree(out)
    real = np.save

    def full(stream: Any, array: Any, **how: Any) -> None:
        if "case_00001_y" in stream.name:
            stream.write(b"half")
            raise OSError(28, "No space left on device")
        real(stream, array, **how)

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match=f"--results_dir {out}: cannot be written: No space left on device"):
        preprocess(raw, out)
    monkeypatch.undo()
    names = ["case_00000_x.npy", "case_00000_y.npy", "case_00001_x.npy", PARTIAL_INDEX_NAME]
    assert sorted(contents(out)) == names
    preprocess(raw, out)
    assert contents(out) == contents(done)


def alive(session: int) -> list[int]:
    """Returns the processes of a session, except zombies."""
    found = []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            state, _, _, of = (process / "stat").read_text().rsplit(")", 1)[1].split()[:4]
            if int(of) == session and state != "Z":
                found.append(int(process.name))
    return found


def wait_for(condition: Callable[[], bool], timeout_s: float = 60) -> bool:
    end = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return condition()


# Python imports a module of this name in every process; a process that opens the third scan blocks forever.
HANGING_SCAN = """
import multiprocessing, pathlib, signal
opened = pathlib.Path.open
def open_or_hang(path, *args, **how):
    if "case_00002" in str(path) and multiprocessing.parent_process():
        signal.pause()
    return opened(path, *args, **how)
pathlib.Path.open = open_or_hang
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="counts processes by Linux's /proc")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_an_interrupted_run(raw: Path, tmp_path: Path, sent: signal.Signals) -> None:
    (tmp_path / "sitecustomize.py").write_text(HANGING_SCAN)
    out = tmp_path / "out"
    command = [PROGRAM, "--data_dir", raw, "--results_dir", out, "--num_workers", "2"]
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        index = out / PARTIAL_INDEX_NAME
        assert wait_for(lambda: index.exists() and len(read_index(index).cases) == 2)
        time.sleep(0.5)  # by now a worker has opened the third scan
        assert len(alive(process.pid)) >= 3
        if sent == signal.SIGINT:
            os.killpg(process.pid, sent)  # as a terminal does
        else:
            process.send_signal(sent)
        _, output = process.communicate(timeout=30)
        assert wait_for(lambda: not alive(process.pid), timeout_s=20)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if sent == signal.SIGINT:
        assert (process.returncode, output) == (130, "preprocess_dataset.py: interrupted\n")
    assert not (out / INDEX_NAME).exists()


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_reported_in_one_line(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_try_case", die)
    with pytest.raises(
        UserError, match="process was killed, most likely because memory ran out; use a smaller --num_workers"
    ):
        preprocess(raw, tmp_path, "--num_workers", 2)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not (tmp_path / INDEX_NAME).exists()


def test_a_folder_with_the_former_name_of_minmax_is_not_preprocessed_again(
    tmp_path: Path, write_msd: WriteRaw, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, out = write_msd(tmp_path / "raw", 2), tmp_path / "out"
    preprocess(raw, out, "--dataset", "msd", "--intensity", "minmax")
    content = json.loads((out / INDEX_NAME).read_text())
    content["spec"]["intensity"] = "unit"
    del content["digest"]
    (out / INDEX_NAME).write_text(json.dumps(content))
    assert read_index(out / INDEX_NAME).spec.intensity == "minmax"
    capsys.readouterr()
    preprocess(raw, out, "--dataset", "msd", "--intensity", "minmax")
    assert "2 cases (0 now, 2 already done)" in capsys.readouterr().out
