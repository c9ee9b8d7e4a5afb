"""One file over HTTP, from a server that misbehaves."""

from __future__ import annotations

import gzip
import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import pytest

from common.errors import UserError
from data_loading import http_download
from data_loading.http_download import ATTEMPTS, Stopped, fetch
from tests.data_loading.http_server import Answer, Server, serve

FILE = gzip.compress(random.Random(0).randbytes(300_000), mtime=0)
SHA256 = hashlib.sha256(FILE).hexdigest()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(http_download, "FIRST_WAIT_S", 0.0)
    with serve({"/f": FILE}) as running:
        yield running


def get(server: Server, folder: Path, received: list[int] | None = None) -> str:
    return fetch(f"{server.url}/f", folder / "f.gz", Event(), (received if received is not None else []).append)


def only(*answers: Answer) -> object:
    """Gives these answers, the last one again and again."""
    return lambda path, n: answers[min(n, len(answers)) - 1]


def test_a_file_arrives_and_nothing_else_is_left(server: Server, tmp_path: Path) -> None:
    received: list[int] = []
    assert get(server, tmp_path, received) == SHA256
    assert sum(received) == len(FILE)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"f.gz": FILE}


def test_a_cut_connection_is_continued_where_it_ended(server: Server, tmp_path: Path) -> None:
    # More cuts than attempts: each brought something.
    cuts = [Answer(cut=20_000)] * (ATTEMPTS + 4)
    server.behave = only(*cuts, Answer())
    assert get(server, tmp_path) == SHA256
    assert server.ranges == [f"bytes={20_000 * (n + 1)}-" for n in range(len(cuts))]
    assert server.sent == len(FILE), "no byte is sent twice"


def test_a_stopped_transfer_is_continued_later(server: Server, tmp_path: Path) -> None:
    stop = Event()
    with pytest.raises(Stopped):
        fetch(f"{server.url}/f", tmp_path / "f.gz", stop, lambda size: stop.set())
    assert not (tmp_path / "f.gz").exists()
    arrived = (tmp_path / "f.gz.part").stat().st_size
    assert 0 < arrived < len(FILE)
    assert get(server, tmp_path) == SHA256
    assert server.ranges == [f"bytes={arrived}-"]


