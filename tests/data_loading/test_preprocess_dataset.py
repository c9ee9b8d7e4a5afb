"""preprocess_dataset.py end to end: written files, restarts after interruptions, verification and error messages."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import preprocess_dataset
from common.errors import UserError, run_program
from data_loading import verification, writer
from data_loading.index import INDEX_NAME, PARTIAL_INDEX_NAME, read_index
from data_loading.integrity import VERIFIED_NAME, check_files, fingerprint
from data_loading.io.volume import read_nifti
from data_loading.preprocessing import foreground_boxes, preprocess_image, to_source_grid
from data_loading.readers.base import ReaderOptions
from data_loading.readers.kits19 import read_kits19
from data_loading.readers.msd import read_msd
from data_loading.spec import KITS19
from preprocess_dataset import main

ROOT = Path(preprocess_dataset.__file__).resolve().parent
PROGRAM = "preprocess_dataset.py"
IDS = (0, 1, 2)  # the first is one of MLPerf's evaluation cases
F32 = np.float32

WriteRaw = Callable[..., Path]
RunPython = Callable[..., subprocess.CompletedProcess[str]]


def preprocess(raw: Path, out: Path, *more: object) -> None:
    arguments = ["--data_dir", raw, "--results_dir", out, "--num_workers", 1, *more]
    assert main(list(map(str, arguments))) == 0


def verify(out: Path, *more: object) -> int:
    return main(["--mode", "verify", "--results_dir", str(out), *map(str, more)])


def contents(folder: Path) -> dict[str, bytes]:
    """Returns every file; the index without its stamps, which hold the time of writing, and without its digest."""
    dated = re.compile(rb'"stamps": {.*?}|"digest": "\w+"', re.DOTALL)
    return {path.name: dated.sub(b"", path.read_bytes()) for path in folder.iterdir()}


def to_hash(folder: Path) -> list[str]:
    return check_files(folder, [f"case_{number:05d}" for number in IDS]).changed


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.npy")}


def redone(folder: Path, before: dict[str, int]) -> set[str]:
    """Returns the files written since."""
    return {name for name, written in times(folder).items() if before.get(name) != written}


def flip_byte(path: Path, position: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x55
    path.write_bytes(content)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory, write_kits19: WriteRaw) -> Path:
    folder = write_kits19(tmp_path_factory.mktemp("raw"), [*IDS, 210])
    # KiTS19 has no masks for 210 and above.
    (folder / "case_00210" / "segmentation.nii.gz").unlink()
    return folder


@pytest.fixture(scope="module")
def done(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`raw`, preprocessed; must not be changed."""
    folder = tmp_path_factory.mktemp("results") / "new" / "data"
    preprocess(raw, folder)
    return folder


