"""A harvest on a Ray cluster: a driver hands out chunks to actors that each have the model."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import re
import socket
import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

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
from routesae_cache.workers import open_shared
from stores.errors import SpecMismatchError, StoreError
from stores.spec import Record
from stores.writer import StoreWriter

logger = logging.getLogger(__name__)
LOCAL = "local"
_POLL_S = 0.5
_STRAGGLES = 3  # times the usual time for a chunk
_STRAGGLES_S = 5.0  # at least
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # what it would print about a worker's death, we say
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """Where the workers run, and how many."""

    address: str
    """`local` for a cluster of this machine alone that ends with the harvest, `auto` for the one
    that runs here, or HOST:PORT."""
    workers: int
    gpus_per_worker: float = 0.0

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers: expected at least 1, found {self.workers}")
        if not 0 <= self.gpus_per_worker < math.inf:
            raise ValueError(f"gpus per worker: expected 0 or more, found {self.gpus_per_worker}")
        known = self.address in (LOCAL, "auto")
        if not known and not re.fullmatch(r"[^:/]+:\d+|\[[^/]+\]:\d+", self.address):
            raise ValueError(
                f"ray: expected local, auto or HOST:PORT, found {self.address!r}; "
                "start the harvest on a node of the cluster"
            )
        _ray()  # is found missing now

    @property
    def device(self) -> str:
        """Of every worker."""
        return "cuda" if self.gpus_per_worker else "cpu"


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

    A worker that dies is replaced, and its chunk is done by another. Raises what `harvest` does,
    whichever worker it was found by, and StoreError where workers only die.
    """
    plan.check_disk()
    with _cluster(config) as ray:
        team = _Team(ray, plan, config)
        try:
            model = team.wait_for_model(progress)
            if plan.text is not None:
                with store_with_rows(plan, model, progress):
                    pass
            with open_shared(plan, model) as writer:
                return team.fill(writer, progress)
        finally:
            team.dismiss()


class _Loaded(NamedTuple):
    """What an actor says of itself once it has the model."""

    model: Record
    host: str
    pid: int


class _Filled(NamedTuple):
    """What an actor did for a chunk; no tokens where it was another process's."""

    tokens: int
    bytes_written: int
    values_written: int
    seconds: float


class _Filler:
    """An actor: loads the model once, fills in the chunks that it is told."""

    def __init__(self, plan: HarvestPlan, threads: int) -> None:
        self._plan, self._threads = plan, threads
        self._writer: StoreWriter | None = None

    def load(self) -> _Loaded:
        """Load the model; the same number of threads for every worker."""
        torch.set_num_threads(self._threads)
        resolve_device(self._plan.device)
        self._lm = load_model(self._plan)
        return _Loaded(self._lm.identity.to_dict(), socket.gethostname(), os.getpid())

    def fill(self, chunk: int) -> _Filled:
        """Compute, encode and commit a chunk, if it can be had."""
        start = time.perf_counter()
        if self._writer is None:
            self._writer = open_shared(self._plan, self._lm.identity.to_dict())
        states: list[HarvestProgress] = []
        tokens = fill_residuals(self._writer, self._lm, [chunk], states.append)
        if not states:
            time.sleep(_POLL_S)  # before it is asked for again
            return _Filled(0, 0, 0, 0.0)
        last = states[-1]
        seconds = time.perf_counter() - start
        return _Filled(tokens, last.bytes_written, last.values_written, seconds)

    def leave(self) -> None:
        """Give the store's lock back."""
        if self._writer is not None:
            self._writer.close()


@dataclass(kw_only=True, eq=False)
class _Worker:
    """The driver's side of an actor, and of those that died before it in its place."""

    index: int
    actor: Any
    loaded: _Loaded | None = None
    chunk: int | None = None
    since: float = 0.0
    seconds: list[float] = field(default_factory=list)
    """That each chunk took."""
    tokens: int = 0
    deaths: int = 0
    straggles: bool = False

    @property
    def rate(self) -> float:
        return self.tokens / sum(self.seconds) if self.seconds else 0.0


