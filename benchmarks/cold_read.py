"""All layers read from a cold cache: the store, decoded and shuffled, over a bf16 memory map."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from benchmarks.common import FOLDER, drop_page_cache, interleaved, raw_store, recoded, show, spread
from routesae_cache.batches import BatchConfig, BatchSource
from stores.codecs import DeltaCodec
from stores.reader import StoreReader

ROUNDS, BATCH_TOKENS = 7, 2048


def main() -> None:
    raw = StoreReader(raw_store())
    reader = StoreReader(recoded(DeltaCodec(), "delta-0.20"))
    memory_map = _memory_map(raw)
    cold = drop_page_cache()

    def store() -> float:
        drop_page_cache()
        source = BatchSource(
            reader,
            BatchConfig(layers=raw.spec.layers, batch_tokens=BATCH_TOKENS, norm="none"),
        )
        start, tokens = time.perf_counter(), 0
        with source.batches() as batches:
            for batch in batches:
                tokens += len(batch.row_N)
        return tokens / (time.perf_counter() - start)

    rows = interleaved(
        ROUNDS,
        [store, lambda: _map_speed(memory_map, raw), lambda: _map_speed(memory_map, raw, True)],
    )
    stores, maps, shuffled = zip(*rows, strict=True)
    show(
        f"Reading {raw.spec.train_tokens:,} tokens of 16 layers, "
        + ("cold" if cold else "NOT cold: the page cache could not be dropped"),
        ("figure", "median (least-most)"),
        [
            ("store, decoded, shuffled, float32: tokens/s", spread(stores, ",.0f")),
            ("bf16 memory map, copied as it is: tokens/s", spread(maps, ",.0f")),
            ("bf16 memory map, shuffled, float32: tokens/s", spread(shuffled, ",.0f")),
            ("store / memory map copied as it is", spread([r[0] / r[1] for r in rows])),
            ("store / memory map shuffled, float32", spread([r[0] / r[2] for r in rows])),
        ],
    )


def _memory_map(raw: StoreReader) -> Path:
    """The train split's residuals as one bf16 file, tokens first."""
    path = FOLDER / "train.bf16"
    spec = raw.spec
    size = spec.train_rows * spec.context * spec.values_per_token * 2
    if not path.exists() or path.stat().st_size != size:
        with path.open("wb") as file:
            for chunk in raw.chunks("train"):
                file.write(raw.codes(chunk, range(len(spec.layers)))["codes"].tobytes())
    return path


def _map_speed(path: Path, raw: StoreReader, decode: bool = False) -> float:
    """Read the file in pieces of a chunk, in random order."""
    drop_page_cache()
    spec = raw.spec
    per_chunk = spec.chunk_rows * spec.context
    mapped = np.memmap(path, np.uint16, "r").reshape(-1, len(spec.layers), spec.width)
    rng = np.random.default_rng(0)
    start, tokens = time.perf_counter(), 0
    for chunk in rng.permutation(-(-len(mapped) // per_chunk)):
        part = np.array(mapped[chunk * per_chunk : (chunk + 1) * per_chunk])
        if decode:
            for batch in np.array_split(rng.permutation(len(part)), 2):
                (part[batch].astype(np.uint32) << 16).view(np.float32)
        tokens += len(part)
    return tokens / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