@pytest.mark.parametrize(
    "answer",
    [
        Answer(status=429, headers={"Retry-After": "0"}),
        Answer(status=500),
        Answer(status=503, headers={"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}),
        Answer(cut=0),
        Answer(length=1000),
        Answer(flip=5000),
        Answer(body=b"<html>the service is busy</html>"),
        Answer(headers={"Content-Length": "many"}, cut=100_000),
        Answer(headers={"X-Linked-ETag": f'"{"0" * 64}"'}),
    ],
    ids=["429", "500", "503", "cut", "too short", "flipped", "error page", "no length", "other SHA-256"],
)
def test_a_failed_attempt_is_repeated(server: Server, tmp_path: Path, answer: Answer) -> None:
    server.behave = only(answer, Answer(headers={"X-Linked-ETag": SHA256}))
    assert get(server, tmp_path) == SHA256
    assert server.requests["/f"] == 2
    assert (tmp_path / "f.gz").read_bytes() == FILE


@pytest.mark.parametrize(
    ("again", "requests"),
    [
        (Answer(ignores_range=True), 2),
        (Answer(cut=100_000, ignores_range=True), 3),
        (Answer(headers={"Content-Range": "bytes 5-9/10"}), 3),
        (Answer(headers={"ETag": '"changed"'}), 2),
        (Answer(status=416), 3),
    ],
    ids=["ignores ranges", "and is cut", "another range", "changed", "416"],
)
def test_a_part_that_cannot_be_continued_starts_over(
    server: Server, tmp_path: Path, again: Answer, requests: int
) -> None:
    server.behave = only(Answer(cut=50_000), again, Answer())
    assert get(server, tmp_path) == SHA256
    assert server.requests["/f"] == requests


@pytest.mark.parametrize("headers", [{"ETag": ""}, {"ETag": 'W/"weak"'}])
def test_without_a_validator_nothing_is_continued(server: Server, tmp_path: Path, headers: dict[str, str]) -> None:
    server.behave = only(Answer(cut=50_000, headers=headers), Answer())
    assert get(server, tmp_path) == SHA256
    assert server.ranges == []


def test_a_web_page_does_not_replace_what_has_arrived(server: Server, tmp_path: Path) -> None:
    page = Answer(body=b"<html>log in</html>", headers={"Content-Type": "text/html; charset=utf-8"}, ignores_range=True)
    server.behave = only(Answer(cut=70_000), page, Answer())
    assert get(server, tmp_path) == SHA256
    assert server.ranges == ["bytes=70000-", "bytes=70000-"]
    server.behave = only(page)
    with pytest.raises(UserError, match="the server sends a web page, not the file"):
        get(server, tmp_path)


def test_a_file_that_is_shorter_than_announced_starts_over(server: Server, tmp_path: Path) -> None:
    server.behave = only(Answer(length=10_000_000), Answer())
    assert get(server, tmp_path) == SHA256
    assert (server.requests["/f"], server.ranges) == (3, [f"bytes={len(FILE)}-"])


def test_a_part_of_another_url_is_not_continued(server: Server, tmp_path: Path) -> None:
    server.files["/g"] = gzip.compress(b"another file")
    server.behave = only(Answer(cut=50_000), Answer(status=404))
    with pytest.raises(UserError):
        get(server, tmp_path)
    server.behave = only(Answer())
    fetch(f"{server.url}/g", tmp_path / "f.gz", Event(), lambda size: None)
    assert (tmp_path / "f.gz").read_bytes() == server.files["/g"]


@pytest.mark.parametrize(
    ("answer", "message", "requests"),
    [
        (Answer(status=404), "the server answers 404 Not Found", 1),
        (Answer(status=403), "the server answers 403 Forbidden", 1),
        (Answer(status=500), "the server answers 500 Internal Server Error (6 attempts without progress)", 6),
        (Answer(status=429, headers={"Retry-After": "3600"}), "and the server asks to wait 3600 s", 1),
        (Answer(body=b"<html>"), "what arrived is damaged: Not a gzipped file", 6),
        (Answer(flip=5000), "what arrived is damaged: ", 6),
        (Answer(length=1000), "Compressed file ended before the end-of-stream marker", 6),
        (Answer(length=10_000_000), "the server sends the range", 6),
    ],
)
def test_what_keeps_failing_ends_in_one_line(
    server: Server, tmp_path: Path, answer: Answer, message: str, requests: int
) -> None:
    server.behave = only(answer)
    with pytest.raises(UserError) as caught:
        get(server, tmp_path)
    assert str(caught.value).startswith(f"{server.url}/f: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert server.requests["/f"] == requests
    assert not (tmp_path / "f.gz").exists()


def test_a_dead_server_is_one_line(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^http://127.0.0.1:9/f: the connection failed: .*refused.*without progress"):
        fetch("http://127.0.0.1:9/f", tmp_path / "f.gz", Event(), lambda size: None)
    with pytest.raises(UserError, match=r"^htp://x: No connection adapters"):
        fetch("htp://x", tmp_path / "f.gz", Event(), lambda size: None)


def test_a_full_disk_keeps_what_arrived(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(size: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        fetch(f"{server.url}/f", tmp_path / "f.gz", Event(), full)
    assert (tmp_path / "f.gz.part").stat().st_size > 0
    assert get(server, tmp_path) == SHA256
    assert len(server.ranges) == 1


def test_waits_double(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_download, "FIRST_WAIT_S", 1.0)
    waits: list[float | None] = []

    class Waiting(Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout)
            return False

    answers = [Answer(status=500)] * 3 + [Answer(status=429, headers={"Retry-After": "7"}), Answer(cut=10_000)]
    server.behave = only(*answers, Answer())
    assert fetch(f"{server.url}/f", tmp_path / "f.gz", Waiting(), lambda size: None) == SHA256
    assert waits == [1, 2, 4, 7, 1]