class _Team:
    """The actors, what each is at, and what is left to be done."""

    def __init__(self, ray: Any, plan: HarvestPlan, config: RayConfig) -> None:
        self._ray, self._config = ray, config
        self._plan = dataclasses.replace(plan, text=None)  # of no use to the actors
        self._threads = _threads(ray, config)
        self._running: dict[Any, _Worker] = {}
        self._fruitless = 0
        self._model: Record | None = None
        self._pending: deque[int] = deque()
        self._state = HarvestProgress(phase="residuals", done=0, total=0)
        self._workers = [
            _Worker(index=index, actor=self._hire()) for index in range(config.workers)
        ]
        for worker in self._workers:
            self._running[worker.actor.load.remote()] = worker

    def wait_for_model(self, progress: Progress) -> Record:
        """The model's identity, as the first worker has it that loaded it."""
        start = time.monotonic()
        while self._model is None:
            waited = int(time.monotonic() - start)
            progress(HarvestProgress(phase="loading", done=waited, total=0))
            self._settle()
        return self._model

    def fill(self, writer: StoreWriter, progress: Progress) -> RayResult:
        """Have every pending chunk filled in."""
        spec, start = writer.spec, time.perf_counter()
        self._pending.extend(writer.pending())
        self._state = dataclasses.replace(
            self._state, total=sum(map(spec.chunk_tokens, self._pending))
        )
        while self._pending or any(worker.chunk is not None for worker in self._workers):
            for worker in self._workers:
                if worker.loaded and worker.chunk is None and self._pending:
                    self._hand_out(worker)
            progress(self._progress())
            for chunk in self._settle():  # another process has it, or had it
                if chunk in writer.pending():
                    self._pending.append(chunk)
                else:
                    total = self._state.total - spec.chunk_tokens(chunk)
                    self._state = dataclasses.replace(self._state, total=total)
        progress(self._progress())
        return RayResult(
            tokens=self._state.done,
            seconds=time.perf_counter() - start,
            workers=tuple(map(_result, self._workers)),
        )

    def dismiss(self) -> None:
        """End the actors, after those that do nothing gave the store's lock back."""
        idle = [worker for worker in self._workers if worker.loaded and worker.chunk is None]
        leaving = [worker.actor.leave.remote() for worker in idle]
        if leaving:
            self._ray.wait(leaving, num_returns=len(leaving), timeout=10)
        for worker in self._workers:
            self._ray.kill(worker.actor)

    def _hire(self) -> Any:
        actor = self._ray.remote(_Filler).options(
            num_cpus=1, num_gpus=self._config.gpus_per_worker, scheduling_strategy="SPREAD"
        )
        return actor.remote(self._plan, self._threads)

    def _hand_out(self, worker: _Worker) -> None:
        worker.chunk, worker.since = self._pending.popleft(), time.monotonic()
        self._running[worker.actor.fill.remote(worker.chunk)] = worker

    def _settle(self) -> list[int]:
        """Take in what is ready; returns the chunks that could not be had."""
        ready, _ = self._ray.wait(list(self._running), timeout=_POLL_S)
        missed = []
        for reference in ready:
            worker = self._running.pop(reference)
            try:
                found = self._ray.get(reference)
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause from error  # what the worker found wrong
            except self._ray.exceptions.RayError as error:
                self._replace(worker, str(error))
                continue
            if isinstance(found, _Loaded):
                self._take_on(worker, found)
            else:
                chunk, worker.chunk = worker.chunk, None
                assert chunk is not None
                if found.tokens:
                    self._credit(worker, found)
                else:
                    missed.append(chunk)
        return missed

    def _take_on(self, worker: _Worker, loaded: _Loaded) -> None:
        self._model = self._model or loaded.model
        if loaded.model != self._model:
            raise SpecMismatchError(
                self._plan.config.out,
                [
                    f"model.{key}: the first worker has {self._model.get(key)!r}, "
                    f"the one on {loaded.host} {value!r}"
                    for key, value in loaded.model.items()
                    if value != self._model.get(key)
                ],
            )
        worker.loaded = loaded

    def _credit(self, worker: _Worker, filled: _Filled) -> None:
        self._fruitless = 0
        worker.tokens += filled.tokens
        worker.seconds.append(filled.seconds)
        self._state = dataclasses.replace(
            self._state,
            done=self._state.done + filled.tokens,
            bytes_written=self._state.bytes_written + filled.bytes_written,
            values_written=self._state.values_written + filled.values_written,
        )

    def _replace(self, worker: _Worker, reason: str) -> None:
        """Another actor for one that died; its chunk is the next to be handed out."""
        self._fruitless += 1
        what = reason.strip().splitlines()[0] if reason.strip() else "no reason given"
        if self._fruitless > 2 * len(self._workers) + 1:
            raise StoreError(
                f"workers died {self._fruitless} times in a row and no chunk was finished: {what} "
                "Is there memory for the model? Ray's logs are in /tmp/ray/session_latest/logs"
            )
        logger.warning(
            "worker %d%s died%s and is replaced: %s",
            worker.index,
            f" on {worker.loaded.host}" if worker.loaded else "",
            "" if worker.chunk is None else f" at chunk {worker.chunk}, which another takes,",
            what,
        )
        if worker.chunk is not None:
            self._pending.appendleft(worker.chunk)
        self._ray.kill(worker.actor)  # where it was only out of reach
        worker.actor, worker.loaded, worker.chunk = self._hire(), None, None
        worker.deaths += 1
        self._running[worker.actor.load.remote()] = worker

    def _progress(self) -> HarvestProgress:
        took = [seconds for worker in self._workers for seconds in worker.seconds]
        usual = statistics.median(took) if len(took) > 2 else math.inf
        now = time.monotonic()
        for worker in self._workers:
            slow = worker.chunk is not None and now - worker.since > max(
                _STRAGGLES * usual, _STRAGGLES_S
            )
            if slow and not worker.straggles:
                logger.warning(
                    "worker %d on %s is slow: %.0f s at chunk %d so far, %.0f s is usual",
                    *(worker.index, worker.loaded.host if worker.loaded else "?"),
                    *(now - worker.since, worker.chunk, usual),
                )
            worker.straggles = slow
        workers = tuple(
            WorkerProgress(
                index=worker.index,
                host=worker.loaded.host if worker.loaded else None,
                pid=worker.loaded.pid if worker.loaded else None,
                tokens_per_second=worker.rate,
                chunk=worker.chunk,
                seconds=now - worker.since if worker.chunk is not None else 0.0,
                straggles=worker.straggles,
            )
            for worker in self._workers
        )
        return dataclasses.replace(self._state, workers=workers)


