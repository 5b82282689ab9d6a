"""Commands as processes of their own, to be killed: for the price of a fork each.

A server process imports everything once and starts nothing; each command is a fork of it. For what
SIGKILL does that is no different from a process started by a shell: nothing of Python runs after
it, no `finally`, no `atexit`, no thread; the kernel closes the files, which ends the `flock`s, and
keeps what was written. What is left out are the seconds of imports, in which nothing is written.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers.models.llama.modeling_llama  # noqa: F401  (once, not in each process)

import cli.app
import routesae_cache.contexts.contexts
import routesae_cache.evaluate
import routesae_cache.harvest
import routesae_cache.pipeline
import routesae_cache.report.build
import routesae_cache.sweep
import routesae_cache.train
import routesae_cache.workers  # noqa: F401

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([__name__])
_PATIENCE_S = 120.0
SIGNALLED = Path(".signalled")
"""In the folder of a command: made when it sent itself a signal."""
_FILE_EVENTS = {"open", "os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}


@dataclass(frozen=True)
class Command:
    """A command that was started."""

    process: Any
    log: Path

    def kill(self, number: int = signal.SIGKILL) -> bool:
        """Send it a signal; whether it was still running."""
        try:
            os.kill(self.process.pid, number)
        except ProcessLookupError:
            return False
        return True

    def code(self) -> int:
        """Wait for its exit code; that of a process ended by a signal is the signal's, negative."""
        self.process.join(_PATIENCE_S)
        assert self.process.exitcode is not None, "it hangs: " + self.output()
        return int(self.process.exitcode)

    def output(self) -> str:
        """What it has said so far, its lines joined."""
        return " ".join(self.log.read_text("utf-8", "replace").split())


@dataclass(frozen=True)
class SignalAtFile:
    """Sends its own process a signal just before it opens, renames, makes or removes a file.

    It is file number `at` of those whose whole path has a match of `pattern`. By default the
    process dies of it.
    """

    pattern: str
    at: int = 1
    number: int = signal.SIGKILL

    def __call__(self) -> None:
        seen, pattern = 0, re.compile(self.pattern)

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if event not in _FILE_EVENTS or not isinstance(arguments[0], (str, os.PathLike)):
                return
            if pattern.search(os.path.realpath(arguments[0])):
                seen += 1
                if seen == self.at:
                    SIGNALLED.touch()
                    os.kill(os.getpid(), self.number)

        sys.addaudithook(hook)


def nothing() -> None:
    """What a command does first where nothing is asked for."""


def wait_for_server() -> None:
    """Until it has everything imported, so that what is timed next is a command alone."""
    process = _CONTEXT.Process(target=nothing)
    process.start()
    process.join()


def start(
    folder: Path,
    *arguments: object,
    first: Callable[[], None] = nothing,
    log: Path | None = None,
) -> Command:
    """Start a command of `routesae` in a folder; `log` is where its output goes."""
    log = log or folder / ".log"
    log.write_text("")
    process = _CONTEXT.Process(target=_run, args=(folder, list(map(str, arguments)), log, first))
    process.start()
    return Command(process, log)


@contextmanager
def running(
    folder: Path,
    *arguments: object,
    first: Callable[[], None] = nothing,
    log: Path | None = None,
) -> Iterator[Command]:
    """A command while the block lasts; it is killed where it then still runs."""
    command = start(folder, *arguments, first=first, log=log)
    try:
        yield command
    finally:
        command.kill()
        command.process.join()


def finished(folder: Path, *arguments: object) -> float:
    """Run a command to its good end; returns the seconds it took."""
    begin = time.perf_counter()
    with running(folder, *arguments) as command:
        assert command.code() == 0, command.output()
    return time.perf_counter() - begin


def wait_until(condition: Callable[[], object]) -> None:
    """Look every few milliseconds."""
    give_up = time.monotonic() + _PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.002)


def _run(folder: Path, arguments: list[str], log: Path, first: Callable[[], None]) -> None:
    os.chdir(folder)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.dump_traceback_later(_PATIENCE_S * 0.8)  # where it hangs
    torch.set_num_threads(1)
    sys.argv = ["routesae", *arguments]
    first()
    cli.app.main()