@pytest.fixture
def copy(raw: Path, done: Path, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """(raw, results) that may be changed, with the original file times."""
    shutil.copytree(raw, tmp_path / "raw")
    shutil.copytree(done, tmp_path / "out")
    yield tmp_path / "raw", tmp_path / "out"
    shutil.rmtree(tmp_path / "out")


# Written files.


def test_volumes_are_what_the_reference_computes(raw: Path, done: Path) -> None:
    for number in IDS:
        case = raw / f"case_{number:05d}"
        image = torch.from_numpy(np.asarray(nib.load(case / "imaging.nii.gz").dataobj, dtype=F32))[None, None]
        label = torch.from_numpy(np.asarray(nib.load(case / "segmentation.nii.gz").dataobj, dtype=np.uint8))[None, None]
        size = (int(3.0 / 1.6 * 10), int(1.5 / 1.2 * 12), int(2.0 / 1.2 * 14))
        image = F.interpolate(image, size=size, mode="trilinear", align_corners=True)[0]
        label = F.interpolate(label, size=size, mode="nearest")[0]
        normal = (np.clip(image.numpy(), F32(-79), F32(304)) - F32(101.0)) / F32(76.9)
        missing = [128 - n for n in size]
        padding = [(0, 0), *((n // 2, n - n // 2) for n in missing)]
        x, y = (np.load(done / f"case_{number:05d}_{kind}.npy") for kind in "xy")
        assert (x.dtype, y.dtype) == (F32, np.uint8)
        np.testing.assert_array_equal(x, np.pad(normal, padding, mode="edge"))
        np.testing.assert_array_equal(y, np.pad(label.numpy(), padding, mode="edge"))


def test_the_folder_holds_only_the_cases_and_their_index(done: Path) -> None:
    expected = [f"case_{number:05d}_{kind}.npy" for number in IDS for kind in "xy"]
    assert sorted(path.name for path in done.iterdir()) == [*expected, INDEX_NAME]


def test_the_index_holds_all_that_training_needs(raw: Path, done: Path) -> None:
    index = read_index(done / INDEX_NAME)
    assert index.spec == KITS19
    assert index.split == {"train": ["case_00001", "case_00002"], "evaluation": ["case_00000"]}
    assert list(index.cases) == [f"case_{number:05d}" for number in IDS]
    for case, record in index.cases.items():
        image = read_nifti(raw / case / "imaging.nii.gz", np.float32)
        x, y = (np.load(done / f"{case}_{kind}.npy") for kind in "xy")
        assert record.boxes == foreground_boxes(y, 3)
        assert sorted(record.boxes) == [1, 2]
        assert record.digests == {
            kind: hashlib.md5((done / f"{case}_{kind}.npy").read_bytes()).hexdigest() for kind in "xy"
        }
        assert record.statistics == pytest.approx({"mean": x.mean(dtype=float), "std": x.std(dtype=float)})
        assert record.source_stamp == [
            [(status := (raw / case / name).stat()).st_size, status.st_mtime_ns]
            for name in ("imaging.nii.gz", "segmentation.nii.gz")
        ]
        assert record.stamps == {
            kind: [(status := (done / f"{case}_{kind}.npy").stat()).st_size, status.st_mtime_ns] for kind in "xy"
        }
        transform = record.transform
        assert transform is not None
        np.testing.assert_array_equal(transform.source.affine, image.geometry.affine)
        assert (transform.source.shape, transform.source.spacing_mm) == ((10, 12, 14), (3.0, 1.5, 2.0))
        assert transform.resampled_shape == (18, 15, 23)
        assert transform.padding_before == (55, 56, 52)
        assert transform.shape == x.shape[1:] == (128, 128, 128)
        # The inverse transform needs only the index.
        np.testing.assert_array_equal(to_source_grid(x, transform), to_source_grid(*preprocess_image(image, KITS19)))


def test_every_case_has_a_line_and_the_medians_come_last(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preprocess(raw, tmp_path)
    output = capsys.readouterr()
    lines = output.out.splitlines()
    statistics = [read_index(tmp_path / INDEX_NAME).cases[f"case_{number:05d}"].statistics for number in IDS]
    for number, line, one in zip(IDS, lines, statistics, strict=False):
        expected = f"shape (128, 128, 128), mean {one['mean']:.2f}, std {one['std']:.2f}"
        assert line == f"case_{number:05d}: {expected}"
    mean, deviation = (np.median([one[key] for one in statistics]) for key in ("mean", "std"))
    assert lines[3:] == [
        f"median shape (128, 128, 128), mean {mean:.2f}, std {deviation:.2f}",
        f"3 cases (3 now, 0 already done): 2 to train, 1 to evaluate, in {tmp_path}",
    ]
    assert output.err == ""


@pytest.mark.integration
def test_two_workers_write_the_same_bytes(raw: Path, done: Path, tmp_path: Path, run_python: RunPython) -> None:
    ran = run_python(PROGRAM, "--data_dir", raw, "--results_dir", tmp_path, "--num_workers", 2)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert contents(tmp_path) == contents(done)


# Restarts: finished cases are skipped, and an interruption loses only the case in progress.


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
    write_scan(raw / "case_00001" / "segmentation.nii.gz", mask, (3.0, 1.5, 2.0))
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
    write_scan(raw / "case_00001" / "segmentation.nii.gz", np.ones((10, 12, 14), np.uint8), (3.0, 1.5, 2.0))
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
    assert "starting afresh" in output
    assert "3 cases (3 now" in output


def test_a_bad_case_keeps_the_others_and_the_set_incomplete(copy: tuple[Path, Path], done: Path) -> None:
    raw, out = copy
    shutil.rmtree(out)
    path = raw / "case_00001" / "imaging.nii.gz"
    good, written = path.read_bytes(), path.stat().st_mtime_ns
    flip_byte(path, len(good) // 2)
    with pytest.raises(UserError, match=r"case_00001/imaging\.nii\.gz: damaged"):
        preprocess(raw, out)
    assert sorted(contents(out)) == ["case_00000_x.npy", "case_00000_y.npy", PARTIAL_INDEX_NAME]
    before = times(out)
    path.write_bytes(good)
    os.utime(path, ns=(written, written))
    preprocess(raw, out)
    assert contents(out) == contents(done)
    assert {"case_00000_x.npy", "case_00000_y.npy"}.isdisjoint(redone(out, before))


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


@pytest.mark.integration
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
import gzip, signal
whole = gzip.open
def hang(path, *how):
    if "case_00002" in str(path):
        signal.pause()
    return whole(path, *how)
gzip.open = hang
"""


@pytest.mark.integration
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


@pytest.mark.integration
def test_a_killed_worker_is_reported_in_one_line(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "preprocess_case", die)
    with pytest.raises(UserError, match="process was killed, most likely for memory; use a smaller --num_workers"):
        preprocess(raw, tmp_path, "--num_workers", 2)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not (tmp_path / INDEX_NAME).exists()


# The Decathlon's layout.


def test_the_decathlon_keeps_its_spacing_and_is_normalised_per_scan(tmp_path: Path, write_msd: WriteRaw) -> None:
    raw, out = write_msd(tmp_path / "raw", 5), tmp_path / "out"
    preprocess(raw, out, "--dataset", "msd")
    index = read_index(out / INDEX_NAME)
    assert (len(index.split["train"]), len(index.split["evaluation"])) == (4, 1)
    for number in range(5):
        image = np.asarray(nib.load(raw / "imagesTr" / f"scan_{number}.nii.gz").dataobj, dtype=np.float64)
        x, y = (np.load(out / f"scan_{number}_{kind}.npy") for kind in "xy")
        np.testing.assert_allclose(x[0], (image - image.mean()) / image.std(), atol=1e-5)
        np.testing.assert_array_equal(y[0], np.asarray(nib.load(raw / "labelsTr" / f"scan_{number}.nii.gz").dataobj))
        transform = index.cases[f"scan_{number}"].transform
        assert transform is not None
        assert transform.source.spacing_mm == (2.0, 1.0, 1.0)
        assert transform.shape == transform.resampled_shape == (8, 9 + number, 10)


def test_modalities_become_channels(tmp_path: Path, write_msd: WriteRaw) -> None:
    raw, out = write_msd(tmp_path / "raw", 2, modalities=3), tmp_path / "out"
    preprocess(raw, out, "--dataset", "msd")
    x = np.load(out / "scan_1_x.npy")
    assert x.shape == (3, 8, 10, 10)
    np.testing.assert_allclose(x.mean(axis=(1, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(x.std(axis=(1, 2, 3)), 1, atol=1e-5)


def test_another_seed_changes_the_split_and_preprocesses_nothing(
    tmp_path: Path, write_msd: WriteRaw, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, out = write_msd(tmp_path / "raw", 10), tmp_path / "out"
    splits = []
    for seed in (0, 1, 0):
        preprocess(raw, out, "--dataset", "msd", "--seed", seed)
        splits.append(read_index(out / INDEX_NAME).split)
    assert splits[0] == splits[2] != splits[1]
    assert splits[1] == read_msd(raw, ReaderOptions(seed=1)).split
    assert capsys.readouterr().out.count("10 cases (0 now, 10 already done)") == 2


def test_another_spec_preprocesses_all_again(
    tmp_path: Path, write_msd: WriteRaw, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, out = write_msd(tmp_path / "raw", 2), tmp_path / "out"
    preprocess(raw, out, "--dataset", "msd")
    content = json.loads((raw / "dataset.json").read_text())
    content["labels"]["3"] = "cyst"
    (raw / "dataset.json").write_text(json.dumps(content))
    capsys.readouterr()
    preprocess(raw, out, "--dataset", "msd")
    assert "2 cases (2 now, 0 already done)" in capsys.readouterr().out
    assert len(read_index(out / INDEX_NAME).spec.classes) == 4


def test_modalities_and_merged_labels_as_in_brain_tumours(tmp_path: Path, write_msd: WriteRaw) -> None:
    raw, out = write_msd(tmp_path / "raw", 5, modalities=2), tmp_path / "out"
    preprocess(
        raw,
        out,
        "--dataset",
        "msd",
        "--labels",
        "kidney,tumour=1:whole",
        "--split_ratios",
        "0.6",
        "0.2",
        "0.2",
        "--intensity",
        "minmax",
        "--orientation",
        "SAR",
    )
    index = read_index(out / INDEX_NAME)
    assert (index.spec.classes, index.spec.channels) == (("background", "whole"), 2)
    assert [len(cases) for cases in index.split.values()] == [3, 1, 1]
    for number in range(5):
        image = np.asarray(nib.load(raw / "imagesTr" / f"scan_{number}.nii.gz").dataobj)
        label = np.asarray(nib.load(raw / "labelsTr" / f"scan_{number}.nii.gz").dataobj)
        x, y = (np.load(out / f"scan_{number}_{kind}.npy") for kind in "xy")
        low, high = image.min(axis=(0, 1, 2)), image.max(axis=(0, 1, 2))
        np.testing.assert_allclose(x, ((image - low) / (high - low)).transpose(3, 2, 1, 0), atol=1e-6)
        np.testing.assert_array_equal(y[0], (label > 0).transpose(2, 1, 0))


def test_the_split_and_its_options_are_saved_with_a_hash(tmp_path: Path, write_msd: WriteRaw) -> None:
    raw, out = write_msd(tmp_path / "raw", 5), tmp_path / "out"
    hashes = []
    for seed in ("3", "3", "4"):
        preprocess(raw, out, "--dataset", "msd", "--split_ratios", "0.6", "0.2", "0.2", "--seed", seed)
        content = json.loads((out / INDEX_NAME).read_text())
        hashes.append(content["split_hash"])
        assert content["provenance"] == {"dataset": "msd", "seed": int(seed), "split_ratios": [0.6, 0.2, 0.2]}
    assert hashes[0] == hashes[1] != hashes[2]
    assert hashes[2] == hashlib.sha256(json.dumps(content["split"], sort_keys=True).encode()).hexdigest()
    # A split edited by hand is detected, even if the file's digest is removed.
    del content["digest"]
    content["split"]["train"].append(content["split"]["test"].pop())
    (out / INDEX_NAME).write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"its split is not the one that preprocess_dataset\.py wrote"):
        read_index(out / INDEX_NAME)


def test_a_patient_in_two_subsets_is_rejected(tmp_path: Path, write_msd: WriteRaw) -> None:
    raw, out = write_msd(tmp_path / "raw", 5), tmp_path / "out"
    preprocess(raw, out, "--dataset", "msd")
    content = json.loads((out / INDEX_NAME).read_text())
    del content["digest"]
    for case in (content["split"]["train"][0], content["split"]["evaluation"][0]):
        content["cases"][case]["patient"] = "Q"
    (out / INDEX_NAME).write_text(json.dumps(content))
    with pytest.raises(UserError, match="patient Q is in train and in evaluation; preprocess again"):
        read_index(out / INDEX_NAME)


def test_a_duplicate_scan_and_a_missing_class_cause_warnings(
    tmp_path: Path, write_msd: WriteRaw, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = write_msd(tmp_path / "raw", 5)
    for kind in ("imagesTr", "labelsTr"):
        for number in range(1, 5):
            shutil.copy(raw / kind / "scan_0.nii.gz", raw / kind / f"scan_{number}.nii.gz")
    content = json.loads((raw / "dataset.json").read_text())
    content["labels"]["3"] = "cyst"
    (raw / "dataset.json").write_text(json.dumps(content))
    preprocess(raw, tmp_path / "out", "--dataset", "msd")
    warned = capsys.readouterr().err.splitlines()
    (held_out,) = read_index(tmp_path / "out" / INDEX_NAME).split["evaluation"]
    assert any(line.startswith(f"warning: {held_out} (evaluation) is the same scan as scan_") for line in warned)
    assert warned[-1] == "warning: class 3 (cyst) is in no training case"


def test_scans_of_different_orientations_cause_a_warning(
    tmp_path: Path, write_msd: WriteRaw, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = write_msd(tmp_path / "raw", 5)
    for kind in ("imagesTr", "labelsTr"):
        path = raw / kind / "scan_1.nii.gz"
        nib.save(nib.Nifti1Image(np.asarray(nib.load(path).dataobj), np.diag([-2.0, 1.0, 1.0, 1.0])), path)
    preprocess(raw, tmp_path / "out", "--dataset", "msd")
    message = "warning: the scans' axes run different ways (4 RAS, 1 LAS); --orientation RAS turns all\n"
    assert capsys.readouterr().err == message
    preprocess(raw, tmp_path / "out", "--dataset", "msd", "--orientation", "RAS")
    assert capsys.readouterr().err == ""


def test_labels_outside_the_foreground_crop_are_counted(
    tmp_path: Path, write_msd: WriteRaw, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, out = write_msd(tmp_path / "raw", 2), tmp_path / "out"
    image = np.zeros((8, 9, 10), F32)
    image[2:, 1:8, 2:9] = 1000
    label = np.zeros((8, 9, 10), np.uint8)
    label[1:4, 4, 4] = 1
    for name, array in (("imagesTr", image), ("labelsTr", label)):
        nib.save(nib.Nifti1Image(array, np.diag([2.0, 1.0, 1.0, 1.0])), raw / name / "scan_0.nii.gz")
    preprocess(raw, out, "--dataset", "msd", "--foreground_crop")
    assert "scan_0: shape (6, 7, 7), mean 0.00, std 0.00, 1 labelled voxels outside of the" in capsys.readouterr().out
    assert np.load(out / "scan_0_y.npy").sum() == 2


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("intensity_window", (-100.0, 300.0)),
        ("intensity", "zscore"),
        ("spacing", (2.0, 2.0, 2.0)),
        ("orientation", "IPL"),
        ("foreground_crop", True),
        ("labels", ("1,2=1",)),
        ("split_ratios", (0.5, 0.5)),
    ],
)
def test_kits19_with_a_flag_is_no_longer_kits19(raw: Path, flag: str, value: Any) -> None:
    data = preprocess_dataset.read_raw("kits19", raw, 0, {flag: value})
    assert data.spec.name == f"kits19 with other {flag}"
    assert preprocess_dataset.read_raw("kits19", raw, 0, {}).spec == KITS19
    # KiTS19's padding value does not hold for another window or normalisation.
    assert (data.spec.padding_value is None) == (flag in ("intensity_window", "intensity"))


@pytest.mark.real_data
def test_the_real_hippocampus_set_is_split_in_three(real_data: Callable[[str], Path]) -> None:
    flags = {"split_ratios": (0.6, 0.2, 0.2), "orientation": "SPL"}
    data = preprocess_dataset.read_raw("msd", real_data("hippocampus"), 0, flags)
    assert [len(cases) for cases in data.split.values()] == [120, 40, 40]
    assert len({case for cases in data.split.values() for case in cases}) == 200


@pytest.mark.real_data
def test_real_mri_scans_are_preprocessed(tmp_path: Path, real_data: Callable[[str], Path]) -> None:
    data = read_msd(real_data("hippocampus"), ReaderOptions())
    for raw in data.cases[:4]:
        case, record = writer.preprocess_case(raw, tmp_path, data.spec)
        x, y = (np.load(tmp_path / f"{case}_{kind}.npy") for kind in "xy")
        assert x.shape == y.shape == (1, *record.transform.shape)  # type: ignore[union-attr]
        assert abs(x.mean()) < 1e-4
        assert sorted(record.boxes) == [1, 2]


# Verification.


def test_verify_agrees_with_what_was_written(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(done) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "dataset.json: 6 identical, 0 different, 0 missing"
    assert "not compared" in lines[1]
    assert not (done / VERIFIED_NAME).exists(), "the index has their stamps"


def test_verified_files_are_not_hashed_by_the_next_run(copy: tuple[Path, Path]) -> None:
    _, out = copy
    for number in (0, 1):
        os.utime(out / f"case_{number:05d}_x.npy")
    flip_byte(out / "case_00001_x.npy", 5000)
    assert to_hash(out) == ["case_00000_x.npy", "case_00001_x.npy"]
    assert verify(out) == 1
    assert to_hash(out) == ["case_00001_x.npy"]


def test_verify_lists_different_and_missing_files(copy: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, out = copy
    flip_byte(out / "case_00001_x.npy", 5000)
    (out / "case_00002_y.npy").unlink()
    assert verify(out) == 1
    output = capsys.readouterr().out
    digest = hashlib.md5((out / "case_00001_x.npy").read_bytes()).hexdigest()
    assert f"case_00001_x.npy: DIFFERENT from dataset.json ({digest}, expected " in output
    assert "case_00002_y.npy: MISSING (dataset.json lists it)" in output
    assert "dataset.json: 4 identical, 1 different, 1 missing" in output
    assert output.count("DIFFERENT") == output.count("MISSING") == 1


def test_verify_compares_with_published_checksums(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digests = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in done.glob("*.npy")}
    checksums = tmp_path / "checksum.json"
    checksums.write_text(json.dumps(digests))
    assert verify(done, "--checksums", checksums) == 0
    assert "checksum.json: 6 identical, 0 different, 0 missing" in capsys.readouterr().out
    checksums.write_text(json.dumps({**digests, "case_00000_y.npy": "0" * 32, "case_00209_x.npy": "0" * 32}))
    assert verify(done, "--checksums", checksums) == 1
    output = capsys.readouterr().out
    assert (
        f"case_00000_y.npy: DIFFERENT from checksum.json ({digests['case_00000_y.npy']}, expected {'0' * 32})" in output
    )
    assert "case_00209_x.npy: MISSING (checksum.json lists it)" in output
    assert "checksum.json: 5 identical, 1 different, 1 missing" in output


def test_verify_opens_a_folder_of_the_reference(copy: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, out = copy
    (out / INDEX_NAME).unlink()
    assert verify(out) == 0
    assert capsys.readouterr().out.startswith("6 files: MLPerf's fingerprints are those of KiTS19's 420")


def test_a_fingerprint_is_the_sha_256_of_sorted_lines() -> None:
    lines = b"11  a_x.npy\n00  a_y.npy\n22  b_x.npy\n"
    digests = {"b_x.npy": "22", "a_x.npy": "11", "a_y.npy": "00"}
    assert fingerprint(digests) == hashlib.sha256(lines).hexdigest()


def test_the_whole_set_is_compared_with_mlperfs_fingerprints(
    done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verification.MLPERF_CASES == 210
    assert verification.MLPERF_FINGERPRINTS == {
        "whole set": ("xy", "e7c2853b7ae3dee118170eff39211ffae5a173c95198f31e309c47dcc843abb5"),
        "images": ("x", "8ffb9335306084bc961dc60e200c883483dcc74928ea2169cbae617bbc397934"),
        "labels": ("y", "0d9b03e033b3914ceeb8d4662f6e5127785c7525a4dd9f327b58ed73f3e4402e"),
    }
    monkeypatch.setattr(verification, "MLPERF_CASES", len(IDS))
    assert verify(done) == 1
    assert capsys.readouterr().out.count("DIFFERENT") == 3

    def expected(kinds: str) -> tuple[str, str]:
        names = sorted(f"case_{number:05d}_{kind}.npy" for number in IDS for kind in kinds)
        lines = [f"{hashlib.md5((done / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
        return kinds, hashlib.sha256("".join(lines).encode()).hexdigest()

    ours = {"whole set": expected("xy"), "images": expected("x"), "labels": expected("y")}
    monkeypatch.setattr(verification, "MLPERF_FINGERPRINTS", ours)
    assert verify(done) == 0
    output = capsys.readouterr().out
    assert [f"MLPerf's {what}: identical" in output for what in ours] == [True] * 3


# Bad input: one line on stderr and exit status 2.


class Raw:
    """A synthetic data set to damage; `arguments` is the command line that reads it."""

    def __init__(self, root: Path, layout: str, data: Path) -> None:
        self.root, self.data, self.out = root, data, root / "out"
        self.arguments: list[object] = ["--data_dir", data, "--results_dir", self.out, "--dataset", layout]

    def scan(self, kind: str) -> Path:
        return self.data / {"image": "imagesTr", "label": "labelsTr"}[kind] / "scan_1.nii.gz"

    def change(self, kind: str, change: Callable[[nib.Nifti1Image], nib.Nifti1Image]) -> None:
        nib.save(change(nib.load(self.scan(kind))), self.scan(kind))

    def values(self, kind: str, value: float) -> None:
        """Writes one value into a scan, which becomes float32."""
        array = np.asarray(nib.load(self.scan(kind)).dataobj, dtype=F32).copy()
        array[1, 2, 3] = value
        self.change(kind, lambda scan: nib.Nifti1Image(array, scan.affine))

    def cases(self, **first: str) -> None:
        path = self.data / "dataset.json"
        content = json.loads(path.read_text())
        content["training"][0].update(first)
        path.write_text(json.dumps(content))


def other_grid(scan: nib.Nifti1Image, shape: int = 0, shift_mm: float = 0.0, scale: float = 1.0) -> nib.Nifti1Image:
    array = np.asarray(scan.dataobj)
    affine = scan.affine.copy()
    affine[1, 3] += shift_mm
    affine[2, 2] *= scale
    return nib.Nifti1Image(np.pad(array, [(0, 0), (0, shape), (0, 0)]), affine)


def huge(path: Path) -> None:
    content = bytearray(gzip.decompress(path.read_bytes())[:348])
    content[42:48] = np.array([32767] * 3, "<i2").tobytes()
    path.write_bytes(gzip.compress(bytes(content)))


def below_a_file(raw: Raw) -> None:
    (raw.root / "file").touch()
    raw.arguments[3] = raw.root / "file" / "out"


def a_file(raw: Raw) -> None:
    raw.out.touch()


def replace_argument(raw: Raw, name: str, value: object) -> None:
    raw.arguments[raw.arguments.index(name) + 1] = value


DAMAGED: dict[str, tuple[str, Callable[[Raw], Any], str]] = {
    "no folder": ("msd", lambda raw: replace_argument(raw, "--data_dir", raw.root / "none"), "none: no such folder"),
    "no data_dir": ("msd", lambda raw: raw.arguments.__delitem__(slice(0, 2)), "--data_dir None: no such folder"),
    "msd: too high": ("msd", lambda raw: replace_argument(raw, "--data_dir", raw.root), "did you mean {data}?"),
    "msd: too low": (
        "msd",
        lambda raw: replace_argument(raw, "--data_dir", raw.data / "imagesTr"),
        "did you mean {data}?",
    ),
    "kits19: too high": ("kits19", lambda raw: replace_argument(raw, "--data_dir", raw.root), "did you mean {data}?"),
    "kits19: too low": (
        "kits19",
        lambda raw: replace_argument(raw, "--data_dir", raw.data / "case_00000"),
        "did you mean its parent {data}?",
    ),
    "kits19 as msd": ("kits19", lambda raw: replace_argument(raw, "--dataset", "msd"), "use --dataset kits19"),
    "msd as kits19": ("msd", lambda raw: replace_argument(raw, "--dataset", "kits19"), "use --dataset msd"),
    "no cases": ("kits19", lambda raw: shutil.rmtree(raw.data / "case_00000"), "no case_00000 … in it"),
    "no mask": (
        "kits19",
        lambda raw: (raw.data / "case_00000" / "segmentation.nii.gz").unlink(),
        "case_00000: its mask",
    ),
    "no image": ("kits19", lambda raw: (raw.data / "case_00000" / "imaging.nii.gz").unlink(), "case_00000: its image"),
    "msd: no mask": ("msd", lambda raw: raw.scan("label").unlink(), "scan_1: its mask"),
    "no list": ("msd", lambda raw: (raw.data / "dataset.json").unlink(), "no dataset.json in it"),
    "damaged list": ("msd", lambda raw: (raw.data / "dataset.json").write_text("{"), "not a Decathlon dataset.json"),
    "a path outside": ("msd", lambda raw: raw.cases(image="../x.nii.gz"), "'../x.nii.gz' is outside the data folder"),
    "an absolute path": ("msd", lambda raw: raw.cases(label="/etc/hostname"), "is outside the data folder"),
    "shapes differ": (
        "msd",
        lambda raw: raw.change("label", lambda scan: other_grid(scan, shape=1)),
        "scan_1: the image has shape (8, 10, 10) but its mask (8, 11, 10)",
    ),
    "origins differ": (
        "msd",
        lambda raw: raw.change("label", lambda scan: other_grid(scan, shift_mm=0.5)),
        "scan_1: the affines of image and mask differ by 0.5 mm at the origin",
    ),
    "spacings differ": (
        "msd",
        lambda raw: raw.change("image", lambda scan: other_grid(scan, scale=1.5)),
        "scan_1: the affines of image and mask differ by 0.5 mm at axis 2",
    ),
    "damaged image": ("msd", lambda raw: flip_byte(raw.scan("image"), 2000), "imagesTr/scan_1.nii.gz: damaged"),
    "damaged mask": ("msd", lambda raw: flip_byte(raw.scan("label"), -5), "labelsTr/scan_1.nii.gz: damaged"),
    "huge header": ("msd", lambda raw: huge(raw.scan("image")), "claims (32767, 32767, 32767) voxels"),
    "empty image": ("msd", lambda raw: raw.scan("image").write_bytes(b""), "scan_1.nii.gz: not a NIfTI-1 file"),
    "NaN in the image": ("msd", lambda raw: raw.values("image", np.nan), "the scan holds NaN or infinity"),
    "infinity in the image": ("msd", lambda raw: raw.values("image", np.inf), "the scan holds NaN or infinity"),
    "NaN in the mask": ("msd", lambda raw: raw.values("label", np.nan), "the mask holds NaN or infinity"),
    "half a class": ("msd", lambda raw: raw.values("label", 0.5), "a mask must hold whole numbers"),
    "a class too many": ("msd", lambda raw: raw.values("label", 3), "scan_1.nii.gz: label 3, but the classes end at 2"),
    "another modality": (
        "msd",
        lambda raw: raw.change("image", lambda scan: nib.Nifti1Image(np.zeros((8, 10, 10, 2), F32), scan.affine)),
        "scan_1: expected 1 image channel(s) and 1 of the mask, found 2 and 1",
    ),
    "results below a file": ("msd", below_a_file, "file/out: cannot be written: Not a directory"),
    "results in a file": ("msd", a_file, "out: cannot be written: File exists"),
    "results in the data": (
        "msd",
        lambda raw: replace_argument(raw, "--results_dir", raw.data / "imagesTr" / ".."),
        "is the folder of the raw scans; choose another folder",
    ),
    "no workers": ("msd", lambda raw: raw.arguments.extend(["--num_workers", "0"]), "--num_workers must be at least 1"),
    "negative seed": ("msd", lambda raw: raw.arguments.extend(["--seed", "-1"]), "--seed at least 0"),
    "no such data set": (
        "msd",
        lambda raw: replace_argument(raw, "--dataset", "kist19"),
        "--dataset 'kist19': unknown data set; available: kits19",
    ),
    "a flag of another data set": (
        "msd",
        lambda raw: raw.arguments.extend(["--slices_per_case", "5"]),
        "--slices_per_case does not apply to --dataset msd, which accepts --drop_empty, --foreground_crop, "
        "--intensity, --intensity_window, --labels, --orientation, --spacing, --split_ratios",
    ),
    "no number": (
        "msd",
        lambda raw: raw.arguments.extend(["--intensity_window", "low", "9"]),
        "invalid float value: 'low'",
    ),
    "no shares": (
        "msd",
        lambda raw: raw.arguments.extend(["--split_ratios", "0.5", "0.6"]),
        "two or three ratios that add up",
    ),
    "too few for three": (
        "msd",
        lambda raw: raw.arguments.extend(["--split_ratios", "0.6", "0.2", "0.2"]),
        "2 patient(s) leave none for evaluation at a ratio of 0.2",
    ),
    "a label too many": (
        "msd",
        lambda raw: raw.arguments.extend(["--labels", "7=1"]),
        "--labels 7=1: 7 is not a label from 0 to 2",
    ),
    "nothing to verify": ("msd", lambda raw: raw.arguments.extend(["--mode", "verify"]), "no preprocessed cases in it"),
}


@pytest.fixture
def damage(tmp_path: Path, write_msd: WriteRaw, write_kits19: WriteRaw) -> Callable[[str], tuple[Raw, str]]:
    """Makes a damaged data set; returns it with the expected message."""

    def make(how: str) -> tuple[Raw, str]:
        layout, change, message = DAMAGED[how]
        data = tmp_path / "raw" / "data"
        raw = Raw(tmp_path / "raw", layout, write_msd(data, 2) if layout == "msd" else write_kits19(data, [0]))
        change(raw)
        return raw, message.replace("{data}", str(data))

    return make


def assert_refused(status: int, stderr: str, message: str) -> None:
    assert (status, stderr.count("\n")) == (2, 1), stderr
    assert stderr.startswith("preprocess_dataset.py: error: ")
    assert message in stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize("how", DAMAGED)
def test_bad_input_is_reported_in_one_line_with_status_2(
    how: str, damage: Callable[[str], tuple[Raw, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    raw, message = damage(how)
    arguments = list(map(str, ["--num_workers", 1, *raw.arguments]))
    status = run_program(lambda: main(arguments), PROGRAM)
    assert_refused(status, capsys.readouterr().err, message)
    assert not (raw.out / INDEX_NAME).exists()


@pytest.mark.integration
@pytest.mark.parametrize(("how", "workers"), [("damaged image", 2), ("huge header", 1), ("kits19: too low", 1)])
def test_the_process_reports_it_too(
    how: str, workers: int, damage: Callable[[str], tuple[Raw, str]], run_python: RunPython
) -> None:
    raw, message = damage(how)
    ran = run_python(PROGRAM, *raw.arguments, "--num_workers", workers)
    assert_refused(ran.returncode, ran.stderr, message)


def test_results_in_the_data_folder_leave_the_data_alone(damage: Callable[[str], tuple[Raw, str]]) -> None:
    raw, _ = damage("results in the data")
    before = (raw.data / "dataset.json").read_bytes()
    with pytest.raises(UserError, match="choose another folder"):
        main(list(map(str, raw.arguments)))
    assert (raw.data / "dataset.json").read_bytes() == before


@pytest.mark.parametrize("content", [None, "", "[]", "[1]", "x"])
def test_bad_checksum_files_are_reported_in_one_line(done: Path, tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "checksum.json").write_text(content)
    with pytest.raises(UserError, match=r"--checksums .*checksum\.json: not a JSON file of"):
        verify(done, "--checksums", tmp_path / "checksum.json")


def test_verify_refuses_a_damaged_index(copy: tuple[Path, Path]) -> None:
    _, out = copy
    (out / INDEX_NAME).write_text("{")
    with pytest.raises(UserError, match=r"dataset\.json: damaged"):
        verify(out)


def test_unlabelled_cases_are_not_preprocessed(raw: Path) -> None:
    # 210 and above have no masks; they are neither preprocessed nor reported as missing.
    assert (raw / "case_00210" / "imaging.nii.gz").exists()
    assert [case.case for case in read_kits19(raw, ReaderOptions(), []).cases] == [
        f"case_{number:05d}" for number in IDS
    ]


def test_every_reader_is_found_by_name() -> None:
    assert preprocess_dataset.find_reader("kits19") is read_kits19
    assert preprocess_dataset.find_reader("msd") is read_msd


def test_old_spellings_of_flags_give_the_same_folder(
    tmp_path: Path, write_msd: WriteRaw, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = write_msd(tmp_path / "raw", 5)
    old = "--split 0.6 0.2 0.2 --window 0 9 --intensity unit"
    new = "--split_ratios 0.6 0.2 0.2 --intensity_window 0 9 --intensity minmax"
    preprocess(raw, tmp_path / "new", "--dataset", "msd", *new.split())
    assert capsys.readouterr().err == ""
    preprocess(raw, tmp_path / "old", "--dataset", "msd", *old.split())
    pairs = [
        ("--split", "--split_ratios"),
        ("--window", "--intensity_window"),
        ("--intensity unit", "--intensity minmax"),
    ]
    ending = "; the old spelling will be removed in 0.3"
    assert capsys.readouterr().err.splitlines() == [f"warning: {a} is now {b}{ending}" for a, b in pairs]
    assert contents(tmp_path / "old") == contents(tmp_path / "new")


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
