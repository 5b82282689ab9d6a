"""What the benchmarks share: the stores they work on, cold caches, tables with their spread."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from routesae_cache.harvest import harvest
from routesae_cache.harvest_plan import HarvestConfig, plan_harvest
from stores.codecs import Bf16Codec, ResidualCodec
from stores.recode import recode

FOLDER = Path("runs/bench")
TOKENS, EVAL_TOKENS = 200_000, 40_000
console = Console(width=110)


def raw_store() -> Path:
    """The default model's residuals as the model gave them; made once, in minutes."""
    return harvested(FOLDER / "raw.zarr", Bf16Codec())


def harvested(out: Path, codec: ResidualCodec, tokens: int = TOKENS) -> Path:
    """A store of the default model and corpus."""
    config = HarvestConfig(
        model="smollm2-135m",
        dataset="news",
        out=out,
        tokens=tokens,
        eval_tokens=EVAL_TOKENS,
        codec=codec,
    )
    plan = plan_harvest(config)
    if not plan.complete:
        console.print(f"harvesting {out}")
        harvest(plan)
    return out


def recoded(codec: ResidualCodec, name: str) -> Path:
    """The raw store in another codec; made once."""
    out = FOLDER / f"{name}.zarr"
    recode(raw_store(), out, codec)
    return out


def drop_page_cache() -> bool:
    """Make the next reads cold; False where that is not allowed."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def interleaved(rounds: int, measures: Sequence[Callable[[], float]]) -> list[tuple[float, ...]]:
    """Each measure once a round, in turn, so that all see the same drift of the machine."""
    return [tuple(measure() for measure in measures) for _ in range(rounds)]


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Median with the least and the most."""
    median = statistics.median(values)
    return f"{median:{form}} ({min(values):{form}}-{max(values):{form}})"


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table under a line that names the machine."""
    cores = len(os.sched_getaffinity(0))
    table = Table(title=f"{title}\n{_processor()}, {cores} cores", title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()
