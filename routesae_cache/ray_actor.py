"""The side of a worker's process: the worker that is made there, and what is said of it."""

from __future__ import annotations

import logging
import os
import socket
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from routesae_cache.devices import take_cores

Task = TypeVar("Task")
Result = TypeVar("Result")


class Worker(ABC, Generic[Task, Result]):
    """What one process does with the tasks it is handed; made in that process."""

    hello: Any = None
    """What the driver is told of it before it has work."""

    @abstractmethod
    def work(self, task: Task) -> Result:
        """Do a task; called by several threads at once where tasks are handed out ahead."""

    def state(self) -> Any:
        """How far its task is; asked for while `work` goes on."""
        return None

    def stop(self) -> None:
        """Have `work` return early."""

    def close(self) -> None:
        """Give back what it holds; not called where the process dies."""


Message = tuple[str, int, str]
"""Logger, level, text."""


class Loaded(NamedTuple):
    """What a process says once it has made its worker."""

    hello: Any
    host: str
    pid: int
    messages: list[Message]


class State(NamedTuple):
    """How far a worker is."""

    value: Any
    messages: list[Message]


class Worked(NamedTuple):
    """What came of a task."""

    value: Any
    messages: list[Message]


class _Messages(logging.Handler):
    """Keeps what is logged, for the driver to fetch."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._kept: deque[Message] = deque()
        for name in ("routesae_cache", "stores"):
            logging.getLogger(name).addHandler(self)
            logging.getLogger(name).setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        self._kept.append((record.name, record.levelno, record.getMessage()))

    def fetch(self) -> list[Message]:
        """What came since the last time."""
        return [self._kept.popleft() for _ in range(len(self._kept))]


class Actor:
    """A process of Ray's with a worker in it."""

    def __init__(self, make: Callable[[], Worker[Any, Any]], cores: int, folder: Path) -> None:
        self._make, self._cores = make, cores
        with suppress(OSError):  # it is not there: nor are paths that start from it
            os.chdir(folder)
        self._messages = _Messages()

    def load(self) -> Loaded:
        """Make the worker; the same number of cores for every one."""
        take_cores(self._cores)
        torch.set_num_threads(self._cores)
        self._worker = self._make()
        fetched = self._messages.fetch()
        return Loaded(self._worker.hello, socket.gethostname(), os.getpid(), fetched)

    def work(self, task: Any) -> Worked:
        result = self._worker.work(task)
        return Worked(result, self._messages.fetch())

    def state(self) -> State:
        return State(self._worker.state(), self._messages.fetch())

    def stop(self) -> None:
        self._worker.stop()

    def close(self) -> None:
        self._worker.close()
