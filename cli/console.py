"""What commands share: errors as messages, progress bars, numbers for people."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from cli.stopping import exit_code, going_on, termination_raised

_PIPED_WIDTH = 120


class PlainConsole(Console):
    """Shows texts as they are, for they may be names and words by others.

    Square brackets and colons mean nothing in them, and characters that a terminal would obey
    are dots. What is to have a style is a `rich.text.Text`, such as `styled` makes.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)


def visible(text: str) -> str:
    """Control characters, which a terminal would obey, as dots."""
    return "".join(c if c.isprintable() or c in "\n\t" else "·" for c in text)


def styled(style: str, head: str, rest: str = "") -> Text:
    """A text whose beginning has a style."""
    return Text.assemble((visible(head), style), visible(rest))


out = PlainConsole(width=None if sys.stdout.isatty() else _PIPED_WIDTH)
err = PlainConsole(stderr=True)

P = ParamSpec("P")
R = TypeVar("R")
USER_ERROR = 2


def handled(command: Callable[P, R]) -> Callable[P, R]:
    """Turn what a user can mend into a message and exit code 2, and being stopped into a hint."""

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        _log_to_screen()
        with termination_raised() as outermost:
            try:
                return command(*args, **kwargs)
            except KeyboardInterrupt as stop:
                if outermost:  # otherwise it is the pipeline that one goes on with
                    err.print(f"\nStopped. {going_on(command.__name__)}", soft_wrap=True)
                raise typer.Exit(exit_code(stop)) from None
            except (ValueError, OSError, OverflowError) as error:
                err.print(styled("bold red", "Error:", f" {_message(error)}"), soft_wrap=True)
                raise typer.Exit(USER_ERROR) from None

    return wrapper


def _message(error: Exception) -> str:
    from routesae_cache.whole_files import FullDiskError

    if isinstance(error, FullDiskError):
        return (
            f"{error.strerror}. What was finished is intact: free space and run the same command "
            "again (`train` and `sweep` with --resume)."
        )
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    if isinstance(error, OverflowError):
        return f"a number is larger than can be reckoned with ({error})"
    return str(error)


def _log_to_screen() -> None:
    handler = RichHandler(console=err, show_time=False, show_path=False, show_level=False)
    for name in ("routesae_cache", "stores"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False


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
    """A progress bar; yields `update(completed, total, note, begin)`, each argument optional.

    `begin` is where this process begins to count: what was done before is no measure of its speed.
    """
    with Progress(*bar_columns(), console=err, transient=False) as progress:
        task = progress.add_task(description, total=total, note="")

        def update(
            completed: float | None = None,
            total: float | None = None,
            note: str | None = None,
            begin: int | None = None,
        ) -> None:
            if begin is not None:
                progress.reset(task, completed=begin)
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
