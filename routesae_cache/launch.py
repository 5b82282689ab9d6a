"""Starting several processes on this machine, and ending all of them when one fails."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

from routesae_cache.devices import cores
from routesae_cache.parallel import check_devices, environment, meeting_point

PEER_LOST = 75
"""Exit code of a process that ended because another did."""
_PATIENCE = 15.0  # seconds for the others to end by themselves, and again after they are told to


class Ended(NamedTuple):
    """How the processes ended: 0 if all went well, otherwise the code of one that failed first."""

    rank: int
    code: int
    """As `Process.exitcode` has it: negative for a signal."""
    stop: int | None = None
    """The signal that asked all of them to end, if one did."""


def check_processes(count: int, device: str) -> None:
    """ValueError where this machine has too few GPUs or cores for so many processes."""
    check_devices(count, device)
    if device == "cpu" and count > (there := cores()):
        raise ValueError(f"{count} processes: expected at most {there}, a core here for each")


def launch(work: Callable[..., None], count: int, arguments: Sequence[Any]) -> Ended:
    """Run `work(*arguments)` in so many new processes, each of which finds the others with `join`.

    Ctrl-C and SIGTERM are passed on as SIGTERM. When a process fails the others are given a while
    to notice, then terminated. When this process dies they get a SIGTERM.

    Args:
        work: a function of a module; it and the arguments are pickled.
    """
    meeting = meeting_point()
    spawning = multiprocessing.get_context("spawn")
    processes = [
        spawning.Process(
            target=_enter,
            args=(environment(rank, count, meeting.port), work, arguments),
            name=f"process {rank}",
            daemon=True,
        )
        for rank in range(count)
    ]
    with _signals_passed_on(processes) as received:
        _until(processes, lambda: any(process.exitcode for process in processes))
        _until(processes, _late(_PATIENCE))
        codes = [process.exitcode for process in processes]
        for end in (BaseProcess.terminate, BaseProcess.kill):
            for process in filter(BaseProcess.is_alive, processes):
                end(process)
            _until(processes, _late(_PATIENCE))
    ended = (Ended(rank, code) for rank, code in enumerate(codes) if code is not None)
    return min(ended, key=_cause)._replace(stop=next(iter(received), None))


def _cause(ended: Ended) -> int:
    """Least for what others followed from."""
    return {0: 3, PEER_LOST: 2, -signal.SIGTERM: 1}.get(ended.code, 0)


def _late(seconds: float) -> Callable[[], bool]:
    limit = time.monotonic() + seconds
    return lambda: time.monotonic() > limit


def _until(processes: Sequence[BaseProcess], enough: Callable[[], bool]) -> None:
    """Wait for all processes to end, or `enough`."""
    while not enough() and (alive := [each.sentinel for each in processes if each.is_alive()]):
        wait(alive, timeout=0.5)


@contextmanager
def _signals_passed_on(processes: Sequence[BaseProcess]) -> Generator[list[int]]:
    """Yields the signals that came."""
    received: list[int] = []

    def pass_on(number: int, _: Any) -> None:
        received.append(number)
        for process in filter(BaseProcess.is_alive, processes):
            process.terminate()

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        # inherited as ignored: a Ctrl-C would reach them before they have left the terminal's group
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for process in processes:
            process.start()
        for number in before:
            signal.signal(number, pass_on)
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _enter(
    surroundings: dict[str, str], work: Callable[..., None], arguments: Sequence[Any]
) -> None:
    os.setpgid(0, 0)  # out of the terminal's group: signals come from the parent alone
    os.environ.update(surroundings)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    work(*arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