def _result(worker: _Worker) -> WorkerResult:
    return WorkerResult(
        index=worker.index,
        host=worker.loaded.host if worker.loaded else "",
        chunks=len(worker.seconds),
        tokens=worker.tokens,
        seconds=sum(worker.seconds),
        deaths=worker.deaths,
    )


def _ray() -> Any:
    os.environ.update(_ENVIRONMENT)
    try:
        import ray
    except ImportError:
        raise ValueError(
            "--ray needs Ray, which is not installed: pip install 'routesae-cache[ray]'"
        ) from None
    return ray


@contextmanager
def _cluster(config: RayConfig) -> Iterator[Any]:
    """Ray, connected; a local cluster is started, and ends with the block or the process."""
    ray = _ray()
    where: dict[str, Any] = {"address": config.address}
    if config.address == LOCAL:
        where |= {"num_cpus": max(config.workers, _cores()), "include_dashboard": False}
        where |= {"object_store_memory": 100 << 20}  # chunks do not go through it
    try:
        if config.address not in (LOCAL, "auto"):  # Ray itself tries for a minute
            host, _, port = config.address.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        ray.init(**where, log_to_driver=False, logging_level=logging.CRITICAL)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ValueError(
            f"no Ray cluster at {config.address!r}: {error}\nStart one with `ray start --head` "
            "and this command on one of its nodes, or use --ray local"
        ) from error
    try:
        gpus = ray.cluster_resources().get("GPU", 0)
        if config.gpus_per_worker > gpus:
            raise ValueError(
                f"a worker is to have {config.gpus_per_worker:g} GPUs, the Ray cluster has "
                f"{gpus:g}; lower --gpus-per-worker (0: on CPUs)"
            )
        yield ray
    finally:
        ray.shutdown()


def _threads(ray: Any, config: RayConfig) -> int:
    """PyTorch's threads in each worker: cores of the smallest node, over its workers."""
    if config.address == LOCAL:
        return max(1, _cores() // config.workers)
    cores = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    nodes = [int(n) for n in cores if n >= 1]
    return max(1, min(nodes, default=1) // math.ceil(config.workers / max(1, len(nodes))))


def _cores() -> int:
    return len(os.sched_getaffinity(0))
