"""The spliced evaluation on a Ray cluster: workers with the model take chunks of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from routesae_cache.devices import resolve_device
from routesae_cache.kernels import keep_freed_memory
from routesae_cache.metrics import Spliced
from routesae_cache.origin import origin_lm
from routesae_cache.ray_actor import Worker
from routesae_cache.ray_cluster import RayConfig
from routesae_cache.ray_pool import pool
from routesae_cache.sources import ModelSource
from routesae_cache.splicing.evaluate import (
    RowsSums,
    SplicedConfig,
    Splicing,
    Total,
    check_spliceable,
)
from routesae_cache.splicing.passes import ChunkRows, first_rows
from routesae_cache.trained import ReadingRule, TrainedSae
from stores.place import Place
from stores.reader import StoreReader

_Found = list[list[RowsSums]]
"""Of each batch and SAE."""


def splice_on_ray(
    reader: StoreReader,
    model: str | ModelSource | None,
    saes: Sequence[TrainedSae],
    config: SplicedConfig,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    cluster: RayConfig,
) -> list[Spliced]:
    """Measure SAEs as `evaluate_spliced` does, by the workers of a cluster; the same figures.

    Args:
        model: where the store's model is now, as `origin_lm` has it; each worker loads it.

    Raises what `evaluate_spliced` and `origin_lm` do, and ValueError where there is no such
    cluster or workers only die.
    """
    check_spliceable([sae.config for sae in saes], config)
    parts = first_rows(reader, config.split, config.rows)
    total_rows = sum(part.rows for part in parts)
    cluster = replace(cluster, workers=min(cluster.workers, len(parts)))
    rules = [(sae.run, sae.rule) for sae in saes]
    make = partial(_Splicer, reader.path, model, rules, config, cluster.device)
    found: dict[ChunkRows, _Found] = {}
    with pool(cluster, make, describe=_describe) as workers:

        def tick() -> None:
            at = [p.state for p in workers.places if p.state and p.in_hand == [p.state[0]]]
            done = sum(part.rows for part in found) + sum(rows for _, rows in at)
            progress(done, total_rows)

        workers.waiting.extend(parts)
        for done in workers.results(tick):
            found[done.task] = done.result
    totals = [Total(run, sae.config, config) for run, sae in enumerate(saes)]
    for batch in (batch for part in parts for batch in found[part]):
        for total, sums in zip(totals, batch, strict=True):
            total.add(sums)
    return [total.result() for total in totals]


class _Splicer(Worker[ChunkRows, _Found]):
    """Loads the model and the SAEs once, measures the rows that it is told."""

    def __init__(
        self,
        store: Place,
        model: str | ModelSource | None,
        rules: Sequence[tuple[Path, ReadingRule]],
        config: SplicedConfig,
        device: str,
    ) -> None:
        device = resolve_device(device)
        keep_freed_memory()
        reader = StoreReader(store)
        saes = [TrainedSae(run, reader.spec, rule=rule, device=device) for run, rule in rules]
        lm = origin_lm(reader.spec, model=model, device=device)
        self._splicing = Splicing(reader, lm, saes, config)
        self._at: tuple[ChunkRows, int] | None = None

    def work(self, task: ChunkRows) -> _Found:
        """Pass the first rows of a chunk through the model."""

        def note(done: int, _: int) -> None:
            self._at = task, done

        return list(self._splicing.measure([task], note))

    def state(self) -> tuple[ChunkRows, int] | None:
        return self._at


def _describe(part: ChunkRows) -> str:
    return f"chunk {part.chunk}"
