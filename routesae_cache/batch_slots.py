"""Room for a few batches, which a background thread fills and the user's thread empties."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stores.codecs import Float32

_SLOTS = 4  # one is filled, one is used, two are ready
_PINNED_SLOTS = 2  # each is on the device, too; the host's part is free once it was copied


class Batch(NamedTuple):
    """N tokens; valid until the next batch is asked for."""

    x_NLD: Tensor
    """float32 on the asked device; the layers as asked."""
    row_N: Tensor
    """int64, row of the store."""
    position_N: Tensor
    """int64, position in the row."""

    def first(self, n_tokens: int) -> Batch:
        """The first tokens alone, in the same memory."""
        return Batch(*(part[:n_tokens] for part in self))


class Room(NamedTuple):
    """Where a batch is to be written, on the host."""

    x_NLD: Float32
    row_N: NDArray[np.int64]
    position_N: NDArray[np.int64]


class Slot:
    """Room for one batch, and its way to the device."""

    def __init__(self, shape: tuple[int, int, int], device: str) -> None:
        self._device = device
        self._host = _empty(shape)
        self._room = Room(*(part.numpy() for part in self._host))

    def room(self) -> Room:
        """Where to write; the filling thread asks once the slot is free."""
        return self._room

    def send(self, n_tokens: int) -> None:
        """So many tokens were written, says the filling thread."""

    def receive(self, n_tokens: int) -> Batch:
        """What was sent, for the user's thread."""
        return Batch(*(part.to(self._device) for part in self._host.first(n_tokens)))

    def release(self) -> None:
        """The user's thread asks for nothing more of what it received."""

    def close(self) -> None:
        """Nothing is written to the memory from here on."""


class Copies:
    """A CUDA device, and a stream of copies to it beside what it computes; untried on hardware."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def memory(self, shape: tuple[int, int, int]) -> tuple[Batch, Batch]:
        """Of the host, pinned, and of the device."""
        return _empty(shape, pin_memory=True), _empty(shape, device=self._device)

    def event(self) -> torch.cuda.Event:
        """One that marks nothing yet: to wait for it is to go on at once."""
        # a thread that waits for it leaves its core to others
        return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def copy(
        self, there: Batch, here: Batch, *, after: torch.cuda.Event, mark: torch.cuda.Event
    ) -> None:
        """Copy once the device is at `after`, then mark; returns at once."""
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(after)
            for target, source in zip(there, here, strict=True):
                target.copy_(source, non_blocking=True)
            mark.record(self._stream)

    def wait(self, event: torch.cuda.Event) -> None:
        """Have what is computed from here on wait for the event."""
        torch.cuda.current_stream(self._device).wait_event(event)

    def mark(self, event: torch.cuda.Event) -> None:
        """Mark the end of what is computed up to here."""
        event.record(torch.cuda.current_stream(self._device))


class PinnedSlot(Slot):
    """Room for one batch on the host and on a device, which copies while it computes.

    Nobody waits for the other to have done, only for what is theirs to use again: the host for
    the end of the last copy, the copy for the last use, the computing for the copy.
    """

    def __init__(self, shape: tuple[int, int, int], copies: Copies) -> None:
        self._copies = copies
        self._host, self._there = copies.memory(shape)
        self._room = Room(*(part.numpy() for part in self._host))
        self._copied, self._used = copies.event(), copies.event()
        copies.mark(self._used)  # the memory may be another tensor's that is still computed with

    def room(self) -> Room:
        self._copied.synchronize()
        return self._room

    def send(self, n_tokens: int) -> None:
        there, here = self._there.first(n_tokens), self._host.first(n_tokens)
        self._copies.copy(there, here, after=self._used, mark=self._copied)

    def receive(self, n_tokens: int) -> Batch:
        self._copies.wait(self._copied)
        return self._there.first(n_tokens)

    def release(self) -> None:
        self._copies.mark(self._used)

    def close(self) -> None:
        self._copied.synchronize()


def make_slots(shape: tuple[int, int, int], device: str) -> Sequence[Slot]:
    """As many as are needed for neither thread to wait for the other; shape: (N, L, D)."""
    if torch.device(device).type != "cuda":
        return [Slot(shape, device) for _ in range(_SLOTS)]
    copies = Copies(device)
    return [PinnedSlot(shape, copies) for _ in range(_PINNED_SLOTS)]


Fill = Callable[[Callable[[], Slot]], Iterator[tuple[Slot, int]]]
"""Given what waits for a free slot: yields slots with the number of tokens written to them."""


@contextmanager
def filled_in_background(fill: Fill, slots: Sequence[Slot]) -> Generator[Iterator[Batch]]:
    """Run `fill` in a thread, as far ahead as there are slots; its error is raised to the user."""
    free: queue.SimpleQueue[Slot | None] = queue.SimpleQueue()
    ready: queue.SimpleQueue[tuple[Slot, int] | BaseException | None] = queue.SimpleQueue()
    stopped = threading.Event()
    for slot in slots:
        free.put(slot)

    def next_free() -> Slot:
        slot = free.get()
        if slot is None or stopped.is_set():
            raise _Stopped
        return slot

    def work() -> None:
        try:
            for slot, n_tokens in fill(next_free):
                slot.send(n_tokens)
                ready.put((slot, n_tokens))
            ready.put(None)
        except BaseException as error:  # handed over to the user's thread
            ready.put(error)

    def consume() -> Iterator[Batch]:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            slot, n_tokens = item
            yield slot.receive(n_tokens)
            slot.release()
            free.put(slot)

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        yield consume()
    finally:
        stopped.set()
        free.put(None)
        thread.join()
        for slot in slots:
            slot.close()


class _Stopped(Exception):
    """The user has left; no slot will be free again."""


def _empty(shape: tuple[int, int, int], **where: Any) -> Batch:
    indices = [torch.empty(shape[0], dtype=torch.int64, **where) for _ in range(2)]
    return Batch(torch.empty(shape, **where), *indices)
