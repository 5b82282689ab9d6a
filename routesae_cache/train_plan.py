"""What a training pass is made of, settled before its first step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from routesae_cache.batches import BatchConfig, BatchSource, Norm, first_tokens
from routesae_cache.checkpoint import CONFIG, RunConfig, RunError, read_config
from routesae_cache.loggers import LogConfig, OpenLogger, prepare_loggers
from routesae_cache.parallel import ALONE, World
from routesae_cache.prefix import Extent, chunks_to_read, extent, reader_with
from routesae_cache.runs import (
    Asked,
    Run,
    RunState,
    Stream,
    check_folder,
    remove_leftovers,
    run_names,
    set_aside_changed,
    settled,
)
from routesae_cache.saes.config import SaeConfig
from routesae_cache.sole_use import sole_use
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
    """Of all processes together. None: 64 rows of 512 as in the paper, or what leaves a small
    store about 1000 steps."""
    lr: float = 5e-4
    seed: int = 42
    """Of the order of the tokens."""
    streams: int | None = None
    """That the chunks are dealt out to; each process reads equally many of them. None: as many as
    resumed runs have, otherwise one for each process."""
    so_far: bool = False
    """A harvest may be going on: the chunks that are there are enough, up to the first missing one.
    Resumed runs go on with those that they began with."""
    chunks: int | None = None
    """The first so many of the train split are read. None: as many as runs that are there began
    with, otherwise all, or with `so_far` those there are."""
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
        for name in ("epochs", "tokens", "batch_tokens", "streams", "chunks", "log_every"):
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
    read: Extent
    """Of the train split."""
    split: Extent
    """All of it."""


class TrainPlan:
    """A pass: settings that follow from the store, the SAEs and the processes together."""

    def __init__(
        self,
        reader: StoreReader,
        asked: Sequence[Asked],
        config: TrainConfig,
        chunks: int,
        only: Sequence[int] | None,
        world: World,
    ) -> None:
        self.reader, self.config, self.world = reader, config, world
        names = run_names(asked)
        self.streams = self._streams([config.out / name for name in names])
        if self.streams % world.size:
            raise RunError(
                f"the runs in {config.out} were begun with --nproc {self.streams}; to go on with "
                f"them expected the same or a divisor of it, found {world.size} processes"
            )
        chosen = range(len(asked)) if only is None else only
        # those of ended runs, too: a resumed pass goes on with the very same batches
        layers = tuple(sorted({layer for index in chosen for layer in asked[index].sae.layers}))
        # of all there are: where residuals are normalised shows in the last bits
        norm: Norm = "token" if all(each.sae.norm == "token" for each in asked) else "none"
        self.stream = Stream(layers, norm, config.device)
        self.chunks = tuple(reader.spec.split_chunks("train")[:chunks])
        everything = BatchConfig(
            layers=layers,
            batch_tokens=config.batch_tokens or 1,
            norm=norm,
            seed=config.seed,
            epochs=config.epochs,
            device=config.device,
            streams=self.streams,
            own=tuple(range(self.streams))[world.rank :: world.size],
            chunks=self.chunks,
        )
        tokens = min(BatchSource(reader, everything).tokens, config.tokens or math.inf)
        self.batch_tokens = config.batch_tokens or _batch_tokens(int(tokens), self.streams)
        self._check_batch(int(tokens))
        self.total_steps = int(tokens) // self.batch_tokens
        own_tokens = self.batch_tokens // world.size
        self.source = BatchSource(reader, replace(everything, batch_tokens=own_tokens))
        self.log_every = config.log_every or max(1, self.total_steps // 200)
        runs = self._run_configs(names, asked)
        self.runs = [runs[index] for index in chosen]
        self.folders = [config.out / run.name for run in self.runs]

    def settle(self, holding: ExitStack) -> list[RunState | None]:
        """How the runs that need no further training came out, None for the others; moves changed
        ones aside where that was asked for, and clears up after killed processes.

        Args:
            holding: the runs are this process's alone until it is closed.

        Raises:
            RunError: where a run cannot be kept in its folder.
            InUseError: where another process is training one of them.
        """
        names = [folder.name for folder in self.folders]
        holding.enter_context(sole_use(self.config.out, names))
        for folder, run_config in zip(self.folders, self.runs, strict=True):
            if self.config.replace_changed:
                set_aside_changed(folder, run_config)
            check_folder(folder, run_config, self.config.resume)
            remove_leftovers(folder)
        return [settled(folder, folder.name) for folder in self.folders]

    def open(
        self,
        states: Sequence[RunState | None],
        open_loggers: Sequence[OpenLogger],
        closing: ExitStack,
    ) -> list[Run | RunState]:
        """The runs to be trained, and how the others came out."""
        runs: list[Run | RunState] = []
        for folder, run_config, state in zip(self.folders, self.runs, states, strict=True):
            if state is not None:
                runs.append(state)
                continue
            run = Run(folder, run_config, self.stream, open_loggers, self.world)
            closing.callback(run.close)
            runs.append(run)
        return runs

    def start_alike(self, runs: Sequence[Run]) -> None:
        """Give every process the leading one's weights; RunError where their steps differ."""
        steps = self.world.first(lambda: [run.step for run in runs])
        with self.world.together():
            for run, step in zip(runs, steps, strict=True):
                if run.step != step:
                    raise RunError(
                        f"{run.folder}: process {self.world.rank} found a checkpoint of step "
                        f"{run.step}, process 0 of step {step}; all have to see the same folder"
                    )
            if self.world.leads:
                self.initialise_biases([run for run in runs if run.step == 0])
        for run in runs:
            self.world.match_(run.sae.state_dict().values())

    def _streams(self, folders: Sequence[Path]) -> int:
        """As many as the runs have that are to be gone on with, otherwise one a process."""
        if self.config.streams:
            return self.config.streams
        there = [each for each in folders if self.config.resume and (each / CONFIG).exists()]
        streams = read_config(there[0]).streams if there else self.world.size
        unequal = streams % self.world.size > 0
        return self.world.size if unequal and self.config.replace_changed else streams

    def _check_batch(self, tokens: int) -> None:
        if self.batch_tokens % self.streams:
            over = self.batch_tokens % self.streams
            raise ValueError(
                f"batches of {self.batch_tokens} tokens cannot be shared out equally to "
                f"{self.streams} streams, one for each process; ask for --batch-tokens "
                f"{self.batch_tokens - over or self.streams}"
            )
        if tokens < self.batch_tokens:
            few = f" (chunks for {self.streams} streams)" if self.streams > 1 else ""
            raise ValueError(
                f"{tokens} tokens{few} do not fill one batch of {self.batch_tokens}; "
                "ask for smaller --batch-tokens, more --epochs or more --tokens"
            )

    def _run_configs(self, names: Sequence[str], asked: Sequence[Asked]) -> list[RunConfig]:
        spec = self.reader.spec
        mean_square_L = split_stats(self.reader, "train", self.chunks).mean_square_L
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
                chunks=len(self.chunks),
                streams=self.streams,
            )
            for name, each in zip(names, asked, strict=True)
        ]

    def start_of(
        self, saes: int, parameters: int, step: int, layers: tuple[int, ...]
    ) -> TrainStart:
        spec = self.reader.spec
        return TrainStart(
            saes=saes,
            parameters=parameters,
            step=step,
            total_steps=self.total_steps,
            batch_tokens=self.batch_tokens,
            layers=layers,
            read=extent(spec, len(self.chunks)),
            split=extent(spec, len(spec.split_chunks("train"))),
        )

    def initialise_biases(self, runs: Sequence[Run]) -> None:
        """Start b_pre from a sample of the data, where a run asks for it."""
        if all(run.config.sae.init_bias == "zero" for run in runs):
            return
        layers, norm, device = self.stream
        sample_NLD = first_tokens(
            self.reader,
            layers,
            "train",
            _BIAS_SAMPLE,
            norm=norm,
            seed=self.config.seed,
            chunks=self.chunks,
        ).to(device)
        for run in runs:
            run.sae.initialise_bias(run.view(sample_NLD))


