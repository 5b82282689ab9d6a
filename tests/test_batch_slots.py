"""Batches on their way to a device: nothing is overwritten or used before its time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch

from routesae_cache.batch_slots import (
    Batch,
    PinnedSlot,
    Slot,
    filled_in_background,
    make_slots,
)
from tests.lagging_device import LaggingDevice

SHAPE = (4, 2, 3)
SIZES = [4, 4, 3, 4, 1, 4, 4, 2]


def numbered(next_free: Callable[[], Slot]) -> Iterator[tuple[Slot, int]]:
    """Batches full of their number."""
    for number, size in enumerate(SIZES):
        slot = next_free()
        for part in slot.room():
            part[:size] = number
        yield slot, size


def check(batches: list[Batch]) -> None:
    assert [len(batch.row_N) for batch in batches] == SIZES
    for number, batch in enumerate(batches):
        assert all((part == number).all() for part in batch)


@pytest.mark.parametrize("n_slots", [1, 2, 4])
def test_slots_go_round(n_slots: int) -> None:
    slots = [Slot(SHAPE, "cpu") for _ in range(n_slots)]
    with filled_in_background(numbered, slots) as batches:
        check([Batch(*(part.clone() for part in batch)) for batch in batches])


@pytest.mark.parametrize("n_slots", [1, 2, 3])
@pytest.mark.parametrize("eager", ["neither", "copy", "compute"])
def test_a_lagging_device_computes_from_what_was_sent(eager: str, n_slots: int) -> None:
    device = LaggingDevice(eager)
    found: list[Batch] = []

    def use(batch: Batch) -> None:
        found.append(Batch(*(part.clone() for part in batch)))

    slots = [PinnedSlot(SHAPE, device) for _ in range(n_slots)]
    with filled_in_background(numbered, slots) as batches:
        for batch in batches:
            device.compute(partial(use, batch))
    assert not device.streams["copy"]  # or the memory might be another's by then
    device.finish()
    check(found)
    assert device.untouched == [True] * n_slots


def test_leaving_early_ends_the_thread() -> None:
    before = threading.active_count()
    device = LaggingDevice("neither")
    slots = [PinnedSlot(SHAPE, device) for _ in range(2)]
    with filled_in_background(numbered, slots) as batches:
        next(batches)
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    assert not device.streams["copy"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_cuda_device() -> None:
    found = []
    with filled_in_background(numbered, make_slots(SHAPE, "cuda")) as batches:
        for batch in batches:
            assert batch.x_NLD.is_cuda
            torch.cuda._sleep(10_000_000)  # so that the host is ahead
            found.append(Batch(*(part.clone() for part in batch)))
    check([Batch(*(part.cpu() for part in batch)) for batch in found])
