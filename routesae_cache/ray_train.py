"""A training pass on a Ray cluster: SAEs are packed onto workers, each passes over the store."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from routesae_cache.checkpoint import checkpoint_step
from routesae_cache.devices import resolve_device
from routesae_cache.kernels import keep_freed_memory
from routesae_cache.loggers import LoggerError
from routesae_cache.packing import pack
from routesae_cache.ray_actor import Worker
from routesae_cache.ray_cluster import RayConfig
from routesae_cache.ray_pool import Pool, pool
from routesae_cache.runs import Asked, RunState
from routesae_cache.saes.config import SaeConfig
from routesae_cache.saes.registry import build_sae
from routesae_cache.train import TrainProgress, TrainResult, train
from routesae_cache.train_plan import TrainConfig, TrainStart, prepare
from stores.place import Place
from stores.reader import StoreReader

Group = tuple[int, ...]
"""SAEs of one worker, by their numbers in the pass."""


def train_on_ray(
    reader: StoreReader,
    saes: Sequence[Asked],
    config: TrainConfig,
    progress: Callable[[TrainProgress], None] = lambda _: None,
    *,
    cluster: RayConfig,
    on_start: Callable[[TrainStart], None] = lambda _: None,
    stopped: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Train SAEs as `train` does, shared out over the workers of a cluster.

    Each SAE gets the numbers that one pass would give it. Those of a worker that dies are gone on
    with by another, from their last checkpoints. Raises what `train` does, and ValueError where
    there is no such cluster or workers only die.
    """
    plan, _ = prepare(reader, saes, config)
    with ExitStack() as holding:  # from there on the workers have them
        ended = plan.settle(holding)
    names = [run.name for run in plan.runs]
    states = [s or RunState(name, "training") for s, name in zip(ended, names, strict=True)]
    todo = [index for index, state in enumerate(ended) if state is None]
    steps = {index: checkpoint_step(plan.folders[index]) for index in todo}
    start = min(steps.values(), default=plan.total_steps)
    begin = time.perf_counter()
    if todo:
        asked = [saes[index].sae for index in todo]
        layers = tuple(sorted({layer for sae in asked for layer in sae.layers}))
        groups = _groups(reader, saes, todo, cluster.workers)
        parameters = sum(_parameters(plan.runs[index].sae, reader.spec.width) for index in todo)
        on_start(plan.start_of(len(todo), parameters, start, layers))
        # the folders were looked at above; what is in them now is to be gone on with
        given = dataclasses.replace(
            config, resume=True, replace_changed=False, chunks=len(plan.chunks)
        )
        make = partial(_Trainer, reader.path, saes, given)
        cluster = dataclasses.replace(cluster, workers=len(groups))
        with pool(cluster, make, describe=partial(_describe, names)) as workers:
            workers.waiting.extend(groups)
            passing = _Passing(workers, plan.folders, states, steps, plan.total_steps)

            def tick() -> None:
                if stopped():
                    workers.stop()
                step = passing.update()
                tokens = (step - start) * plan.batch_tokens
                progress(TrainProgress(step, plan.total_steps, tokens, list(states)))

            passing.run(tick)
    step = min(steps.values(), default=plan.total_steps)
    return TrainResult(
        runs=states,
        folders=plan.folders,
        tokens=(step - start) * plan.batch_tokens,
        seconds=time.perf_counter() - begin,
        interrupted=any(state.status == "interrupted" for state in states),
    )


def _groups(
    reader: StoreReader, saes: Sequence[Asked], todo: Sequence[int], workers: int
) -> list[Group]:
    spec = reader.spec
    packed = pack(
        [saes[index].sae for index in todo],
        workers,
        lambda layers: len(spec.codec.required(spec.positions(tuple(sorted(layers))))),
    )
    return [tuple(todo[number] for number in group) for group in packed]


class _At(NamedTuple):
    """How far a worker is with a group."""

    group: Group
    progress: TrainProgress


class _Trainer(Worker[Group, TrainResult]):
    """Trains the SAEs that it is told, all of them in one pass."""

    def __init__(self, store: Place, saes: Sequence[Asked], config: TrainConfig) -> None:
        resolve_device(config.device)
        keep_freed_memory()
        self._reader, self._saes, self._config = StoreReader(store), saes, config
        self._stopped = threading.Event()
        self._at: _At | None = None

    def work(self, task: Group) -> TrainResult:
        """Train a group, or go on with it, until it ends or is stopped."""

        def note(progress: TrainProgress) -> None:
            self._at = _At(task, progress)

        return train(
            self._reader,
            self._saes,
            self._config,
            note,
            only=task,
            stopped=self._stopped.is_set,
        )

    def state(self) -> _At | None:
        return self._at

    def stop(self) -> None:
        """Write checkpoints after the step it is at."""
        self._stopped.set()


class _Passing:
    """The driver's part: what the workers say becomes the states and steps of one pass."""

    def __init__(
        self,
        workers: Pool[Group, TrainResult],
        folders: Sequence[Path],
        states: list[RunState],
        steps: dict[int, int],
        total_steps: int,
    ) -> None:
        self._workers, self._folders = workers, folders
        self._states, self._steps, self._total_steps = states, steps, total_steps
        self._left = set(workers.waiting)

    def update(self) -> int:
        """Take in how far the workers are; returns the step that every SAE has behind it."""
        for place in self._workers.places:
            at: _At | None = place.state
            if at is not None and at.group in self._left:
                self._take_in(at.group, at.progress.runs, at.progress.step)
        return min(self._steps.values())

    def run(self, tick: Callable[[], None]) -> None:
        """Until every group has ended or was stopped."""
        try:
            self._take_results(tick)
        except LoggerError:
            self._workers.stop()
            while any(place.in_hand for place in self._workers.places):
                with suppress(LoggerError):  # one is enough
                    self._take_results(tick)
            raise
        for group in self._left:  # not begun, or its worker died when it was to stop
            for index in group:
                self._states[index] = dataclasses.replace(self._states[index], status="interrupted")

    def _take_results(self, tick: Callable[[], None]) -> None:
        for done in self._workers.results(tick):
            self._left.discard(done.task)
            self._take_in(done.task, done.result.runs, self._total_steps)
            for index in done.task:
                if self._states[index].status == "interrupted":
                    self._steps[index] = checkpoint_step(self._folders[index])

    def _take_in(self, group: Group, runs: Sequence[RunState], step: int) -> None:
        for index, state in zip(group, runs, strict=True):
            self._states[index], self._steps[index] = state, step


def _parameters(sae: SaeConfig, width: int) -> int:
    with torch.device("meta"):  # sizes alone
        return sum(p.numel() for p in build_sae(sae, width, 0).parameters())


def _describe(names: Sequence[str], group: Group) -> str:
    more = f" and {len(group) - 1} more" if len(group) > 1 else ""
    return names[group[0]] + more
