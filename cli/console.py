"""What commands share: errors as messages, signals, progress bars, numbers for people."""

from __future__ import annotations

import errno
import functools
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_PIPED_WIDTH = 120
out = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPED_WIDTH)
err = Console(stderr=True, highlight=False)

P = ParamSpec("P")
R = TypeVar("R")
USER_ERROR = 2
INTERRUPTED = 130


def handled(command: Callable[P, R]) -> Callable[P, R]:
    """Turn what a user can mend into a message and exit code 2, and Ctrl-C into a hint."""

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        _log_to_screen()
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            err.print(
                "\nStopped. What was finished is kept; the same command goes on from there "
                "(`train` and `sweep` with --resume)."
            )
            raise typer.Exit(INTERRUPTED) from None
        except (ValueError, OSError) as error:
            err.print(f"[bold red]Error:[/] {escape(_message(error))}", soft_wrap=True)
            raise typer.Exit(USER_ERROR) from None

    return wrapper


def _message(error: Exception) -> str:
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        if error.errno == errno.ENOSPC:
            return (
                f"{where}the disk is full. What is committed is intact: free space and run the "
                "same command again, it goes on from there."
            )
        return f"{where}{error.strerror or error}"
    return str(error)


def _log_to_screen() -> None:
    handler = RichHandler(console=err, show_time=False, show_path=False, show_level=False)
    for name in ("routesae_cache", "stores"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Have the first Ctrl-C or SIGTERM asked for instead of raised; the second one acts at once.

    Yields what tells whether there was one.
    """
    asked = False

    def note(*_: Any) -> None:
        nonlocal asked
        asked = True
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        restore()


def bar_columns() -> tuple[Any, ...]:
    """Of every progress bar; its tasks have a field `note`."""
    return (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )


@contextmanager
def bar(description: str, total: float | None = None) -> Iterator[Callable[..., None]]:
    """A progress bar; yields `update(completed, total, note)`, each argument optional."""
    with Progress(*bar_columns(), console=err, transient=False) as progress:
        task = progress.add_task(description, total=total, note="")

        def update(
            completed: float | None = None, total: float | None = None, note: str | None = None
        ) -> None:
            fields: dict[str, Any] = {} if note is None else {"note": note}
            progress.update(task, completed=completed, total=total, **fields)

        yield update


def size(n_bytes: float) -> str:
    """Bytes for people, in powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n_bytes) < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.2f} TB"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:,.0f} days"


def count(number: float) -> str:
    """A large number for people."""
    for unit in ("", " thousand", " million"):
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:,.3g} billion"


def layer_name(layer: int) -> str:
    """A layer both ways: by its index and by the block it comes after."""
    return f"layer {layer} ({'embedding' if layer == 0 else f'after block {layer - 1}'})"


def layer_list(layers: tuple[int, ...]) -> str:
    """Layers in short: runs of neighbours as ranges."""
    parts: list[str] = []
    start = previous = layers[0]
    for layer in (*layers[1:], None):
        if layer is not None and layer == previous + 1:
            previous = layer
            continue
        parts.append(str(start) if start == previous else f"{start}-{previous}")
        if layer is not None:
            start = previous = layer
    return ", ".join(parts)
