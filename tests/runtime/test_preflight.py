"""Pre-flight: each check distinguishes a machine with enough resources from one without; the table lists both."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.memory import free_memory_bytes
from data_loading.base_loader import LoaderConfig
from data_loading.dataset import case_file, load_boxes
from data_loading.index import INDEX_NAME, read_index, write_json
from data_loading.integrity import file_md5
from data_loading.io.volume import Geometry
from data_loading.preprocessing import GridTransform
from data_loading.pytorch_loader import CropDataset
from model.unet3d import Unet3d
from runtime import memory_checks
from runtime.check_table import Check, failures, format_table
from runtime.demand import Demand, NetworkMemory
from runtime.evaluation import SlidingWindowConfig
from runtime.memory import BatchMemory
from runtime.optimizer import make_optimizer
from runtime.preflight import (
    check_data,
    check_disk,
    check_open_files,
    check_page_cache,
    check_restarts,
    check_shared_memory,
    checkpoint_bytes,
    run_checks,
)

CPU = torch.device("cpu")
GIB = 2**30
CASES = ["a", "b", "c"]
SHAPE = (20, 24, 16)
SCORING = SlidingWindowConfig(
    window=(16, 16, 16), overlap=0.5, batch_size=1, classes=3, padding_value=None, crops_remainder=False
)
DEMAND = Demand(
    data_dir=None,
    training=CASES[1:],
    evaluation=CASES[:1],
    loader="pytorch",
    workers=2,
    batch_size=2,
    patch=(8, 8, 8),
    channels=1,
    scoring=SCORING,
    network=NetworkMemory(step=BatchMemory(((0, 10_000),)), windows=BatchMemory(((0, 9_000),)), state_bytes=500),
    batches=100,
    prewarms=True,
    checkpoint_dir=Path("/nowhere/yet"),
    checkpoints=1,
    checkpoint_bytes=1000,
)


@pytest.fixture
def folder(tmp_path: Path, write_preprocessed: Callable[..., Path]) -> Path:
    """Three cases, the first for evaluation, with their digests and no stamps."""
    cases = {case: (np.zeros((1, *SHAPE)), np.zeros((1, *SHAPE))) for case in CASES}
    folder = write_preprocessed(tmp_path / "data", cases)
    index = read_index(folder / INDEX_NAME)
    for case, record in index.cases.items():
        digests = {kind: file_md5(case_file(folder, case, kind)) for kind in "xy"}
        index.cases[case] = replace(record, digests=digests)
    write_json(folder / INDEX_NAME, index.to_json())
    return folder


def stamp(folder: Path) -> None:
    """Records every file's stamp, as preprocessing does."""
    index = read_index(folder / INDEX_NAME)
    for case, record in index.cases.items():
        statuses = {kind: case_file(folder, case, kind).stat() for kind in "xy"}
        stamps = {kind: [status.st_size, status.st_mtime_ns] for kind, status in statuses.items()}
        index.cases[case] = replace(record, stamps=stamps)
    write_json(folder / INDEX_NAME, index.to_json())


# Each check.


def test_data_reports_how_much_must_be_hashed(folder: Path) -> None:
    check, files = check_data(folder, CASES)
    assert (check.verdict, files is not None) == ("warn", True)
    assert (
        "3 cases, 113 KiB; 6 file(s) copied or changed since preprocessing, 113 KiB to hash while timed" in check.found
    )
    assert "--mode verify" in check.remedy
    stamp(folder)
    check, _ = check_data(folder, CASES)
    assert check == Check("data", "3 cases, 113 KiB, unchanged since preprocessing")
    os.utime(folder / "b_y.npy")
    check, _ = check_data(folder, CASES)
    assert (check.verdict, "; 1 file(s) copied or changed since preprocessing, 8 KiB to" in check.found) == (
        "warn",
        True,
    )


def test_data_of_the_reference_has_no_digests(folder: Path) -> None:
    (folder / INDEX_NAME).unlink()
    check, _ = check_data(folder, CASES)
    assert check == Check("data", "3 cases, 113 KiB; 6 file(s) have no recorded MD5")


def test_data_that_is_incomplete_fails_with_what_to_do(folder: Path) -> None:
    (folder / "c_y.npy").unlink()
    check, files = check_data(folder, CASES)
    assert files is None
    assert (check.verdict, check.found) == ("fail", f"{folder / 'c_y.npy'}: missing")
    assert check.remedy.startswith("run preprocess_dataset.py again")


def test_the_page_cache_is_reported_and_never_a_fault() -> None:
    assert check_page_cache(10 * GIB, 10 * GIB) == Check(
        "page cache", "the volumes' 10.0 GiB stay in memory after the first epoch; 10.0 GiB are free"
    )
    check = check_page_cache(10 * GIB + 1, 10 * GIB)
    assert (check.verdict, "are read from the disk in each epoch" in check.found) == ("ok", True)


