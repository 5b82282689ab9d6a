"""Tokens a second of context mining over those of encoding the same tokens alone.

`python -m benchmarks.contexts RUN… [--split train] [--rounds 5]`
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.common import FOLDER, interleaved, recoded, show, spread
from routesae_cache.batches import BatchSource
from routesae_cache.contexts.contexts import ContextsConfig, auto_threshold, mine_contexts
from routesae_cache.kernels import keep_freed_memory
from routesae_cache.trained import Residuals, TrainedSae, layers_read
from stores.codecs import DeltaCodec
from stores.reader import StoreReader
from stores.spec import Split

BATCH_TOKENS = 2048
OUT = FOLDER / "contexts"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--split", choices=("eval", "train"), default="train")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    keep_freed_memory()
    reader = StoreReader(recoded(DeltaCodec(), "delta-0.20"))
    auto = auto_threshold(reader.spec.width)
    mine = partial(_mine, reader, given.runs, given.split)
    measures: list[Callable[[], float]] = [
        partial(_encode, reader, given.runs, given.split),
        partial(mine, auto),
        partial(mine, auto / 3),
        partial(mine, auto / 3, delphi=True),
        partial(mine, 0.0),
    ]
    interleaved(1, measures[:2])  # imports, and the page cache
    rows = interleaved(given.rounds, measures)
    encode, *mined = zip(*rows, strict=True)
    what = (f"above {auto:.3g}", f"above {auto / 3:.3g}", "and for delphi", "above 0")
    show(
        f"{', '.join(run.name for run in given.runs)}, {given.split} split",
        ("figure", "tokens/s", "mining / encoding"),
        [
            ("encoding alone", spread(encode, ",.0f"), ""),
            *(
                (
                    f"mining {name}",
                    spread(speeds, ",.0f"),
                    spread([s / e for s, e in zip(speeds, encode, strict=True)]),
                )
                for name, speeds in zip(what, mined, strict=True)
            ),
        ],
    )


def _encode(reader: StoreReader, runs: list[Path], split: Split) -> float:
    """Tokens a second of the loop that mining adds to."""
    start = time.perf_counter()
    saes = [TrainedSae(run, reader.spec) for run in runs]
    layers = layers_read(sae.config for sae in saes)
    source = BatchSource.in_order(reader, layers, split=split, batch_tokens=BATCH_TOKENS)
    with source.batches() as batches:
        for batch in batches:
            residuals = Residuals(batch.x_NLD, layers)
            for sae in saes:
                sae.read(residuals.seen_by(sae.config).x)
    return source.tokens / (time.perf_counter() - start)


def _mine(
    reader: StoreReader, runs: list[Path], split: Split, threshold: float, *, delphi: bool = False
) -> float:
    """Tokens a second from loading the runs until the last file is there."""
    shutil.rmtree(OUT, ignore_errors=True)
    config = ContextsConfig(
        out=OUT, split=split, threshold=threshold, delphi=delphi, batch_tokens=BATCH_TOKENS
    )
    start = time.perf_counter()
    mined = mine_contexts(reader, runs, config)
    return mined[0].tokens / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
