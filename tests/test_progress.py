"""What is said of the time left: of the work of this call, whatever was done before."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Progress

from cli import console
from cli.harvesting import HarvestBar
from routesae_cache.harvest import HarvestProgress
from routesae_cache.lm import LanguageModel
from routesae_cache.runs import Run
from tests.command_helpers import routesae
from tests.store_helpers import fill_store, store_spec


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


def note() -> str:
    return str(_Kept.last.tasks[0].fields["note"])


def test_of_what_goes_on_in_the_middle(bar: Callable[..., None], clock: Clock) -> None:
    bar(begin=900)
    for done in range(901, 911):
        clock.now += 2.0
        bar(completed=done, total=1000)
    assert seconds_left() == pytest.approx(2.0 * 90, rel=0.15)
    assert _Kept.last.tasks[0].percentage == pytest.approx(91.0)


def test_of_a_harvest_whose_tokens_came_quickly(bar: Callable[..., None], clock: Clock) -> None:
    show = HarvestBar(bar, clock)
    for done in range(100, 1100, 100):
        clock.now += 0.01
        show(HarvestProgress(phase="tokens", done=done, total=1000))
    for done in range(10, 110, 10):
        clock.now += 1.0
        show(HarvestProgress(phase="residuals", done=done, total=1000))
        assert note() == ("" if done == 10 else "10 tokens/s")
    assert seconds_left() == pytest.approx(90.0, rel=0.15)


class Work:
    """Is done instead of a function: takes longer, notes what is said to be left before it."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self._clock, self._seconds = clock, seconds
        self.stop_at: int | None = None
        self.said: list[tuple[float, float | None]] = []

    def instead_of(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def work(*args: Any, **kwargs: Any) -> Any:
            if len(self.said) == self.stop_at:
                self.stop_at = None
                signal.raise_signal(signal.SIGTERM)
            self.said.append((self._clock.now, _Kept.last.tasks[0].time_remaining))
            self._clock.now += self._seconds
            return function(*args, **kwargs)

        return work

    def assert_right(self) -> None:
        """Once there was something to go by."""
        for now, left in self.said[len(self.said) // 4 :]:
            assert left == pytest.approx(self._clock.now - now, rel=0.15)
        assert _Kept.last.tasks[0].percentage == 100
        self.said.clear()


def test_of_a_harvest_and_one_that_goes_on(
    clock: Clock,
    tiny_model_dir: Path,
    tiny_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work = Work(clock, 2.0)
    residuals = work.instead_of(LanguageModel.residuals)
    monkeypatch.setattr("routesae_cache.lm._check_causal", lambda lm: None)
    monkeypatch.setattr(LanguageModel, "residuals", residuals)
    command = ["harvest", "--model", tiny_model_dir, "--dataset", tiny_corpus, "--layers", "1-3"]
    command += ["--tokens", 1500, "--eval-tokens", 60, "--context", 16, "--chunk-rows", 4]
    command += ["--batch-rows", 2, "--device", "cpu", "--out"]
    assert routesae(*command, tmp_path / "a.zarr").exit_code == 0
    assert len(work.said) > 40
    work.assert_right()
    work.stop_at = 20
    assert routesae(*command, tmp_path / "b.zarr").exit_code == 143
    work.said.clear()
    assert routesae(*command, tmp_path / "b.zarr").exit_code == 0
    assert 20 < len(work.said) < 40
    work.assert_right()


def test_of_a_training_and_one_that_goes_on(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Work(clock, 2.0)
    monkeypatch.setattr(Run, "update", work.instead_of(Run.update))
    monkeypatch.setattr("rich.progress.Progress", partial(_Kept, get_time=clock))
    store = fill_store(tmp_path / "s.zarr", store_spec(context=20, train_rows=60)).path
    command = ["train", store, "--sae", "topk", "--layer", 2, "--latents", 16, "--k", 2]
    command += ["--batch-tokens", 20, "--device", "cpu", "--resume", "--out"]
    assert routesae(*command, tmp_path / "a").exit_code == 0
    assert len(work.said) > 40
    work.assert_right()
    assert note() == "10 tokens/s"
    work.stop_at = 20
    assert routesae(*command, tmp_path / "b").exit_code == 143
    work.said.clear()
    assert routesae(*command, tmp_path / "b").exit_code == 0
    assert 20 < len(work.said) < 40
    work.assert_right()
    assert note() == "10 tokens/s"
