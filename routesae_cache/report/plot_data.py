"""What plots are made of, and what a plot's builder is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from routesae_cache.report.activity import Density
from routesae_cache.report.charts import Look, Plot
from routesae_cache.report.discover import FoundRun
from routesae_cache.report.table import Missing
from stores.reader import StoreReader


@dataclass(frozen=True, kw_only=True)
class PlotData:
    """What plots are made of."""

    runs: Sequence[FoundRun]
    look: Look
    density: dict[str, Density]
    """Run -> how often its latents are active; empty where the store is not at hand."""
    reader: StoreReader | None


Built = Iterator[Plot | Missing]
Builder = Callable[[PlotData], Built]
