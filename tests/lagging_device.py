"""A device whose copies and computing each lag as far behind as the events between them allow."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from routesae_cache.batch_slots import Batch

UNTOUCHED = 7.0


class Mark:
    """A place in a stream's work."""

    done = False


class Event:
    """The last place marked."""

    def __init__(self, device: LaggingDevice) -> None:
        self._device, self.last = device, None

    def synchronize(self) -> None:
        self._device.run_until(self.last)


class LaggingDevice:
    """In the place of `Copies`: two streams that run when they are made to, or one at once."""

    def __init__(self, eager: str) -> None:
        self.streams: dict[str, deque[Callable[[], bool]]] = {"copy": deque(), "compute": deque()}
        self.untouched: list[bool] = []
        """Whether memory was left alone until what was computed before its time had ended."""
        self._eager, self._lock = eager, threading.RLock()

    def memory(self, shape: tuple[int, int, int]) -> tuple[Batch, Batch]:
        here, there = (
            Batch(
                torch.full(shape, UNTOUCHED),
                *(torch.full(shape[:1], int(UNTOUCHED)) for _ in range(2)),
            )
            for _ in range(2)
        )
        self.compute(lambda: self.untouched.append(bool((there.x_NLD == UNTOUCHED).all())))
        return here, there

    def event(self) -> Event:
        return Event(self)

    def copy(self, there: Batch, here: Batch, *, after: Event, mark: Event) -> None:
        def work() -> None:
            for target, source in zip(there, here, strict=True):
                target.copy_(source)

        self._put("copy", self._waiting(after), _always(work), self._marking(mark))

    def wait(self, event: Event) -> None:
        self._put("compute", self._waiting(event))

    def mark(self, event: Event) -> None:
        self._put("compute", self._marking(event))

    def compute(self, work: Callable[[], Any]) -> None:
        """Something to be done after what was asked before."""
        self._put("compute", _always(work))

    def run_until(self, mark: Mark | None) -> None:
        """Do what has to be done before a place is reached, copies first; None: nothing."""
        with self._lock:
            while mark is not None and not mark.done:
                assert self._step("copy") or self._step("compute"), "both wait for ever"

    def finish(self) -> None:
        """Do everything that was asked for."""
        with self._lock:
            while self._step("copy") or self._step("compute"):
                pass
            assert not any(self.streams.values())

    def _put(self, stream: str, *work: Callable[[], bool]) -> None:
        with self._lock:
            self.streams[stream].extend(work)
            while self._eager in self.streams and self._step(self._eager):
                pass

    def _step(self, stream: str) -> bool:
        todo = self.streams[stream]
        if not todo or not todo[0]():
            return False
        todo.popleft()
        return True

    def _waiting(self, event: Event) -> Callable[[], bool]:
        mark = event.last
        return lambda: mark is None or mark.done

    def _marking(self, event: Event) -> Callable[[], bool]:
        event.last = mark = Mark()
        return _always(lambda: setattr(mark, "done", True))


def _always(work: Callable[[], Any]) -> Callable[[], bool]:
    def done() -> bool:
        work()
        return True

    return done
