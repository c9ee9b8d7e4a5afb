"""python3 -m data_loading.download_kits19, from a server on this machine that misbehaves."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import UserError
from data_loading import download_kits19, http_download
from data_loading.download_kits19 import LICENCE, LOCK_NAME, MANIFEST_NAME, exclusive, main
from tests.data_loading.http_server import Answer, Server, misbehaving, serve

ROOT = Path(http_download.__file__).resolve().parents[1]
CASES = (0, 1, 41)


def content(name: str) -> bytes:
    size = 1_000_000 if "imaging" in name else 2_000
    return gzip.compress(random.Random(name).randbytes(size), mtime=0)


FILES = {
    name: content(name)
    for case in CASES
    for name in (f"case_{case:05d}/imaging.nii.gz", f"case_{case:05d}/segmentation.nii.gz")
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(http_download, "FIRST_WAIT_S", 0.0)
    with serve({f"/kits/{name}": body for name, body in FILES.items()}) as running:
        yield running


def arguments(server: Server, folder: Path, *more: str) -> list[str]:
    flags = [
        "--results_dir",
        str(folder),
        "--accept_licence",
        "--mirror",
        f"{server.url}/kits/",
        "--cases",
        "0-1",
        "41",
    ]
    return [*flags, *more]


def assert_complete(folder: Path) -> None:
    """Every file is there, identical by SHA-256, recorded, and nothing else is left."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.*")}
    manifest = json.loads(found.pop(MANIFEST_NAME).read_text())["files"]
    found.pop(LOCK_NAME)
    digests = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items()}
    assert digests == {name: hashlib.sha256(body).hexdigest() for name, body in FILES.items()}
    assert {name: record["sha256"] for name, record in manifest.items()} == digests


def test_all_files_arrive_and_a_second_run_fetches_nothing(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(server, tmp_path / "raw")) == 0
    assert_complete(tmp_path / "raw")
    assert f"6 files in {tmp_path / 'raw'}: 6 fetched (0.00 GB), 0 already there" in capsys.readouterr().out
    sent, requests = server.sent, server.requests.total()
    assert main(arguments(server, tmp_path / "raw")) == 0
    assert (server.sent, server.requests.total()) == (sent, requests) == (sum(map(len, FILES.values())), 6)
    assert "0 fetched (0.00 GB), 6 already there" in capsys.readouterr().out


def test_every_file_arrives_from_a_server_that_fails_in_every_way(server: Server, tmp_path: Path) -> None:
    server.behave = misbehaving(seed=1)
    assert main(arguments(server, tmp_path)) == 0
    assert_complete(tmp_path)
    assert server.requests.total() > len(FILES)


