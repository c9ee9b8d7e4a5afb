"""The peers suite: both ways train on the same cases and are scored by the same function."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.harness import Options
from common.errors import UserError

pytest.importorskip("monai", reason="pip install '.[monai]'")
from benchmarks import monai_peer, peers

CPU = torch.device("cpu")


@pytest.fixture
def data_dir(tmp_path: Path, write_preprocessed: Callable[..., Path]) -> Path:
    """Ten cases whose classes are read off the voxels."""
    rng = np.random.default_rng(0)
    cases = {}
    for number in range(10):
        image = rng.normal(size=(1, 18, 16, 16)).astype(np.float32)
        cases[f"case_{number:05d}"] = image, (image > 0.3).astype(np.uint8) + (image > 1)
    return write_preprocessed(tmp_path / "data", cases)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.args"
    path.write_text("--model 'unet3d(filters=(4,8))' --input_shape 16 16 16 --val_input_shape 16 16 16 --batch_size 2")
    return path


def test_one_row_per_seed_and_their_medians(data_dir: Path, recipe: Path, tmp_path: Path) -> None:
    options = Options(device=CPU, quick=True, work_dir=tmp_path, data_dir=data_dir, recipe=recipe)
    (table,) = peers.run(options)
    assert [row[0] for row in table.rows] == ["0", "median"]
    _, minutes, ours, theirs, difference, steps = table.rows[0]
    assert minutes > 0
    assert 0 <= theirs <= 1
    assert 0 <= ours <= 1
    assert difference == pytest.approx(ours - theirs)
    assert steps >= 1


def test_monai_learns_and_is_scored_whole(data_dir: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine of any speed: its clock is a count of steps here."""
    calls = itertools.count()
    monkeypatch.setattr(monai_peer, "time", SimpleNamespace(perf_counter=lambda: (next(calls) + 1) // 2))
    before, few = monai_peer.train_and_score(data_dir, recipe, seconds=0.0, seed=3)
    after, steps = monai_peer.train_and_score(data_dir, recipe, seconds=120.0, seed=3)
    assert (few, steps) == (5, 120)
    assert after > before + 0.05


def test_without_monai_one_line_says_what_to_install(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "benchmarks.monai_peer")
    monkeypatch.setitem(sys.modules, "monai.data.dataloader", None)
    with pytest.raises(UserError, match=r"--suite peers: .*pip install '\.\[monai\]'"):
        peers.run(Options(device=CPU, quick=True, work_dir=tmp_path, data_dir=data_dir))


def test_a_run_that_is_killed_without_a_word(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object, env: dict[str, str], **__: object) -> subprocess.CompletedProcess[str]:
        assert env["CUDA_VISIBLE_DEVICES"] == ""
        assert "RANK" not in env
        return subprocess.CompletedProcess([], -9, "", "")

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(subprocess, "run", killed)
    with pytest.raises(UserError, match="exited with -9: no output"):
        peers.run(Options(device=CPU, quick=True, work_dir=tmp_path, data_dir=data_dir))


def test_pairs_before_a_failed_one_are_kept(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train_recipe(_: Options, seed: int) -> tuple[float, int, float]:
        if seed == 1:
            raise UserError("exited with -9")
        return 0.75, 8, 60.0

    monkeypatch.setattr(peers, "train_recipe", train_recipe)
    monkeypatch.setattr(monai_peer, "train_and_score", lambda *_: (0.5, 100))
    (table,) = peers.run(Options(device=CPU, quick=False, work_dir=tmp_path, data_dir=data_dir))
    assert table.rows == [["0", 1.0, 0.75, 0.5, 0.25, 100], ["median", 1.0, 0.75, 0.5, 0.25, 100]]
    assert table.problem == "seed 1: exited with -9"


def test_without_a_data_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--suite peers needs --data_dir, a preprocessed folder"):
        peers.run(Options(device=CPU, quick=True, work_dir=tmp_path))
