"""The preprocess suite: its synthetic scans, the measured run, and its tables."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch

from benchmarks.harness import Options
from benchmarks.preprocess import largest_case_bytes, preprocess_once, run, write_scans
from common.errors import UserError
from data_loading.io.volume import read_geometry
from data_loading.readers.base import ReaderOptions
from data_loading.readers.kits19 import read_kits19

SHAPE = (16, 20, 24)


def test_scans_repeat_a_few_phantoms_in_the_layout_of_kits19(tmp_path: Path) -> None:
    write_scans(tmp_path, 5, 2, SHAPE)
    cases = read_kits19(tmp_path, ReaderOptions(), []).cases
    assert [raw.case for raw in cases] == [f"case_{number:05d}" for number in range(5)]
    assert all(read_geometry(raw.image).shape == SHAPE for raw in cases)
    content = [raw.image.read_bytes() for raw in cases]
    assert content[0] == content[2] == content[4] != content[1] == content[3]
    assert os.path.samefile(cases[1].label, cases[3].label)


def test_a_case_in_memory_is_its_float32_and_its_mask() -> None:
    assert largest_case_bytes((2, 3, 4)) == 24 * 5


def test_the_suite_measures_one_core_all_cores_and_memory(tmp_path: Path) -> None:
    compared, rates, memory = run(Options(device=torch.device("cpu"), quick=True, work_dir=tmp_path, num_workers=1))
    assert compared.problem == "", "the reference's way and this project write the same bytes"
    assert [row[0] for row in compared.rows][:2] == [
        "the reference's way, 1 process",
        "this project, 1 process(es), zlib",
    ]
    assert [compared.rows[0][column] for column in (2, 3, 5)] == [1.0, 1.0, 1.0]
    for row in compared.rows:
        assert all(math.isfinite(cell) and cell > 0 for cell in row[1:])
    _, seconds, ratio, *_ = compared.rows[1]
    assert seconds * ratio == pytest.approx(compared.rows[0][1]), "of one pair"
    names = ["1 process, 1 thread", "1 process, torch's own threads", "1 process(es)"]
    assert [row[0] for row in rates.rows] == names
    assert rates.rows[0][3] == 1.0
    for row in rates.rows:
        assert len(row) == len(rates.columns)
        assert all(math.isfinite(cell) and cell > 0 for cell in row[1:])
        assert row[1] * row[2] == pytest.approx(2)  # of 2 cases
    assert [row[0] for row in memory.rows] == ["1 process, 1 case", "1 process, 2 cases", "1 process(es), 2 cases"]
    for _, base, peak, share in memory.rows:
        # Every volume is padded to 128 x 128 x 128, which is a lower bound of the memory beyond Python and torch.
        assert peak > base + 5 * 128**3 / 1e6
        assert share == pytest.approx((peak - base) * 1e6 / largest_case_bytes((16, 24, 24)))
    assert not (tmp_path / "results").exists(), "the next run must start in a fresh folder"


def test_a_failed_run_is_one_line_and_leaves_no_files(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import sys\nprint('on the way', file=sys.stderr)\nsys.exit('no space left')")
    (tmp_path / "results").mkdir()
    with pytest.raises(UserError, match=r"^preprocessing failed: no space left$"):
        preprocess_once(program, tmp_path / "raw", tmp_path / "results", 1, 1)
    assert not (tmp_path / "results").exists()
