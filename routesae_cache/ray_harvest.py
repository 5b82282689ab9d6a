"""A harvest on a Ray cluster: a driver hands out chunks to workers that each have the model."""

from __future__ import annotations

import dataclasses
import threading
import time
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from routesae_cache.devices import resolve_device
from routesae_cache.harvest import (
    HarvestProgress,
    Progress,
    WorkerProgress,
    fill_residuals,
    load_model,
    store_with_rows,
)
from routesae_cache.harvest_plan import HarvestPlan
from routesae_cache.ray_actor import Worker
from routesae_cache.ray_cluster import RayConfig
from routesae_cache.ray_pool import Done, Place, Pool, UnlikeWorkersError, pool
from routesae_cache.workers import open_shared
from stores.errors import SpecMismatchError
from stores.writer import StoreWriter

_AHEAD = 2  # chunks: on a GPU one is encoded and written while the model is at the next
_ANOTHERS_S = 0.5  # until a chunk that another process has is asked for again


@dataclass(frozen=True, kw_only=True)
class WorkerResult:
    """What one worker did."""

    index: int
    host: str
    chunks: int
    tokens: int
    seconds: float
    """In forward passes, encoding and writing."""
    deaths: int
    """Times that it died and another took its place."""


@dataclass(frozen=True, kw_only=True)
class RayResult:
    """What a call of `harvest_on_ray` did."""

    tokens: int
    """Whose residuals were computed in this call."""
    seconds: float
    """In which the chunks were filled in."""
    workers: tuple[WorkerResult, ...]


def harvest_on_ray(
    plan: HarvestPlan, config: RayConfig, progress: Progress = lambda _: None
) -> RayResult:
    """Carry out a plan on a Ray cluster; whatever ends it, any kind of harvest goes on from there.

    A worker that dies is replaced, and its chunks are done by others. Raises what `harvest` does,
    whichever worker it was found by, and ValueError where workers only die.
    """
    plan.check_disk()
    # of no use to the workers
    make = partial(_Filler, dataclasses.replace(plan, text=None, tokenizer=None))
    with pool(config, make, describe=_describe, ahead=_AHEAD) as workers:
        start = time.monotonic()

        def loading() -> None:
            waited = int(time.monotonic() - start)
            progress(HarvestProgress(phase="loading", done=waited, total=0))

        try:
            model = workers.wait_for_one(loading)
            if plan.text is not None:
                with store_with_rows(plan, model, progress):
                    pass
            with open_shared(plan, model) as writer:
                return _Filling(workers, writer, progress).run()
        except UnlikeWorkersError as error:
            raise SpecMismatchError(
                plan.config.out,
                [
                    f"model.{key}: the first worker has {error.first.get(key)!r}, "
                    f"the one on {error.host} {value!r}"
                    for key, value in error.other.items()
                    if value != error.first.get(key)
                ],
            ) from error


class _Filled(NamedTuple):
    """What a worker did for a chunk; no tokens where it was another process's."""

    tokens: int
    bytes_written: int
    values_written: int


class _Filler(Worker[int, _Filled]):
    """Loads the model once, fills in the chunks that it is told."""

    def __init__(self, plan: HarvestPlan) -> None:
        resolve_device(plan.device)
        self._plan, self._lm = plan, load_model(plan)
        self.hello = self._lm.identity.to_dict()
        self._writer: StoreWriter | None = None
        self._opening, self._model_turn = threading.Lock(), threading.Lock()

    def work(self, task: int) -> _Filled:
        """Compute, encode and commit a chunk, if it can be had."""
        with self._opening:
            if self._writer is None:
                self._writer = open_shared(self._plan, self.hello)
        states: list[HarvestProgress] = []
        tokens = fill_residuals(
            self._writer, self._lm, [task], states.append, turn=self._model_turn
        )
        if not states:
            time.sleep(_ANOTHERS_S)
            return _Filled(0, 0, 0)
        return _Filled(tokens, states[-1].bytes_written, states[-1].values_written)

    def close(self) -> None:
        """Give the store's lock back."""
        if self._writer is not None:
            self._writer.close()


class _Filling:
    """The driver's part: every chunk that is pending is filled in, and what came of it counted."""

    def __init__(
        self, workers: Pool[int, _Filled], writer: StoreWriter, progress: Progress
    ) -> None:
        self._workers, self._writer, self._progress = workers, writer, progress
        self._tokens = [0] * len(workers.places)
        pending = writer.pending()
        workers.waiting.extend(pending)
        total = sum(map(writer.spec.chunk_tokens, pending))
        self._state = HarvestProgress(phase="residuals", done=0, total=total)

    def run(self) -> RayResult:
        start = time.perf_counter()
        for done in self._workers.results(self._report):
            if done.result.tokens:
                self._credit(done)
            elif done.task in self._writer.pending():  # another process has it
                self._workers.waiting.append(done.task)
            else:  # or had it
                total = self._state.total - self._writer.spec.chunk_tokens(done.task)
                self._state = dataclasses.replace(self._state, total=total)
        return RayResult(
            tokens=self._state.done,
            seconds=time.perf_counter() - start,
            workers=tuple(map(self._result, self._workers.places)),
        )

    def _credit(self, done: Done[int, _Filled]) -> None:
        self._tokens[done.worker] += done.result.tokens
        self._state = dataclasses.replace(
            self._state,
            done=self._state.done + done.result.tokens,
            bytes_written=self._state.bytes_written + done.result.bytes_written,
            values_written=self._state.values_written + done.result.values_written,
        )

    def _report(self) -> None:
        workers = tuple(map(self._at, self._workers.places))
        self._progress(dataclasses.replace(self._state, workers=workers))

    def _at(self, place: Place[int]) -> WorkerProgress:
        return WorkerProgress(
            index=place.index,
            host=place.host,
            pid=place.pid,
            tokens_per_second=self._tokens[place.index] / sum(place.took) if place.took else 0.0,
            chunks=tuple(place.in_hand),
            seconds=place.seconds,
            straggles=place.straggles,
        )

    def _result(self, place: Place[int]) -> WorkerResult:
        return WorkerResult(
            index=place.index,
            host=place.host or "",
            chunks=len(place.took),
            tokens=self._tokens[place.index],
            seconds=sum(place.took),
            deaths=place.deaths,
        )


def _describe(chunk: int) -> str:
    return f"chunk {chunk}"
