"""What is said of the time left: of the work of this call, whatever was done before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from rich.progress import Progress

from cli import console
from cli.harvesting import HarvestBar
from cli.training import _Display
from routesae_cache.harvest import HarvestProgress
from routesae_cache.train import TrainProgress


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(console, "Progress", partial(_Kept, get_time=clock, disable=False))
    return clock


class _Kept(Progress):
    """Can be asked what it shows."""

    last: Progress

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _Kept.last = self


@pytest.fixture
def bar(clock: Clock) -> Iterator[Callable[..., None]]:
    with console.bar("Bar") as update:
        yield update


def seconds_left() -> float:
    left = _Kept.last.tasks[0].time_remaining
    assert left is not None
    return left


def test_of_what_goes_on_in_the_middle(bar: Callable[..., None], clock: Clock) -> None:
    bar(begin=900)
    for done in range(901, 911):
        clock.now += 2.0
        bar(completed=done, total=1000)
    assert seconds_left() == pytest.approx(2.0 * 90, rel=0.15)
    assert _Kept.last.tasks[0].percentage == pytest.approx(91.0)


def test_of_a_harvest_whose_tokens_came_quickly(bar: Callable[..., None], clock: Clock) -> None:
    show = HarvestBar(bar)
    for done in range(100, 1100, 100):
        clock.now += 0.01
        show(HarvestProgress(phase="tokens", done=done, total=1000))
    for done in range(10, 110, 10):
        clock.now += 1.0
        show(HarvestProgress(phase="residuals", done=done, total=1000))
    assert seconds_left() == pytest.approx(90.0, rel=0.15)


def test_of_a_training_that_goes_on(clock: Clock) -> None:
    display = _Display(_Kept(get_time=clock), lambda: False)
    display.begin(5000, 6000)
    for step in range(5001, 5011):
        clock.now += 3.0
        display.update(TrainProgress(step, 6000, 10, []))
    assert seconds_left() == pytest.approx(3.0 * 990, rel=0.15)