def test_the_disk_must_have_room_for_one_checkpoint_and_should_for_all(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    assert check_disk(tmp_path, 3, free // 8).verdict == "ok"
    assert check_disk(tmp_path, 3, free // 3).verdict == "warn"
    assert check_disk(tmp_path, 1, free // 3).verdict == "ok"
    check = check_disk(tmp_path / "to" / "be made", 1, 2 * free)
    assert (check.verdict, "make room for" in check.remedy) == ("fail", True)
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize(("name", "settings"), [("sgd", {}), ("sgd", {"momentum": 0.0}), ("adam", {}), ("lamb", {})])
def test_a_checkpoints_size_is_known_before_the_first_step(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    network = Unet3d(1, 3, filters=(16, 32))
    network.register_buffer("statistics", torch.zeros(100_000))
    optimizer = make_optimizer(name, network.parameters(), 0.1, **settings)
    expected = checkpoint_bytes(network, optimizer)
    network(torch.randn(1, 1, 4, 4, 4)).sum().backward()
    optimizer.step()
    state = network.state_dict()
    best = {key: tensor.clone() for key, tensor in state.items()}
    torch.save([state, best, optimizer.state_dict()], tmp_path / "checkpoint")
    assert expected <= (tmp_path / "checkpoint").stat().st_size < 1.1 * expected + 60_000
    assert checkpoint_bytes(network, optimizer) == expected


def test_shared_memory_must_hold_what_the_workers_have_ready(tmp_path: Path) -> None:
    # A folder on a disk stands for /dev/shm, which is one as well.
    free = shutil.disk_usage(tmp_path).free
    batch = free // 40
    assert check_shared_memory(2, 4, batch, tmp_path).verdict == "ok"  # 2 * (2 * 4 + 1) = 18
    check = check_shared_memory(2, 12, batch, tmp_path)  # 50
    assert check.verdict == "fail"
    assert "--ipc=host or --shm-size, or --num_workers 9" in check.remedy
    assert "2 x 12 workers" in check.found
    assert check_shared_memory(1, 1, 2 * free, tmp_path).remedy.endswith("--num_workers 0")
    assert check_shared_memory(8, 8, free, tmp_path / "none").verdict == "ok"


def test_the_limit_of_open_files_counts_maps_and_queue() -> None:
    # Two files of 168 cases; 2 tensors of 2 * 8 + 1 batches and 8 of each worker; 256 of the rest.
    assert check_open_files(168, 8, 336 + 98 + 256).verdict == "ok"
    check = check_open_files(168, 8, 336 + 98 + 255)
    assert (check.verdict, check.remedy) == ("warn", "run `ulimit -n 690` first")
    assert check_open_files(168, 8, 336).verdict == "warn"
    assert check_open_files(168, 8, 335).verdict == "fail"
    assert check_open_files(3, 8, 97).verdict == "fail"
    assert check_open_files(168, 0, 336 + 256).verdict == "ok"
    assert "no limit" in check_open_files(168, 8, -1).found


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files by Linux's /proc")
def test_a_kept_map_does_hold_a_file_open(folder: Path) -> None:
    settings = LoaderConfig(
        patch=(8, 8, 8), oversampling=0.4, batch_size=1, num_workers=0, rank=0, ranks=1, order_seed=1, sample_seed=2
    )
    dataset = CropDataset(folder, CASES, load_boxes(folder, CASES, 3), settings)
    before = len(os.listdir("/proc/self/fd"))
    for epoch in (1, 2):
        for index in range(len(CASES)):
            assert len(dataset[epoch, index]) == 2
    assert len(os.listdir("/proc/self/fd")) == before + 2 * len(CASES)


def test_restarts_on_several_machines_that_reuse_the_store_of_dead_ranks_are_a_warning() -> None:
    machines = {"TORCHELASTIC_MAX_RESTARTS": "3", "GROUP_WORLD_SIZE": "2"}
    (check,) = check_restarts(machines | {"TORCHELASTIC_USE_AGENT_STORE": "False"})
    assert check.verdict == "ok"
    (check,) = check_restarts(machines | {"TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert check.verdict == "warn"
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in check.remedy


@pytest.mark.parametrize(
    "changed",
    [{"TORCHELASTIC_MAX_RESTARTS": "0"}, {"TORCHELASTIC_MAX_RESTARTS": "many"}, {"GROUP_WORLD_SIZE": "1"}],
)
def test_where_no_restart_can_fail_there_is_no_check(changed: dict[str, str]) -> None:
    several = {"TORCHELASTIC_MAX_RESTARTS": "3", "GROUP_WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert check_restarts({}) == []
    assert check_restarts(several | changed) == []


# All of them.


def fly(folder: Path | None, ranks: int = 1, **changed: Any) -> dict[str, Check]:
    checks = run_checks(replace(DEMAND, data_dir=folder, **changed), CPU, ranks, {})
    found = {check.what: check for check in checks}
    assert len(found) == len(checks)
    return found


def test_a_run_from_the_disk_is_asked_everything(folder: Path) -> None:
    stamp(folder)
    checks = fly(folder)
    assert list(checks) == ["data", "page cache", "memory", "evaluation", "disk", "open files", "shared memory"]
    assert {check.verdict for check in checks.values()} == {"ok"}
    assert checks["data"].found.startswith("3 cases")
    assert "up to 286 per process" in checks["open files"].found  # 2 * 2 + 2 * 5 + 2 * 8 + 256
    batch = 2 * 8**3 * 5
    assert f"{5 * batch / 1024:.0f} KiB for the batches of 1 x 2 workers" in checks["shared memory"].found
    assert "shared memory" not in fly(folder, workers=0)
    assert "the largest case" in checks["evaluation"].found
    assert "a batch of 1 window(s) takes" in fly(folder, evaluation=[])["evaluation"].found
    assert "evaluation" not in fly(folder, evaluation=[], prewarms=False)


def test_what_does_not_read_from_the_disk_is_not_asked_about_it(folder: Path) -> None:
    assert list(fly(None, loader="synthetic")) == ["memory", "evaluation", "disk"]
    assert list(fly(folder, loader="device")) == ["data", "page cache", "memory", "evaluation", "disk"]


def test_a_containers_limit_counts_as_the_machines_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = DEMAND.network.state_bytes + 2 * 10_000 + 32 * DEMAND.sample_bytes
    group = tmp_path / "sys/fs/cgroup"
    (tmp_path / "proc/self").mkdir(parents=True)
    group.mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemAvailable: 1048576 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (group / "memory.current").write_text("4096\n")
    monkeypatch.setattr(memory_checks, "free_memory_bytes", lambda: free_memory_bytes(tmp_path))
    (group / "memory.max").write_text("max\n")
    assert fly(None, loader="synthetic")["memory"].verdict == "ok"
    (group / "memory.max").write_text(f"{4096 + step}\n")
    assert fly(None, loader="synthetic")["memory"].verdict == "warn"
    (group / "memory.max").write_text(f"{4096 + step - 1}\n")
    check = fly(None, loader="synthetic")["memory"]
    assert (check.verdict, check.remedy.partition(",")[0]) == ("fail", "use --batch_size 1 or less")


def test_volumes_that_do_not_fit_on_the_device_will_be_read_from_the_disk(folder: Path) -> None:
    assert "shared memory" in fly(folder, loader="device", channels=2**40)


def test_the_shape_is_the_indexs_or_a_cube_of_as_many_voxels(folder: Path) -> None:
    assert "(20, 20, 20)" in fly(folder)["evaluation"].found
    index = read_index(folder / INDEX_NAME)
    transform = GridTransform(
        source=Geometry(np.eye(4), (4, 5, 6), (1.0, 1.0, 1.0)),
        resampled_shape=(4, 5, 6),
        padding_before=(0, 0, 0),
        shape=SHAPE,
    )
    index.cases["a"] = replace(index.cases["a"], transform=transform)
    write_json(folder / INDEX_NAME, index.to_json())
    assert str(SHAPE) in fly(folder)["evaluation"].found


def test_incomplete_data_fails_without_a_traceback(folder: Path) -> None:
    (folder / "a_x.npy").unlink()
    checks = fly(folder)
    assert list(checks) == ["data", "memory", "disk", "open files", "shared memory"]
    assert failures(list(checks.values())).startswith(f"data: {folder / 'a_x.npy'}: missing; run preprocess_dataset.py")


def test_the_table_is_aligned_and_no_wider_than_100() -> None:
    checks = [
        Check("data", "210 cases"),
        Check("shared memory", "word " * 30, "fail", "give it --ipc=host"),
        Check("disk", "little", "warn", "make room"),
    ]
    lines = format_table(checks).splitlines()
    assert lines[0] == "ok    data           210 cases"
    assert lines[1].startswith("fail  shared memory  word word")
    assert lines[2].startswith(" " * 21 + "word")
    assert lines[-2].endswith("--ipc=host")
    assert lines[-1] == "warn  disk           little; make room"
    assert max(map(len, lines)) <= 100
    assert format_table([]) == ""


def test_every_failure_is_in_the_one_line() -> None:
    checks = [
        Check("a", "1"),
        Check("b", "2", "fail", "do 3"),
        Check("c", "4", "warn", "do 5"),
        Check("d", "6", "fail", "7"),
    ]
    assert failures(checks) == "b: 2; do 3 | d: 6; 7"
    assert failures(checks[::2]) == ""
