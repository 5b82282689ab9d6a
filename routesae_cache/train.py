"""Training any number of SAEs in lockstep, from one stream of batches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from routesae_cache.batches import Batch, BatchConfig, BatchSource, Norm, first_tokens
from routesae_cache.checkpoint import RunConfig
from routesae_cache.loggers import LogConfig, LoggerError, prepare_loggers
from routesae_cache.runs import (
    Asked,
    Run,
    RunState,
    Stream,
    check_folder,
    run_names,
    set_aside_changed,
    settled,
)
from routesae_cache.saes.config import SaeConfig
from stores.reader import StoreReader
from stores.stats import split_stats

_BIAS_SAMPLE = 2048
_LARGEST_BATCH, _SMALLEST_BATCH, _FEWEST_STEPS = 32768, 256, 1000


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What all SAEs of a pass share."""

    out: Path
    """Each run becomes a directory in it."""
    epochs: int = 1
    tokens: int | None = None
    """Stop after so many tokens; None: after all of them, `epochs` times."""
    batch_tokens: int | None = None
    """None: 64 rows of 512 as in the paper, or what leaves a small store about 1000 steps."""
    lr: float = 5e-4
    seed: int = 42
    """Of the order of the tokens."""
    device: str = "cpu"
    resume: bool = False
    """Go on with runs that were interrupted, and leave those that have ended or failed alone."""
    replace_changed: bool = False
    """Move runs that were made with other settings aside, and train them anew."""
    log_every: int | None = None
    """Steps between lines of metrics.jsonl; None: about 200 lines a run."""
    checkpoint_seconds: float = 120.0
    log: LogConfig = field(default_factory=LogConfig)
    """Loggers beside metrics.jsonl."""

    def __post_init__(self) -> None:
        for name in ("epochs", "tokens", "batch_tokens", "log_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, found {value}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr: expected a positive number, found {self.lr}")
        if self.seed < 0:
            raise ValueError(f"seed: expected a number from 0 on, found {self.seed}")
        if not 0 <= self.checkpoint_seconds < math.inf:
            raise ValueError(f"checkpoint_seconds: found {self.checkpoint_seconds}")


