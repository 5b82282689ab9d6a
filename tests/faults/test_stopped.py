"""Ctrl-C and SIGTERM: a stop within seconds, the exit code, and the very command that goes on."""

from __future__ import annotations

import os
import shlex
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.chat_server import KEY, Answer, chat_server, completion
from tests.faults.jobs import (
    CODES,
    RUNS,
    STORE,
    Job,
    experimenting,
    harvesting,
    mining,
    recoding,
    training,
)
from tests.faults.processes import SIGNALLED, SignalAtFile, finished, running, wait_until
from tests.faults.tally import Tally
from tests.test_interpret import LATENTS, PLACES, place, write_contexts

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
SECONDS = 20  # a few of them on a machine that has nothing else to do


class Stop(NamedTuple):
    """A command and where it is stopped."""

    arguments: list[object]
    pattern: str
    at: int
    goes_on: bool


@pytest.fixture
def stops(home: Path, tiny_model_dir: Path, tiny_corpus: Path) -> dict[str, tuple[Job, Stop]]:
    """Every long command but `interpret`, and a place in the middle of it."""
    store, runs = home / STORE, sorted((home / RUNS).glob("[!.]*"))
    train = ["train", store, "--sae", "topk", "--layer", 3, "--latents", 64, "--k", 4]
    train += ["--epochs", 40, "--batch-tokens", 32, "--out", RUNS]
    evaluate = ["evaluate", store, *runs, "--json", "e.json"]
    report = ["report", home, "--store", store, "--model", tiny_model_dir, "--out", "r.html"]
    jobs: dict[str, tuple[Job, str, int, bool]] = {
        "harvest": (harvesting(tiny_model_dir, tiny_corpus), "committed/c/2", 1, True),
        "recode": (recoding(store), "t.zarr/committed/c/2", 1, True),
        "sweep": (training(store, epochs=40), r"metrics\.jsonl$", 6, True),
        "train": (_one(train, RUNS), r"metrics\.jsonl$", 3, True),
        "evaluate": (_one(evaluate, "e.json"), CODES, 2, False),
        "contexts": (mining(store, tiny_model_dir, home / RUNS), CODES, 2, False),
        "report": (_one(report, "r.html"), CODES, 2, False),
        "pipeline, harvest": (
            experimenting(tiny_model_dir, tiny_corpus),
            "committed/c/2",
            1,
            True,
        ),
        "pipeline, train": (
            experimenting(tiny_model_dir, tiny_corpus),
            r"metrics\.jsonl$",
            4,
            True,
        ),
    }
    return {name: (job, Stop(list(job.arguments), *rest)) for name, (job, *rest) in jobs.items()}


def _one(arguments: list[object], name: str) -> Job:
    def there(folder: Path) -> dict[str, bytes]:
        return {name: b""} if (folder / name).exists() else {}

    return Job(arguments, there, there)


def _with_key() -> None:
    os.environ["OPENAI_API_KEY"] = KEY


@pytest.mark.parametrize("number", EXIT_CODES, ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize(
    "name",
    [
        "harvest",
        "recode",
        "sweep",
        "train",
        "evaluate",
        "contexts",
        "report",
        "pipeline, harvest",
        "pipeline, train",
    ],
)
def test_a_stop(name: str, number: int, stops: Any, tmp_path: Path, tally: Tally) -> None:
    job, stop = stops[name]
    job.prepare(tmp_path)
    at = SignalAtFile(stop.pattern, stop.at, number)
    with running(tmp_path, *stop.arguments, first=at) as command:
        code, ended = command.code(), time.time()
    assert code == EXIT_CODES[number], command.output()
    assert ended - (tmp_path / SIGNALLED).stat().st_mtime < SECONDS
    assert "Traceback" not in command.output()
    lines = command.log.read_text().splitlines()
    said = next(i for i, line in enumerate(lines) if line.startswith("Stopped. "))
    assert ("goes on" if stop.goes_on else "starts again") in lines[said]
    program, *again = shlex.split(lines[said + 1])
    assert program == "routesae"
    assert again[: len(stop.arguments)] == list(map(str, stop.arguments))
    assert not list(tmp_path.rglob("*.partial"))
    assert stop.goes_on or not job.kept(tmp_path)
    finished(tmp_path, *again)
    assert job.result(tmp_path)
    tally.add("Ctrl-C and SIGTERM")


@pytest.mark.parametrize("number", EXIT_CODES, ids=["Ctrl-C", "SIGTERM"])
def test_a_stop_while_a_server_does_not_answer(number: int, tmp_path: Path, tally: Tally) -> None:
    contexts = {latent: [place(latent, i) for i in range(PLACES)] for latent in LATENTS}
    file = write_contexts(tmp_path / "c.json", contexts)
    reply = completion('{"explanation": "x", "category": "word-level", "score": 3}')
    with chat_server() as server:
        server.respond = lambda _, count: Answer(body=reply.body, delay_s=60 if count > 2 else 0)
        asking = ["interpret", file, "--base-url", server.url, "--concurrency", 2]
        with running(tmp_path, *asking, first=_with_key) as command:
            wait_until(lambda: len(server.requests) > 3)
            begin = time.monotonic()
            command.kill(number)
            assert command.code() == EXIT_CODES[number], command.output()
            assert time.monotonic() - begin < SECONDS
        assert f"routesae interpret {file} --base-url" in command.output()
        assert "Traceback" not in command.output()
    assert len((tmp_path / "c.replies.jsonl").read_text().splitlines()) >= 2
    tally.add("Ctrl-C and SIGTERM")
