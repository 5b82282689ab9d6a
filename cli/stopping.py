"""Ctrl-C and SIGTERM: where a command stops, its exit code, and what goes on from there."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Never

_GO_ON = ("harvest", "train", "sweep", "interpret", "pipeline", "recode")
"""Commands that leave out what was finished before."""
_WITH_RESUME = ("train", "sweep")


class Terminated(KeyboardInterrupt):
    """SIGTERM, where Ctrl-C would be a KeyboardInterrupt."""


_EXIT_CODES: dict[int, type[KeyboardInterrupt]] = {130: KeyboardInterrupt, 143: Terminated}


def exit_code(stop: KeyboardInterrupt) -> int:
    """As shells have it: 128 and the number of the signal."""
    return next(code for code, kind in _EXIT_CODES.items() if type(stop) is kind)


def raise_stop(code: int) -> None:
    """Raise what a command was stopped by, if that is what its exit code says."""
    if code in _EXIT_CODES:
        raise _EXIT_CODES[code]


def going_on(command: str) -> str:
    """What is there after a stop, and the very command that goes on or starts again."""
    words = ["routesae", *sys.argv[1:]]
    if command in _WITH_RESUME and "--resume" not in words:
        words.append("--resume")
    if command in _GO_ON:
        return f"What was finished is kept; this goes on from there:\n  {shlex.join(words)}"
    return f"No half result is left; this starts again:\n  {shlex.join(words)}"


@contextmanager
def termination_raised() -> Iterator[bool]:
    """Have SIGTERM raised as Terminated; yields whether no block around this one does so."""
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield before is not _terminate
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(*_: Any) -> Never:
    raise Terminated


class Stop:
    """Whether a signal asked to stop, and which."""

    def __init__(self) -> None:
        self._kind: type[KeyboardInterrupt] | None = None

    def note(self, number: int) -> None:
        self._kind = Terminated if number == signal.SIGTERM else KeyboardInterrupt

    def __call__(self) -> bool:
        return self._kind is not None

    def error(self) -> KeyboardInterrupt:
        """What the signal would have raised; a Ctrl-C where it was another process's."""
        return KeyboardInterrupt() if self._kind is None else self._kind()


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Have the first Ctrl-C or SIGTERM asked for instead of raised; the second one acts at once.

    Yields what tells whether there was one.
    """
    stop = Stop()

    def note(number: int, _: Any) -> None:
        stop.note(number)
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        restore()
