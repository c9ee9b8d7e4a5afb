"""preprocess_dataset.py --mode verify."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from common.errors import UserError
from data_loading import verification
from data_loading.index import INDEX_NAME
from data_loading.integrity import VERIFIED_NAME, fingerprint
from tests.data_loading.preprocess.program import (
    IDS,
    flip_byte,
    to_hash,
    verify,
)


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
    assert capsys.readouterr().out.startswith(
        "6 files: not compared with MLPerf's fingerprints, which cover KiTS19's 420"
    )


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
