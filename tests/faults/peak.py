"""How much memory a command takes, and how long a store takes to open."""

from __future__ import annotations

import multiprocessing.util
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stores.reader import StoreReader
from tests.faults.processes import nothing, running

SECONDS_TO_OPEN = 1.0


@dataclass(frozen=True)
class _TellsPeak:
    """Writes down the most memory that its process ever had."""

    path: Path
    first: Callable[[], None]

    def __call__(self) -> None:
        multiprocessing.util.Finalize(None, self._write, exitpriority=0)
        self.first()

    def _write(self) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.path.write_text(str(peak * 1024))


def peak(folder: Path, *arguments: object, first: Callable[[], None] = nothing) -> int:
    """Bytes of memory that a command had at most."""
    told = folder / "peak"
    with running(folder, *arguments, first=_TellsPeak(told, first)) as command:
        assert command.code() == 0, command.output()
    return int(told.read_text())


def seconds_to_open(path: Path) -> float:
    """Of the quickest of three: others use the machine, too."""

    def once() -> float:
        begin = time.perf_counter()
        StoreReader(path)
        return time.perf_counter() - begin

    return min(once() for _ in range(3))
