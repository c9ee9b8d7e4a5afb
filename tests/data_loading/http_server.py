"""An HTTP server on this machine that misbehaves as it is asked to."""

from __future__ import annotations

import math
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread


@dataclass
class Answer:
    """What the server does with one request.

    Attributes:
        status: 200 becomes 206 for a range.
        headers: beside or instead of the usual ones; "" leaves one out.
        length: the announced Content-Length; None: the true one.
        cut: bytes of the body after which the connection is closed; None: none.
        flip: index of a byte of the body that is flipped; None: none.
        body: instead of the file.
        ignores_range: sends the whole file where a part was asked for.
        chunk: bytes sent at a time.
    """

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    length: int | None = None
    cut: int | None = None
    flip: int | None = None
    body: bytes | None = None
    ignores_range: bool = False
    chunk: int = 1 << 14


Behaviour = Callable[[str, int], Answer]


class Server:
    """Serves `files` by URL path; `behave(path, n)` chooses the answer to the n-th request (from 1) for a path.

    Attributes:
        requests: number of requests by path.
        ranges: Range headers that were received, in their order.
        sent: bytes of bodies.
        limit: where `sent` stops for as long as this is not raised.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.behave: Behaviour = lambda path, n: Answer()
        self.requests: Counter[str] = Counter()
        self.ranges: list[str] = []
        self.sent = 0
        self.limit = math.inf
        self.url = ""
        self.lock = Lock()


@contextmanager
def serve(files: dict[str, bytes]) -> Iterator[Server]:
    server = Server(files)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            answer_request(self, server)

    class Listener(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            pass  # the client was killed

    listener = Listener(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{listener.server_address[1]}"
    Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        listener.shutdown()
        listener.server_close()


def answer_request(handler: BaseHTTPRequestHandler, server: Server) -> None:
    with server.lock:
        server.requests[handler.path] += 1
        answer = server.behave(handler.path, server.requests[handler.path])
        wanted = handler.headers.get("Range", "")
        server.ranges += [wanted] if wanted else []
    file = server.files.get(handler.path)
    if file is None or answer.status != 200:
        body = answer.body or b"<html>an error page</html>"
        headers = {"Content-Length": str(len(body))}
        status = answer.status if answer.status != 200 else 404
    else:
        etag = f'"{hash(file):x}"'
        status, body, headers = 200, answer.body or file, {"ETag": etag}
        match = re.fullmatch(r"bytes=(\d+)-", wanted)
        if match and not answer.ignores_range and handler.headers.get("If-Range") == answer.headers.get("ETag", etag):
            status, body = 206, file[int(match[1]) :]
            headers["Content-Range"] = f"bytes {match[1]}-{len(file) - 1}/{len(file)}"
        headers["Content-Length"] = str(len(body) if answer.length is None else answer.length)
    handler.send_response(status)
    for name, value in (headers | answer.headers).items():
        if value:
            handler.send_header(name, value)
    handler.end_headers()
    if answer.flip is not None:
        body = body[: answer.flip] + bytes([body[answer.flip] ^ 0x10]) + body[answer.flip + 1 :]
    body = body[: answer.cut]
    for start in range(0, len(body), answer.chunk):
        piece = body[start : start + answer.chunk]
        while server.sent >= server.limit:
            time.sleep(0.001)
        handler.wfile.write(piece)
        with server.lock:
            server.sent += len(piece)


def misbehaving(seed: int) -> Behaviour:
    """Returns a behaviour that fails in every way, at random, in two of four requests for a path."""
    rng = random.Random(seed)

    def behave(path: str, n: int) -> Answer:
        if n % 4 > 1:  # two in a row: the first may follow a wrong length
            return Answer()
        return rng.choice(
            [
                Answer(cut=rng.randrange(1, 100_000)),
                Answer(status=429, headers={"Retry-After": "0"}),
                Answer(status=500),
                Answer(status=503, headers={"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}),
                Answer(length=rng.randrange(1, 100)),
                Answer(length=10_000_000),
                Answer(flip=rng.randrange(10, 50)),
                Answer(ignores_range=True, cut=rng.randrange(1, 100_000)),
                Answer(body=b"<html>busy</html>"),
                Answer(headers={"ETag": "", "Content-Range": "bytes 7-8/9"}),
            ]
        )

    return behave
