"""What `train` and `sweep` share: options for logging, the pass over the store, its display."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table

from cli.console import bar_columns, count, duration, err, handled, layer_list, out, styled
from cli.stopping import Stop, raise_stop, stop_signals

if TYPE_CHECKING:
    from rich.progress import Progress

    from routesae_cache.launch import Ended
    from routesae_cache.loggers import LogConfig
    from routesae_cache.parallel import World
    from routesae_cache.ray_cluster import RayConfig
    from routesae_cache.runs import RunState
    from routesae_cache.saes.registry import SaeSpec
    from routesae_cache.train import TrainProgress, TrainResult
    from routesae_cache.train_plan import TrainConfig, TrainStart
    from stores.place import Place

_NAMED_RUNS = 4  # more are named by their folder in the command that measures them
_CHECKPOINT_BYTES = 12  # for each parameter: itself and two moments of it


class WandbModeKind(StrEnum):
    """Whether Weights & Biases is reached now, later or not at all."""

    online = "online"
    offline = "offline"
    disabled = "disabled"


Out = Annotated[Path, typer.Option("--out", help="Folder for the runs.")]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Go on with interrupted runs, skip ended and failed ones."),
]
Replace = Annotated[
    bool,
    typer.Option(
        "--replace", help="Move runs made with other settings to OUT/.replaced, train them anew."
    ),
]
SoFar = Annotated[
    bool,
    typer.Option("--so-far", help="Train on the chunks that are there, while a harvest goes on."),
]
Nproc = Annotated[
    int,
    typer.Option(min=1, help="Processes on this machine that share each batch, a GPU for each."),
]
Log = Annotated[
    list[str] | None,
    typer.Option(help="wandb or tensorboard, beside the run's metrics.jsonl; may be repeated."),
]
WandbProject = Annotated[
    str | None, typer.Option(help="Project of the runs  \\[default: routesae]")
]
WandbName = Annotated[
    str | None,
    typer.Option(help="Name of a run; {run} is that of its directory  \\[default: {run}]"),
]
WandbGroup = Annotated[str | None, typer.Option(help="Group of the runs.")]
WandbMode = Annotated[
    WandbModeKind | None,
    typer.Option(help="Offline keeps everything in the run's directory  \\[default: online]"),
]


def log_config(log: list[str] | None, **wandb: str | None) -> LogConfig:
    """The loggers that the options describe, by their names; ValueError for unknown ones."""
    from routesae_cache.loggers import LogConfig

    given = {name: str(value) for name, value in wandb.items() if value is not None}
    config = LogConfig(to=tuple(log or ()), **given)  # type: ignore[arg-type]
    if given and "wandb" not in config.to:
        names = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"{names} belongs to --log wandb; add that or leave it out")
    return config


def run_pass(
    store: Place,
    specs: Sequence[SaeSpec],
    config: TrainConfig,
    nproc: int = 1,
    cluster: RayConfig | None = None,
) -> None:
    """Train SAEs in one pass over a store, with a display of it; the end of `train` and `sweep`.

    `nproc` processes share every batch; on a cluster the workers share the SAEs, and each passes
    over the store.

    Exits with 1 where a run failed; KeyboardInterrupt where the pass was asked to stop.
    """
    from routesae_cache.parallel import launched

    if cluster is not None and (nproc > 1 or launched()):
        raise ValueError(
            "--ray shares out SAEs, --nproc and torchrun the tokens of a batch; give one of them"
        )
    if nproc == 1:
        _share(store, specs, config, cluster)
        return
    if launched():
        raise ValueError("--nproc starts processes, and torchrun did already; give one of the two")
    from routesae_cache.launch import check_processes, launch

    check_processes(nproc, config.device)
    _raise(launch(_process, nproc, (store, specs, config)), nproc)


def _process(store: Place, specs: Sequence[SaeSpec], config: TrainConfig) -> None:
    """One of several processes, from its beginning to its exit code."""

    def train() -> None:
        _share(store, specs, config)

    try:
        handled(train)()
    except typer.Exit as end:
        raise SystemExit(end.exit_code) from None


def _raise(ended: Ended, nproc: int) -> None:
    """What processes that have ended, and said why, mean for the command that started them."""
    if ended.stop is not None and ended.code > 0:  # they have said that they stopped
        raise typer.Exit(128 + ended.stop)
    if ended.code == -signal.SIGTERM:
        raise_stop(128 + (ended.stop or signal.SIGTERM))
    if ended.code < 0:
        name = signal.Signals(-ended.code).name
        err.print(
            styled(
                *("bold red", "Error:"),
                f" process {ended.rank} of 0 to {nproc - 1} was killed by {name}; --resume goes on "
                "with the runs from their last checkpoints",
            ),
            soft_wrap=True,
        )
    if ended.code:
        raise typer.Exit(max(ended.code, 1))


def _share(
    store: Place, specs: Sequence[SaeSpec], config: TrainConfig, cluster: RayConfig | None = None
) -> None:
    """This process's share of a pass, which is all of it unless it was started as one of several.

    The leading process speaks for all, except of an error that it does not have itself.
    """
    from routesae_cache.launch import PEER_LOST
    from routesae_cache.parallel import PeerError, join

    with join(config.device) as (world, device):
        out.quiet = err.quiet = not world.leads
        try:
            result, stopped = _pass(store, specs, replace(config, device=device), world, cluster)
        except PeerError as error:
            err.print(styled("bold red", "Error:", f" {error}"), soft_wrap=True)
            raise typer.Exit(PEER_LOST) from None
        except (ValueError, OSError):
            err.quiet = False
            raise
    if not world.leads:
        return
    _report(store, config.out, result)
    if result.interrupted:
        raise stopped.error()
    if any(state.status == "failed" for state in result.runs):
        raise typer.Exit(1)


def _pass(
    store: Place,
    specs: Sequence[SaeSpec],
    config: TrainConfig,
    world: World,
    cluster: RayConfig | None,
) -> tuple[TrainResult, Stop]:
    with err.status("Opening the store"), world.together():
        from routesae_cache.kernels import keep_freed_memory
        from routesae_cache.sweep import complete
        from routesae_cache.train import train
        from routesae_cache.whole_files import named_full_disk
        from stores.reader import StoreReader

        keep_freed_memory()
        reader = StoreReader(store)
        saes = complete(specs, reader.spec, seed=config.seed)
    parameters = 0

    def begin(start: TrainStart) -> None:
        nonlocal parameters
        parameters = start.parameters
        _announce(start)
        display.begin(start.step, start.total_steps)

    with (
        stop_signals() as stopped,
        _display(stopped) as display,
        named_full_disk(config.out, lambda: _CHECKPOINT_BYTES * parameters),
    ):
        run = partial(train, world=world)
        if cluster is not None:
            from routesae_cache.ray_train import train_on_ray

            run = partial(train_on_ray, cluster=cluster)
        result = run(reader, saes, config, display.update, on_start=begin, stopped=stopped)
    return result, stopped


def _announce(start: TrainStart) -> None:
    saes = "1 SAE" if start.saes == 1 else f"{start.saes} SAEs"
    done = f", {start.step:,} of them taken" if start.step else ""
    part = ""
    if start.read != start.split:
        part = (
            f"; of the train split, the first {start.read.chunks:,} of {start.split.chunks:,} "
            f"chunks, {count(start.read.tokens)} of {count(start.split.tokens)} tokens"
        )
    err.print(
        f"Training {saes} with {count(start.parameters)} parameters from "
        f"layers {layer_list(start.layers)}: {start.total_steps:,} steps of "
        f"{start.batch_tokens:,} tokens{done}{part}",
        soft_wrap=True,
    )


class _Display:
    """One bar for the pass and under it one line for each SAE."""

    def __init__(self, bar: Progress, stopped: Callable[[], bool]) -> None:
        self._bar, self._stopped = bar, stopped
        self._task = bar.add_task("Training", total=None, note="")
        self._runs: Sequence[RunState] = ()

    def begin(self, step: int, total_steps: int) -> None:
        """Where it begins: steps of earlier calls are no measure of the speed of this one."""
        self._bar.reset(self._task, completed=step, total=total_steps)

    def update(self, state: TrainProgress) -> None:
        self._runs = state.runs
        rate = state.tokens / max(self._bar.tasks[0].elapsed or 0.0, 1e-9)
        self._bar.update(
            self._task,
            completed=state.step,
            total=state.total_steps,
            note=f"{rate:,.0f} tokens/s",
        )

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = [self._bar]
        if self._stopped():
            parts.append("Stopping after this step; Ctrl-C again stops at once")
        if self._runs:
            parts.append(runs_table(self._runs))
        return Group(*parts)


@contextmanager
def _display(stopped: Callable[[], bool]) -> Iterator[_Display]:
    from rich.progress import Progress

    display = _Display(Progress(*bar_columns(), console=err), stopped)
    if not err.is_terminal:
        yield display
        return
    with Live(display, console=err, refresh_per_second=4, transient=True):
        yield display


def runs_table(runs: Sequence[RunState]) -> Table:
    """How each SAE of a pass is doing."""
    table = Table(box=None, pad_edge=False)
    table.add_column("run", overflow="fold")
    table.add_column("status", no_wrap=True)
    for name in ("step", "loss", "NMSE", "L0", "dead"):
        table.add_column(name, justify="right", no_wrap=True)
    for state in runs:
        style = {"failed": "red", "interrupted": "yellow"}.get(state.status, "")
        numbers = (f"{state.loss:.4f}", f"{state.nmse:.4f}", f"{state.l0:.1f}")
        cells = (f"{state.step:,}", *numbers, f"{state.dead_share:.1%}")
        logged = state.nmse == state.nmse or state.step > 0
        table.add_row(state.name, state.status, *(cells if logged else "-" * 5), style=style)
    return table


def _report(store: Place, folder: Path, result: TrainResult) -> None:
    out.print(runs_table(result.runs))
    if result.tokens:
        rate = result.tokens / result.seconds
        out.print(f"{result.tokens:,} tokens in {duration(result.seconds)} ({rate:,.0f} tokens/s)")
    out.print(f"The runs are in {folder}", soft_wrap=True)
    done = [
        path
        for path, state in zip(result.folders, result.runs, strict=True)
        if state.status == "done"
    ]
    if done:
        every = len(done) == len(result.runs) > _NAMED_RUNS
        paths = f"{folder}/*" if every else " ".join(map(str, done))
        out.print(f"Measure: routesae evaluate {store} {paths}", soft_wrap=True)
