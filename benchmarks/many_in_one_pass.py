"""Wall time of four SAEs trained in one pass over the same four in four passes."""

from __future__ import annotations

import shutil
import time

from benchmarks.common import FOLDER, interleaved, recoded, show, spread
from routesae_cache.kernels import keep_freed_memory
from routesae_cache.saes.config import SaeConfig
from routesae_cache.train import train
from routesae_cache.train_plan import TrainConfig
from stores.codecs import DeltaCodec
from stores.reader import StoreReader

ROUNDS, TOKENS, BATCH_TOKENS = 5, 65_536, 2048
LAYERS = tuple(range(7, 23))
SAES = [
    SaeConfig(selector="route", coder="topk", layers=LAYERS, latents=2304, k=16),
    SaeConfig(selector="route", coder="topk", layers=LAYERS, latents=2304, k=32),
    SaeConfig(selector="fixed", coder="topk", layers=(22,), latents=2304, k=16),
    SaeConfig(selector="fixed", coder="topk", layers=(22,), latents=2304, k=32),
]


def main() -> None:
    keep_freed_memory()
    reader = StoreReader(recoded(DeltaCodec(), "delta-0.20"))
    routed, fixed = SAES[1], SAES[3]
    rows = interleaved(
        ROUNDS,
        [
            lambda: _seconds(reader, SAES),
            lambda: sum(_seconds(reader, [sae]) for sae in SAES),
            lambda: _seconds(reader, [routed]),
            lambda: _seconds(reader, [fixed]),
        ],
    )
    together, apart, one_routed, one_fixed = zip(*rows, strict=True)
    show(
        f"2 RouteSAE and 2 TopK, 2304 latents, {TOKENS:,} tokens from the store",
        ("figure", "median (least-most)"),
        [
            ("one pass, s", spread(together)),
            ("four passes, s", spread(apart)),
            ("one pass / four passes", spread([r[0] / r[1] for r in rows])),
            ("RouteSAE on 16 layers, tokens/s", spread([TOKENS / s for s in one_routed], ",.0f")),
            ("TopK on one layer, tokens/s", spread([TOKENS / s for s in one_fixed], ",.0f")),
            ("RouteSAE / TopK, tokens/s", spread([r[3] / r[2] for r in rows])),
        ],
    )


def _seconds(reader: StoreReader, saes: list[SaeConfig]) -> float:
    out = FOLDER / "many"
    shutil.rmtree(out, ignore_errors=True)
    config = TrainConfig(out=out, tokens=TOKENS, batch_tokens=BATCH_TOKENS)
    start = time.perf_counter()
    train(reader, [(sae, 0) for sae in saes], config)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
