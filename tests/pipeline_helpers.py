"""A tiny harvest and a tiny training, for the tests that need one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from routesae_cache.harvest import harvest
from routesae_cache.harvest_plan import HarvestConfig, plan_harvest
from routesae_cache.saes.config import SaeConfig
from stores.codecs import Int8Codec
from stores.reader import StoreReader

TINY = {
    "tokens": 300,
    "eval_tokens": 60,
    "context": 16,
    "chunk_rows": 4,
    "batch_rows": 2,
    "layers": "1-3",
    "dtype": "float32",
    "codec": Int8Codec(),
}


def config(model: Path, corpus: Path, out: Path, **changes: Any) -> HarvestConfig:
    """A harvest of three layers in a few chunks."""
    return HarvestConfig(
        **{"model": str(model), "dataset": str(corpus), "out": out} | TINY | changes
    )


def run(harvest_config: HarvestConfig) -> StoreReader:
    """Plan and harvest."""
    harvest(plan_harvest(harvest_config))
    return StoreReader(harvest_config.out)


def array_files(store: Path) -> dict[str, bytes]:
    """Every file of a store by its path in it."""
    root = Path(store)
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def fail_at(call: int, function: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
    """`function`, except that call number `call` raises instead."""
    calls = iter(range(10**9))

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            raise error
        return function(*args, **kwargs)

    return wrapper


def topk(layers: tuple[int, ...] = (3,), **changes: Any) -> SaeConfig:
    """A small TopK SAE on one layer, or a routed one on several."""
    selector = "fixed" if len(layers) == 1 else "route"
    options = {"selector": selector, "coder": "topk", "layers": layers, "latents": 64, "k": 4}
    return SaeConfig(**options | changes)


def all_tokens(reader: StoreReader, layers: tuple[int, ...], split: str) -> dict[Any, Any]:
    """(row, position) -> raw residuals (L, D) of every counted token of a split."""
    found = {}
    for chunk in reader.chunks(split):  # type: ignore[arg-type]
        x_NLD = reader.residuals(chunk, layers)
        counted_RT = reader.rows(chunk).counted_RT()
        for row, position in zip(*np.nonzero(counted_RT), strict=True):
            index = row * reader.spec.context + position
            key = (reader.spec.chunk_range(chunk).start + row, position)
            found[tuple(map(int, key))] = x_NLD[index]
    return found


LAYERS = (1, 2, 3)
SAES = {
    "fixed": topk((3,)),
    "scalar": topk((2,), norm="scalar"),
    "straight-through": topk(LAYERS, route_estimator="straight-through"),
    "factor": topk(LAYERS, route_estimator="factor"),
    "soft": topk(LAYERS, hard=False),
    "random": topk(LAYERS, selector="random"),
    "every": topk(LAYERS, selector="every"),
    "crosscoder": SaeConfig(
        selector="all", coder="relu", layers=LAYERS, latents=64, sparsity_weight=1e-3
    ),
}
"""A small SAE for each way of reading the layers of the tiny harvest."""
