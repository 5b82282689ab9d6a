"""A chat completions API on loopback, over real HTTP, that misbehaves on demand."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

PROMPT_TOKENS, COMPLETION_TOKENS = 100, 10
QUICK = {"retry-after-ms": "10"}  # the library's own back-off begins with half a second
KEY = "sk-secret-0123456789abcdef"
_VARIABLES = (
    *("OPENAI_API_KEY", "OPENAI_BASE_URL", "AZURE_OPENAI_API_KEY", "AZURE_OPENAI_ENDPOINT"),
    *("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"),
)


@dataclass
class Request:
    """What arrived."""

    body: dict[str, Any]
    path: str
    headers: dict[str, str]
    at: float

    @property
    def user(self) -> str:
        """The message with the data."""
        return str(self.body["messages"][1]["content"])

    @property
    def kind(self) -> str:
        """Which of the two questions it is."""
        return "detection" if '"explanation": ' in self.user.splitlines()[0] else "explanation"

    @property
    def structured(self) -> bool:
        """Whether a JSON schema came along."""
        return "response_format" in self.body


@dataclass
class Answer:
    """What goes back: a body with a status, or something worse."""

    status: int = 200
    body: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    cut_off: bool = False
    """Close the connection in the middle of the body."""


def completion(content: str | None, *, finish: str = "stop", **message: Any) -> Answer:
    """A well-formed chat completion."""
    record = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "served",
        "choices": [
            {
                "index": 0,
                "finish_reason": finish,
                "message": {"role": "assistant", "content": content, **message},
            }
        ],
        "usage": {
            "prompt_tokens": PROMPT_TOKENS,
            "completion_tokens": COMPLETION_TOKENS,
            "total_tokens": PROMPT_TOKENS + COMPLETION_TOKENS,
        },
    }
    return Answer(body=json.dumps(record))


def error(status: int, message: str = "broken", **fields: Any) -> Answer:
    """An error as the API words it."""
    return Answer(
        status=status, body=json.dumps({"error": {"message": message, **fields}}), headers=QUICK
    )


def explanation(request: Request, score: int = 4, category: str = "word-level") -> Answer:
    """A good reply to either question, in the format that was asked for."""
    if request.kind == "detection":
        numbers = [json.loads(line)["number"] for line in request.user.splitlines()[1:]][:2]
        text = "MATCHES: " + ", ".join(map(str, numbers))
        return completion(json.dumps({"matches": numbers}) if request.structured else text)
    words = "Names of rivers."
    if not request.structured:
        return completion(f"EXPLANATION: {words}\nCATEGORY: {category}\nSCORE: {score}")
    fields = {"explanation": words, "category": category, "score": score}
    return completion(json.dumps(fields))


FAULTS: dict[str, Callable[[Request], Answer]] = {
    "429": lambda _: Answer(429, '{"error": {"message": "slow down"}}', {"Retry-After": "0.05"}),
    "500": lambda _: error(500),
    "slow": lambda request: Answer(body=explanation(request).body, delay_s=0.8),
    "cut off": lambda request: Answer(body=explanation(request).body, cut_off=True),
    "no JSON": lambda _: Answer(body="<html>Welcome to the hotel</html>"),
    "another schema": lambda _: Answer(body='{"result": "fine"}'),
    "content is no JSON": lambda _: completion("Certainly! This latent is about rivers."),
    "content of another schema": lambda _: completion('{"category": "fish", "score": 9}'),
    "filtered prompt": lambda _: error(400, "filtered", code="content_filter"),
    "filtered reply": lambda _: completion(None, finish="content_filter"),
    "refusal": lambda _: completion(None, refusal="I cannot help with that."),
    "wrong key": lambda _: error(401, f"Incorrect API key provided: {KEY}"),
}
"""What can go wrong with one request."""


class ChatServer(ThreadingHTTPServer):
    """Answers by `respond(request, number)`, the number counted from 1 over all requests."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.respond: Callable[[Request, int], Answer] = lambda request, _: explanation(request)
        self.requests: list[Request] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """The base URL of the API."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def misbehave(self, fault: str, *numbers: int) -> None:
        """Answer these requests with a fault, all others well."""
        self.respond = lambda request, number: (
            FAULTS[fault](request) if number in numbers else explanation(request)
        )

    def arrived(self, request: Request) -> Answer:
        """Count a request and decide on its answer."""
        with self._lock:
            self.requests.append(request)
            number = len(self.requests)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        return self.respond(request, number)

    def answered(self) -> None:
        """One less at once."""
        with self._lock:
            self._at_once -= 1

    def handle_error(self, *_: Any) -> None:
        """Clients go away on purpose here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ChatServer

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(json.loads(content), self.path, headers, time.monotonic())
        answer = self.server.arrived(request)
        try:
            time.sleep(answer.delay_s)
            self._send(answer)
        finally:
            self.server.answered()

    def _send(self, answer: Answer) -> None:
        body = answer.body.encode()
        self.send_response(answer.status)
        is_json = re.match(r"\s*[{\[]", answer.body) is not None
        self.send_header("Content-Type", "application/json" if is_json else "text/html")
        self.send_header("Content-Length", str(len(body)))
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if answer.cut_off else body)
        if answer.cut_off:
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Nothing on the screen."""


@contextmanager
def chat_server() -> Iterator[ChatServer]:
    """A server in a thread of its own."""
    server = ChatServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def chat_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key, and nothing else that says where a server is or how to get there."""
    for name in _VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def server() -> Iterator[ChatServer]:
    """A server of well-formed replies, until told otherwise."""
    with chat_server() as running:
        yield running
