"""How fast batches come from a store with so many threads, and nothing else to do.

`python -m benchmarks.batch_threads [--threads 1 2] [--codec delta] [--split train] [--rounds 7]`

Whole batches are read by as many threads beside, so that one of each keeps two cores busy; what
is decoded alone, from one chunk's codes in memory, shows what more threads are worth.
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import numpy as np

from benchmarks.common import interleaved, recoded, show, spread
from routesae_cache.batch_parts import Decoder, open_pools
from routesae_cache.batches import BatchConfig, BatchSource
from routesae_cache.devices import batch_threads, cores
from stores.codecs import Bf16Codec, DeltaCodec, Int8Codec
from stores.reader import StoreReader
from stores.spec import Split

BATCH_TOKENS, DECODED_BATCHES = 2048, 16
STORES = {
    "bf16": (Bf16Codec(), "raw"),
    "int8": (Int8Codec(), "int8"),
    "delta": (DeltaCodec(), "delta-0.20"),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, nargs="+", default=[1, batch_threads(cores())])
    parser.add_argument("--codec", choices=STORES, default="delta")
    parser.add_argument("--split", choices=("eval", "train"), default="train")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    reader = StoreReader(recoded(*STORES[given.codec]))
    whole = [partial(_batches, reader, given.split, threads) for threads in given.threads]
    alone = [partial(_decoding, reader, threads) for threads in given.threads]
    interleaved(1, whole)  # the page cache
    speeds = list(zip(*interleaved(given.rounds, [*whole, *alone]), strict=True))
    ratio = f"÷ {given.threads[0]}"
    show(
        f"Batches of {BATCH_TOKENS} tokens, {len(reader.spec.layers)} layers, {given.codec}, warm",
        ("threads", "batches: tokens/s", ratio, "decoded: tokens/s", ratio),
        [
            (str(threads), *_against(read, speeds[0]), *_against(decoded, speeds[len(whole)]))
            for threads, read, decoded in zip(
                given.threads, speeds[: len(whole)], speeds[len(whole) :], strict=True
            )
        ],
    )


def _against(speeds: tuple[float, ...], first: tuple[float, ...]) -> tuple[str, str]:
    ratios = [speed / other for speed, other in zip(speeds, first, strict=True)]
    return spread(speeds, ",.0f"), spread(ratios)


def _batches(reader: StoreReader, split: Split, threads: int) -> float:
    """Tokens a second, read and decoded."""
    layers = reader.spec.layers
    config = BatchConfig(layers=layers, batch_tokens=BATCH_TOKENS, split=split, threads=threads)
    start, tokens = time.perf_counter(), 0
    with BatchSource(reader, config).batches() as batches:
        for batch in batches:
            tokens += len(batch.row_N)
    return tokens / (time.perf_counter() - start)


def _decoding(reader: StoreReader, threads: int) -> float:
    """Tokens a second, of codes that were read before."""
    spec, layers = reader.spec, tuple(range(len(reader.spec.layers)))
    decoder = Decoder(codec=spec.codec, positions=layers, wanted=layers, norm="token")
    codes = reader.codes(0, layers)
    token_N = np.random.default_rng(0).permutation(spec.chunk_rows * spec.context)[:BATCH_TOKENS]
    out_NLD = np.empty((len(token_N), len(layers), spec.width), np.float32)
    with open_pools(threads) as pools:
        decoder.decode(codes, token_N, out_NLD, pools)
        start = time.perf_counter()
        for _ in range(DECODED_BATCHES):
            decoder.decode(codes, token_N, out_NLD, pools)
        return DECODED_BATCHES * len(token_N) / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