def test_files_of_other_tools_are_kept_and_damaged_ones_are_fetched_again(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(arguments(server, tmp_path))
    (tmp_path / MANIFEST_NAME).write_text("{")
    first, second, *_ = FILES
    (tmp_path / first).write_bytes(b"<html>404</html>")
    server.requests.clear()
    assert main(arguments(server, tmp_path)) == 0
    assert server.requests == {f"/kits/{first}": 1}
    assert_complete(tmp_path)
    assert f"{tmp_path / first}: damaged or changed" in capsys.readouterr().err
    # A whole gzip file, but another one: the manifest notices it by its time, then by its digest.
    (tmp_path / second).write_bytes(gzip.compress(b"a mask of another data set"))
    assert main(arguments(server, tmp_path)) == 0
    assert_complete(tmp_path)


def test_a_missing_file_is_one_line_and_the_others_arrive(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del server.files["/kits/case_00001/imaging.nii.gz"]
    message = f"{server.url}/kits/case_00001/imaging.nii.gz: the server answers 404 Not Found"
    with pytest.raises(UserError, match=f"^{re.escape(message)}; run the same command again"):
        main(arguments(server, tmp_path))
    assert capsys.readouterr().err == f"warning: {message}\n"
    assert len(list(tmp_path.rglob("*.nii.gz"))) == len(FILES) - 1


def test_it_stops_where_every_file_fails(server: Server, tmp_path: Path) -> None:

    def refuse(path: str, n: int) -> Answer:
        time.sleep(0.2 * (server.requests.total() > 3))  # while the fourth waits, the rest is cancelled
        return Answer(status=401)

    server.behave = refuse
    with pytest.raises(UserError, match="401 Unauthorized; stopped after 3 files that failed"):
        main(arguments(server, tmp_path, "--num_workers", "1"))
    assert server.requests.total() <= 4


def test_a_full_disk_is_one_line_and_nothing_is_lost(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = download_kits19.Download._count

    def full(self: object, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download_kits19.Download, "_count", full)
    with pytest.raises(UserError, match=f"^--results_dir {tmp_path}: No space left on device; make room"):
        main(arguments(server, tmp_path))
    monkeypatch.setattr(download_kits19.Download, "_count", count)
    assert main(arguments(server, tmp_path)) == 0
    assert_complete(tmp_path)
    assert server.ranges, "the parts were continued"


def test_a_second_download_into_the_folder_is_refused(server: Server, tmp_path: Path) -> None:
    with exclusive(tmp_path), pytest.raises(UserError, match="another download into it is running"):
        main(arguments(server, tmp_path))
    assert server.requests.total() == 0


def test_the_licence_is_shown_and_must_be_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=re.escape(f"{LICENCE}; give --accept_licence")):
        main(["--results_dir", str(tmp_path / "raw")])
    assert not (tmp_path / "raw").exists()


def test_urls_are_listed_for_another_tool(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list_urls"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 420
    assert rows[0][1] == "case_00000/imaging.nii.gz"
    assert rows[-1][1] == "case_00209/segmentation.nii.gz"
    assert re.fullmatch(
        r"https://huggingface\.co/datasets/neheller/KiTS-Challenge-Imaging/resolve/[0-9a-f]{40}/images/case_00000\.nii\.gz",
        rows[0][0],
    )
    assert re.fullmatch(
        r"https://raw\.githubusercontent\.com/neheller/kits19/[0-9a-f]{40}/data/case_00209/segmentation\.nii\.gz",
        rows[-1][0],
    )
    assert main(["--list_urls", "--cases", "7", "--mirror", "http://host/x/"]) == 0
    assert capsys.readouterr().out.startswith("http://host/x/case_00007/imaging.nii.gz\tcase_00007/imaging.nii.gz\n")


@pytest.mark.parametrize("cases", ["210", "9-5", "x", "1-", "-3", "0-300"])
def test_bad_cases_are_one_line(cases: str) -> None:
    with pytest.raises(UserError, match=r"--cases|labelled cases are 0-209"):
        main(["--list_urls", f"--cases={cases}"])


def test_a_missing_package_is_one_line_with_the_remedy(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['requests'] = None\n"
        "from common.errors import run_program\n"
        "from data_loading.download_kits19 import main\n"
        f"sys.exit(run_program(lambda: main(['--results_dir', {str(tmp_path)!r}, '--accept_licence']), 'download'))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "needs requests" in done.stderr
    assert "pip install '.[download]'" in done.stderr


def start(server: Server, folder: Path) -> subprocess.Popen[str]:
    program = (
        "import sys; from data_loading import http_download; http_download.FIRST_WAIT_S = 0.01\n"
        "from common.errors import run_program\n"
        "from data_loading.download_kits19 import main\n"
        "sys.exit(run_program(lambda: main(sys.argv[1:]), 'download_kits19'))"
    )
    command = [sys.executable, "-c", program, *arguments(server, folder)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill_while_bytes_arrive(server: Server, folder: Path, rng: random.Random) -> None:
    """Kills a download after a random number of further bytes."""
    server.limit = server.sent + rng.randrange(1, 130_000)
    process = start(server, folder)
    while server.sent < server.limit and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    server.limit = math.inf
    assert process.returncode == -signal.SIGKILL, "it was not done yet"


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_downloads_end_complete(server: Server, tmp_path: Path, kills: int) -> None:
    rng, answers = random.Random(kills), misbehaving(seed=kills)

    def in_small_pieces(path: str, n: int) -> Answer:
        answer = answers(path, n)
        answer.chunk = 2000
        return answer

    server.behave = in_small_pieces
    for _ in range(kills):
        kill_while_bytes_arrive(server, tmp_path, rng)
    last = start(server, tmp_path)
    assert (last.communicate()[1], last.returncode) == ("", 0)
    assert_complete(tmp_path)
    sent = server.sent
    again = start(server, tmp_path)
    assert "0 fetched" in again.communicate()[0]
    assert server.sent == sent


def test_ctrl_c_is_one_line_and_keeps_the_parts(server: Server, tmp_path: Path) -> None:
    server.behave = lambda path, n: Answer(length=10_000_000, body=b"\x1f\x8b" * 3000, chunk=1)
    process = start(server, tmp_path)
    while not list(tmp_path.rglob("*.part")):
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "download_kits19: interrupted\n")
    server.behave = lambda path, n: Answer()
    assert main(arguments(server, tmp_path)) == 0
    assert_complete(tmp_path)
