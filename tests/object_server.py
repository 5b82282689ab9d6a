"""An S3 server on loopback, moto's, that can fail, wait and hang up as real ones do."""

from __future__ import annotations

import random
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

Fault = Literal["error", "lost", "slow", "cut"]
"""Refused with a 500; carried out but answered with a 500; answered late; cut off half way."""
BUCKET = "bucket"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "someone",
    "AWS_SECRET_ACCESS_KEY": "very-secret",
    "AWS_REGION": "us-east-1",
}
Start = Callable[..., Any]


class ObjectServer:
    """The server as a WSGI application; `choose` says what goes wrong with a request."""

    def __init__(self) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)
        self.choose: Callable[[str, str], Fault | None] = lambda method, path: None
        self.slowness = 0.2
        self.requests: list[tuple[str, str]] = []
        """Method and path of every request."""
        self.faults: Counter[Fault] = Counter()
        self.url = ""

    def __call__(self, environ: dict[str, Any], start: Start) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append((method, path))
        fault = self.choose(method, path)
        if fault is not None:
            self.faults[fault] += 1
        if fault == "error":
            return _failure(start)
        if fault == "slow":
            time.sleep(self.slowness)
        answer = self._app(environ, start if fault != "lost" else lambda *_: lambda _: None)
        if fault == "lost":
            list(answer)
            return _failure(start)
        return _half(answer) if fault == "cut" else answer

    def keys(self, method: str) -> list[str]:
        """Keys of the requests of a kind, in order."""
        found = [path for m, path in self.requests if m == method]
        return [path.removeprefix(f"/{BUCKET}/") for path in found]

    def at_random(self, seed: int, rate: float, *kinds: Fault) -> None:
        """From now on that share of requests goes wrong, in one of these ways."""
        rng, lock = random.Random(seed), threading.Lock()

        def choose(method: str, path: str) -> Fault | None:
            with lock:
                return rng.choice(kinds) if rng.random() < rate else None

        self.choose = choose

    def well(self) -> None:
        """From now on nothing goes wrong."""
        self.choose = lambda method, path: None


def _failure(start: Start) -> list[bytes]:
    start("500 Internal Server Error", [("Content-Type", "text/plain")])
    return [b"We encountered an internal error. Please try again."]


def _half(answer: Iterable[bytes]) -> Iterator[bytes]:
    content = b"".join(answer)
    yield content[: len(content) // 2]
    raise ConnectionResetError  # the length was announced: the client sees that bytes are missing


class _Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, type: str, message: str, *args: Any) -> None:
        """Nothing."""


@contextmanager
def object_server() -> Iterator[ObjectServer]:
    """A server with an empty bucket, on a port of its own."""
    app = ObjectServer()
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=_Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    app.url = f"http://127.0.0.1:{server.server_port}"
    # all of moto's servers in a process have the same objects
    for method, path in (("POST", "moto-api/reset"), ("PUT", BUCKET)):
        request = urllib.request.Request(f"{app.url}/{path}", method=method)
        urllib.request.urlopen(request).close()
    app.requests.clear()
    try:
        yield app
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