@dataclass(frozen=True)
class TrainStart:
    """What a pass is about to do."""

    saes: int
    """To be trained; runs that have ended do not count."""
    parameters: int
    """Of all of them together."""
    step: int
    """Steps taken already."""
    total_steps: int
    batch_tokens: int
    layers: tuple[int, ...]
    """Read from the store."""


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
    on_start: Callable[[TrainStart], None] = lambda _: None,
    stopped: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Train each SAE on the store's train split, all of them from the same batches.

    A run whose loss is not finite is stopped and marked, the others go on.

    Args:
        saes: each with its seed.
        progress: called after every step.
        on_start: called once, before the first batch is read, if there is anything to train.
        stopped: asked after every step; once it is true, checkpoints are written and the pass ends.

    Raises:
        RunError: where a run's directory is there already with other settings, or unfinished
            without `resume`.
        ValueError: for layers that the store lacks, SAEs asked for twice, or loggers that cannot
            be had; all of it before any work.
        LoggerError: where a logger breaks down; checkpoints are written first.
    """
    plan = _Plan(reader, [Asked(*each) for each in saes], config)
    open_loggers = prepare_loggers(config.log, len(plan.runs))
    for folder, run_config in zip(plan.folders, plan.runs, strict=True):
        if config.replace_changed:
            set_aside_changed(folder, run_config)
        check_folder(folder, run_config, config.resume)
    with ExitStack() as closing:
        runs: list[Run | RunState] = []
        for folder, run_config in zip(plan.folders, plan.runs, strict=True):
            if state := settled(folder, run_config.name):
                runs.append(state)
                continue
            run = Run(folder, run_config, plan.stream, open_loggers)
            closing.callback(run.close)
            runs.append(run)
        return _train(plan, runs, progress, on_start, stopped)


def _train(
    plan: _Plan,
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
        on_start(plan.start_of(live, start))
        plan.initialise_biases([run for run in live if run.step == 0])
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
    plan: _Plan,
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
        if time.perf_counter() - saved > plan.config.checkpoint_seconds:
            _save(live)
            saved = time.perf_counter()
        report(step)
        if not live or stopped():
            break
    for run in live:
        run.end() if step == last else run.interrupt()
    return step


class _Plan:
    """Settings that follow from the store and the SAEs together."""

    def __init__(self, reader: StoreReader, asked: Sequence[Asked], config: TrainConfig) -> None:
        self.reader, self.config = reader, config
        # those of ended runs, too: a resumed pass goes on with the very same batches
        layers = tuple(sorted({layer for each in asked for layer in each.sae.layers}))
        norm: Norm = "token" if all(each.sae.norm == "token" for each in asked) else "none"
        self.stream = Stream(layers, norm, config.device)
        everything = BatchConfig(
            layers=layers,
            batch_tokens=config.batch_tokens or 1,
            norm=norm,
            seed=config.seed,
            epochs=config.epochs,
            device=config.device,
        )
        tokens = min(BatchSource(reader, everything).tokens, config.tokens or math.inf)
        self.batch_tokens = config.batch_tokens or _batch_tokens(int(tokens))
        self.total_steps = int(tokens) // self.batch_tokens
        if not self.total_steps:
            raise ValueError(
                f"{int(tokens)} tokens do not fill one batch of {self.batch_tokens}; "
                "ask for smaller --batch-tokens, more --epochs or more --tokens"
            )
        self.source = BatchSource(reader, replace(everything, batch_tokens=self.batch_tokens))
        self.log_every = config.log_every or max(1, self.total_steps // 200)
        self.runs = self._run_configs(asked)
        self.folders = [config.out / run.name for run in self.runs]

    def _run_configs(self, asked: Sequence[Asked]) -> list[RunConfig]:
        spec = self.reader.spec
        mean_square_L = split_stats(self.reader, "train").mean_square_L
        return [
            RunConfig(
                name=name,
                sae=each.sae,
                width=spec.width,
                seed=each.seed,
                order_seed=self.config.seed,
                lr=self.config.lr if each.lr is None else each.lr,
                batch_tokens=self.batch_tokens,
                total_steps=self.total_steps,
                epochs=self.config.epochs,
                store=str(self.reader.path),
                store_spec=spec.to_dict(),
                mean_square=float(mean_square_L[list(spec.positions(each.sae.layers))].mean()),
            )
            for name, each in zip(run_names(asked), asked, strict=True)
        ]

    def start_of(self, runs: Sequence[Run], step: int) -> TrainStart:
        return TrainStart(
            saes=len(runs),
            parameters=sum(run.parameters for run in runs),
            step=step,
            total_steps=self.total_steps,
            batch_tokens=self.batch_tokens,
            layers=self.stream.layers,
        )

    def initialise_biases(self, runs: Sequence[Run]) -> None:
        """Start b_pre from a sample of the data, where a run asks for it."""
        if all(run.config.sae.init_bias == "zero" for run in runs):
            return
        layers, norm, device = self.stream
        sample_NLD = first_tokens(
            self.reader, layers, "train", _BIAS_SAMPLE, norm=norm, seed=self.config.seed
        ).to(device)
        for run in runs:
            run.sae.initialise_bias(run.view(sample_NLD))


def _save(runs: Sequence[Run]) -> None:
    for run in runs:
        run.save()


def _states(runs: Sequence[Run | RunState]) -> list[RunState]:
    return [run.state if isinstance(run, Run) else run for run in runs]


def _batch_tokens(tokens: int) -> int:
    wanted = 1 << int(math.log2(max(tokens / _FEWEST_STEPS, 1)))
    return min(max(wanted, _SMALLEST_BATCH), _LARGEST_BATCH)