def prepare(
    reader: StoreReader,
    saes: Sequence[Asked | tuple[SaeConfig, int]],
    config: TrainConfig,
    only: Sequence[int] | None = None,
    world: World = ALONE,
) -> tuple[TrainPlan, list[OpenLogger]]:
    """What comes before any work of `train`: every error that can be found now is."""
    asked = [Asked(*each) for each in saes]
    chunks = world.first(lambda: _chunks(reader, asked, config))
    with world.together():
        plan = TrainPlan(reader_with(reader, chunks), asked, config, chunks, only, world)
        open_loggers = prepare_loggers(config.log, len(plan.runs)) if world.leads else []
    return plan, open_loggers


def _chunks(reader: StoreReader, asked: Sequence[Asked], config: TrainConfig) -> int:
    # runs that may be replaced are to be what they would be if they were begun now
    names = [] if config.replace_changed else run_names(asked)
    folders = [config.out / name for name in names]
    return chunks_to_read(reader, folders, asked=config.chunks, so_far=config.so_far)


def _batch_tokens(tokens: int, streams: int = 1) -> int:
    wanted = 1 << int(math.log2(max(tokens / _FEWEST_STEPS, 1)))
    within = min(max(wanted, _SMALLEST_BATCH), _LARGEST_BATCH)
    return max(within - within % streams, streams)
