"""preprocess_dataset.py --mode verify."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from data_loading import mlperf_md5, verification
from data_loading.index import INDEX_NAME, PARTIAL_INDEX_NAME
from data_loading.integrity import VERIFIED_NAME, file_md5, fingerprint
from data_loading.mlperf_md5 import DOUBTFUL_CASES
from tests.data_loading.preprocess.program import flip_byte, to_hash, verify


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


def test_verify_of_an_interrupted_folder_compares_and_fails(
    copy: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, out = copy
    (out / INDEX_NAME).rename(out / PARTIAL_INDEX_NAME)
    assert verify(out) == 1
    assert "preprocessing was interrupted; run it again" in capsys.readouterr().out
    name = min(file.name for file in out.glob("*_x.npy"))
    flip_byte(out / name)
    assert verify(out) == 1
    assert f"{name}: DIFFERENT from {PARTIAL_INDEX_NAME}" in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_verify_does_not_wait_for_a_pipe(copy: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, out = copy
    pipe = min(out.glob("*_x.npy"))
    pipe.unlink()
    os.mkfifo(pipe)
    assert verify(out) == 1
    assert f"{pipe.name}: MISSING" in capsys.readouterr().out


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
    assert capsys.readouterr().out.startswith("6 files: not compared with MLPerf's MD5s of KiTS19; these are other")


def test_a_fingerprint_is_the_sha_256_of_sorted_lines() -> None:
    lines = b"11  a_x.npy\n00  a_y.npy\n22  b_x.npy\n"
    digests = {"b_x.npy": "22", "a_x.npy": "11", "a_y.npy": "00"}
    assert fingerprint(digests) == hashlib.sha256(lines).hexdigest()


# Verification against MLPerf's list


@pytest.fixture
def published(copy: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, str]]:
    """A preprocessed folder, and a list in place of MLPerf's that has its MD5s; its second case has the id 43."""
    _, out = copy
    (out / INDEX_NAME).unlink()
    for kind in "xy":
        (out / f"case_00001_{kind}.npy").rename(out / f"case_00043_{kind}.npy")
        (out / f"case_00002_{kind}.npy").rename(out / f"case_00068_{kind}.npy")
    digests = {path.name: file_md5(path) for path in sorted(out.glob("*.npy"))}
    monkeypatch.setattr(mlperf_md5, "published_md5", lambda: digests)
    monkeypatch.setattr(verification, "published_md5", lambda: digests)
    return out, digests


def verified(out: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    capsys.readouterr()
    status = verify(out)
    return status, capsys.readouterr().out.splitlines()


def test_mlperfs_files_are_identical_without_a_flag_and_doubtful_cases_are_marked(
    published: tuple[Path, dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    doubtful = f"case_00068: doubtful ({DOUBTFUL_CASES['case_00068']})"
    assert verified(published[0], capsys) == (0, [doubtful, "MLPerf's list: 6 identical, 0 different"])


def test_one_wrong_file_is_named(published: tuple[Path, dict[str, str]], capsys: pytest.CaptureFixture[str]) -> None:
    out, digests = published
    name = "case_00000_x.npy"
    flip_byte(out / name, 5000)
    status, lines = verified(out, capsys)
    assert status == 1
    assert lines[0] == f"{name}: DIFFERENT from MLPerf's list ({file_md5(out / name)}, expected {digests[name]})"
    assert lines[-1] == "MLPerf's list: 5 identical, 1 different"


def test_the_scan_of_case_43_is_known_to_differ(
    published: tuple[Path, dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, digests = published
    name = "case_00043_x.npy"
    flip_byte(out / name, 5000)
    status, lines = verified(out, capsys)
    assert status == 0
    assert lines[0].startswith(f"{name}: MD5 {file_md5(out / name)}, not MLPerf's {digests[name]}. Known: ")
    assert "issue 545" in lines[0]
    assert lines[-1] == "MLPerf's list: 5 identical, 0 different, 1 with a known difference"
    # With another mask it is not the case that others have reported.
    flip_byte(out / "case_00043_y.npy", 5000)
    status, lines = verified(out, capsys)
    assert (status, lines[-1]) == (1, "MLPerf's list: 4 identical, 2 different")


def test_masks_of_kits23_are_named(published: tuple[Path, dict[str, str]], capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = published
    masks = sorted(out.glob("*_y.npy"))
    for path in masks:
        mask = np.load(path)
        mask[0, 0, 0, 0] = 1 - mask[0, 0, 0, 0]
        np.save(path, mask)
    status, lines = verified(out, capsys)
    assert status == 1
    assert "3 masks differ, while 3 scans are MLPerf's: most likely masks of KiTS21 or KiTS23" in "\n".join(lines)
    mask[0, 0, 0, 0] = 3
    np.save(masks[1], mask)
    lines = verified(out, capsys)[1]
    assert f"{masks[1].name} has label 3, a cyst: masks of KiTS21 or KiTS23, not of KiTS19; fetch" in "\n".join(lines)


def test_a_part_of_kits19_is_in_order(
    published: tuple[Path, dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = published
    (out / "case_00068_x.npy").unlink()
    assert verified(out, capsys)[1][-1] == "MLPerf's list: 5 identical, 0 different, 1 of 420 not here"
    assert verify(out) == 0


def test_420_files_of_which_none_is_mlperfs_are_not_kits19(
    published: tuple[Path, dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, digests = published
    digests.update(dict.fromkeys(digests, "0" * 32))
    status, (line,) = verified(out, capsys)
    assert (status, line.split(";")[0]) == (1, "6 files: none has its MD5 of MLPerf's list")


def test_the_shipped_list_is_mlperfs() -> None:
    digests = mlperf_md5.published_md5()
    assert len(digests) == 2 * mlperf_md5.MLPERF_CASES == 420
    assert fingerprint(digests) == mlperf_md5.MLPERF_FINGERPRINT
    assert mlperf_md5.MLPERF_FINGERPRINT == "e7c2853b7ae3dee118170eff39211ffae5a173c95198f31e309c47dcc843abb5"


@pytest.mark.parametrize("content", [None, "", "[]", "[1]", "x"])
def test_bad_checksum_files_are_reported_in_one_line(done: Path, tmp_path: Path, content: str | None) -> None:
    reason = "cannot be read: No such file or directory"
    if content is not None:
        (tmp_path / "checksum.json").write_text(content)
        reason = "not a JSON file of {name: MD5}"
    with pytest.raises(UserError, match=rf"--checksums .*checksum\.json: {re.escape(reason)}$"):
        verify(done, "--checksums", tmp_path / "checksum.json")


def test_verify_refuses_a_damaged_index(copy: tuple[Path, Path]) -> None:
    _, out = copy
    (out / INDEX_NAME).write_text("{")
    with pytest.raises(UserError, match=r"dataset\.json: damaged, or written by another program; preprocess again$"):
        verify(out)
