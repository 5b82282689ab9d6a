"""Training any number of SAEs in lockstep, from one stream of batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from routesae_cache.batches import Batch
from routesae_cache.loggers import LoggerError
from routesae_cache.parallel import ALONE, World
from routesae_cache.runs import (
    Asked,
    Run,
    RunState,
)
from routesae_cache.saes.config import SaeConfig
from routesae_cache.train_plan import TrainConfig, TrainPlan, TrainStart, prepare
from stores.reader import StoreReader


@dataclass(frozen=True)
class TrainProgress:
    """How far a pass is."""

    step: int
    total_steps: int
    tokens: int
    """Read in this call."""
    runs: Sequence[RunState]


@dataclass(frozen=True)
class TrainResult:
    """What a pass did."""

    runs: Sequence[RunState]
    folders: Sequence[Path]
    tokens: int
    """Read in this call."""
    seconds: float
    interrupted: bool
    """It was stopped before the last step; `resume` goes on."""


def train(
    reader: StoreReader,
    saes: Sequence[Asked | tuple[SaeConfig, int]],
    config: TrainConfig,
    progress: Callable[[TrainProgress], None] = lambda _: None,
    *,
    only: Sequence[int] | None = None,
    on_start: Callable[[TrainStart], None] = lambda _: None,
    stopped: Callable[[], bool] = lambda: False,
    world: World = ALONE,
) -> TrainResult:
    """Train each SAE on the store's train split, all of them from the same batches.

    A run whose loss is not finite is stopped and marked, the others go on. Where there are several
    processes each calls this with the same arguments, computes its part of every batch and ends
    with the same weights; the leading one writes the files.

    Args:
        saes: each with its seed.
        progress: called after every step.
        only: train but these of the SAEs, each by the very numbers that it has among all.
        on_start: called once, before the first batch is read, if there is anything to train.
        stopped: asked after every step; once it is true, checkpoints are written and the pass ends.
            One process's word is enough.

    Raises:
        RunError: where a run's directory is there already with other settings, or unfinished
            without `resume`.
        InUseError: where another process is training one of the runs.
        ValueError: for layers that the store lacks, SAEs asked for twice, or loggers that cannot
            be had; all of it before any work.
        LoggerError: where a logger breaks down; checkpoints are written first.
        PeerError: where another process ended or raised one of these.
    """
    plan, open_loggers = prepare(reader, saes, config, only, world)
    with ExitStack() as closing:
        states = world.first(lambda: plan.settle(closing))
        with world.together():
            runs = plan.open(states, open_loggers, closing)
        result = _train(plan, runs, progress, on_start, stopped)
    world.wait()
    return result


def _train(
    plan: TrainPlan,
    runs: Sequence[Run | RunState],
    progress: Callable[[TrainProgress], None],
    on_start: Callable[[TrainStart], None],
    stopped: Callable[[], bool],
) -> TrainResult:
    live = [run for run in runs if isinstance(run, Run)]
    begin = time.perf_counter()
    start = step = min((run.step for run in live), default=plan.total_steps)

    def report(step: int) -> None:
        tokens = (step - start) * plan.batch_tokens
        progress(TrainProgress(step, plan.total_steps, tokens, _states(runs)))

    if live:
        parameters = sum(run.parameters for run in live)
        on_start(plan.start_of(len(live), parameters, start, plan.stream.layers))
        plan.start_alike(live)
        with plan.source.batches(start) as batches:
            try:
                step = _lockstep(plan, live, batches, start, report, stopped)
            except LoggerError:
                _save(live)
                raise
    return TrainResult(
        runs=_states(runs),
        folders=plan.folders,
        tokens=(step - start) * plan.batch_tokens,
        seconds=time.perf_counter() - begin,
        interrupted=any(state.status == "interrupted" for state in _states(runs)),
    )


def _lockstep(
    plan: TrainPlan,
    live: list[Run],
    batches: Iterator[Batch],
    start: int,
    report: Callable[[int], None],
    stopped: Callable[[], bool],
) -> int:
    """Every step of a pass; returns the one at which it ended."""
    began = saved = time.perf_counter()
    step, last = start, plan.total_steps
    for step, batch in zip(range(start + 1, last + 1), batches, strict=False):
        logging_step = step % plan.log_every == 0 or step == last
        for run in live:
            if run.step >= step:  # its checkpoint is newer than another's
                continue
            output = run.update(batch.x_NLD)
            if logging_step:
                run.log(output, time.perf_counter() - began)
        live = [run for run in live if run.state.status == "training"]
        if plan.world.any(time.perf_counter() - saved > plan.config.checkpoint_seconds):
            _save(live)
            saved = time.perf_counter()
        report(step)
        if not live or plan.world.any(stopped()):
            break
    for run in live:
        run.end() if step == last else run.interrupt()
    return step


def _save(runs: Sequence[Run]) -> None:
    for run in runs:
        run.save()


def _states(runs: Sequence[Run | RunState]) -> list[RunState]:
    return [run.state if isinstance(run, Run) else run for run in runs]
