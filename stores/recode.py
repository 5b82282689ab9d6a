"""A store in another codec, without the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from stores.codecs import Codes, ResidualCodec, join_blocks
from stores.layout import ChunkStats, TokenRows
from stores.places import Where
from stores.reader import StoreReader
from stores.writer import StoreWriter

_BLOCK_VALUES = 1 << 24


def recode(
    source: Where,
    target: Where,
    codec: ResidualCodec,
    *,
    on_chunk: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write the committed chunks of `source` to `target` in another codec; returns their number.

    Goes on where an interrupted call stopped. The recorded distortion is the source's plus what
    the new codec adds to the source's decoded residuals; the two errors are independent.
    `on_chunk(done, total)` is called after each chunk.
    """
    reader = StoreReader(source)
    spec = dataclasses.replace(reader.spec, codec=codec)
    empty = dataclasses.replace(spec, eval_rows=0, train_rows=0, eval_tokens=0, train_tokens=0)
    committed = set(reader.committed)
    with StoreWriter.create_or_open(target, empty) as out:
        if out.spec.rows < spec.rows:
            for chunk in range(spec.chunks):
                out.write_rows(chunk, reader.rows(chunk, check=chunk in committed))
            out.commit_rows(spec)
        todo = sorted(committed.intersection(out.pending()))
        done = len(committed) - len(todo)
        for chunk in todo:
            rows = reader.rows(chunk)
            layers, stats = _recode_chunk(reader, chunk, codec, rows)
            out.write_chunk(chunk, rows, layers, stats)
            done += 1
            on_chunk(done, len(committed))
        return done


def _recode_chunk(
    reader: StoreReader, chunk: int, codec: ResidualCodec, rows: TokenRows
) -> tuple[list[Codes], ChunkStats]:
    spec, source = reader.spec, reader.spec.codec
    positions = tuple(range(len(spec.layers)))
    codes = reader.codes(chunk, positions)
    n_tokens = rows.tokens_RT.size
    step = max(1, _BLOCK_VALUES // spec.values_per_token)
    counted_N = rows.counted_RT().reshape(-1)
    parts: list[tuple[Codes, ...]] = []
    added_L = np.zeros(len(positions))
    for start in range(0, n_tokens, step):
        block = slice(start, min(start + step, n_tokens))
        x_NLD = np.empty((block.stop - start, len(positions), spec.width), np.float32)
        source.decode({k: v[block] for k, v in codes.items()}, positions, positions, x_NLD)
        encoded = codec.encode(list(np.ascontiguousarray(x_NLD.transpose(1, 0, 2))))
        parts.append(encoded.layers)
        added_L += encoded.distortion_LN[:, counted_N[block]].sum(axis=1, dtype=np.float64)
    layers = join_blocks(parts)
    stats = reader.stats(chunk)
    return layers, dataclasses.replace(stats, distortion=stats.distortion + added_L)
