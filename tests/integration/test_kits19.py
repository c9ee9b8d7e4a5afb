"""KiTS19 from a server to verified volumes: download, preprocess, verify."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import preprocess_dataset
from common.errors import UserError
from data_loading import download_kits19, http_download, mlperf_md5, verification
from data_loading.integrity import file_md5
from tests.data_loading.http_server import Answer, serve

CASES = (0, 1, 43)


def run(results: Path, *more: object) -> int:
    return preprocess_dataset.main(["--results_dir", str(results), "--num_workers", "1", *map(str, more)])


def test_download_preprocess_verify(
    tmp_path: Path,
    write_kits19: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = write_kits19(tmp_path / "source", CASES)
    raw, data, plain = tmp_path / "raw", tmp_path / "data", tmp_path / "plain"
    files = {f"/{path.relative_to(source).as_posix()}": path.read_bytes() for path in source.rglob("*.nii.gz")}
    assert run(plain, "--data_dir", source) == 0
    published = {path.name: file_md5(path) for path in sorted(plain.glob("*.npy"))}
    for module in (mlperf_md5, verification):
        monkeypatch.setattr(module, "published_md5", lambda: published)
    monkeypatch.setattr(http_download, "FIRST_WAIT_S", 0.0)

    download = ["--results_dir", str(raw), "--accept_licence", "--cases", *map(str, CASES), "--mirror"]
    with serve(files) as server:
        # Every file at first breaks off in another way; one then does not exist.
        first = (Answer(cut=100), Answer(status=429), Answer(status=500), Answer(flip=150), Answer(length=10**6))
        server.behave = lambda path, n: Answer() if n > 1 else first[sorted(files).index(path) % len(first)]
        missing = server.files.pop("/case_00043/imaging.nii.gz")
        with pytest.raises(UserError, match=r"case_00043/imaging\.nii\.gz: the server answers 404 Not Found; run the"):
            download_kits19.main([*download, server.url])
        # Preprocessing names what the download has not brought.
        with pytest.raises(UserError, match=r"case_00043: its image .*imaging\.nii\.gz is missing"):
            run(data, "--data_dir", raw)
        server.files["/case_00043/imaging.nii.gz"] = missing
        assert download_kits19.main([*download, server.url]) == 0
        sent = server.sent
        assert download_kits19.main([*download, server.url]) == 0
        assert server.sent == sent
    assert {f"/{path.relative_to(raw).as_posix()}": path.read_bytes() for path in raw.rglob("*.nii.gz")} == files

    assert run(data, "--data_dir", raw) == 0
    capsys.readouterr()
    assert run(data, "--mode", "verify") == 0
    assert capsys.readouterr().out.splitlines() == [
        "dataset.json: 6 identical, 0 different, 0 missing",
        "MLPerf's list: 6 identical, 0 different",
    ]
    # Today's scan of case 43 is another than MLPerf's; a damaged file is found in dataset.json as well.
    published["case_00043_x.npy"] = "0" * 32
    assert run(data, "--mode", "verify") == 0
    assert capsys.readouterr().out.endswith("MLPerf's list: 5 identical, 0 different, 1 with a known difference\n")
    changed = bytearray((data / "case_00001_y.npy").read_bytes())
    changed[-1] ^= 1
    (data / "case_00001_y.npy").write_bytes(changed)
    assert run(data, "--mode", "verify") == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" (")[0] for line in lines if "DIFFERENT" in line] == [
        "case_00001_y.npy: DIFFERENT from dataset.json",
        "case_00001_y.npy: DIFFERENT from MLPerf's list",
    ]
    assert json.loads((raw / download_kits19.MANIFEST_NAME).read_text())["files"].keys() == {
        name.removeprefix("/") for name in files
    }
