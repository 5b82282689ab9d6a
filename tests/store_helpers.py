"""Synthetic stores: small, the same each time, made without a model."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from stores.codecs import (
    Bf16Codec,
    Codes,
    DeltaCodec,
    Encoded,
    Float32,
    Int8Codec,
    ResidualCodec,
)
from stores.layout import ChunkStats, TokenRows
from stores.places import Where, as_place
from stores.reader import StoreReader
from stores.spec import StoreSpec
from stores.stats import StatsBuilder
from stores.writer import StoreWriter

VARIANTS: dict[str, ResidualCodec] = {
    "bf16": Bf16Codec(),
    "int8": Int8Codec(),
    "delta": DeltaCodec(),
    "delta-fine": DeltaCodec(step=0.02),
    "delta-coarse": DeltaCodec(step=0.5),
    "delta-keyframe-1": DeltaCodec(keyframe_every=1),
    "delta-keyframe-3": DeltaCodec(step=0.1, keyframe_every=3),
}
"""Every kind of codec, and values of its parameters that matter; ids for parametrised tests."""


def store_spec(**changes: Any) -> StoreSpec:
    """Three chunks of rows, the first of them eval and the last not full; no two sizes equal."""
    values: dict[str, Any] = {
        "model": {"name": "tiny", "weights": "0123", "dtype": "float32"},
        "tokenizer": {"name": "tiny", "bos_id": 1},
        "text": {"dataset": "synthetic", "seed": 0},
        "packing": "document",
        "layers": (1, 2, 4),
        "n_blocks": 6,
        "width": 8,
        "context": 5,
        "codec": DeltaCodec(),
        "batch_rows": 2,
        "chunk_rows": 3,
        "eval_target": 9,
        "eval_rows": 3,
        "train_rows": 4,
    } | changes
    return counted(StoreSpec(**values))


def counted(spec: StoreSpec) -> StoreSpec:
    """The spec with the numbers of tokens that `token_rows` gives for its rows."""
    lengths = {
        split: sum(int(token_rows(spec, c).lengths_R.sum()) for c in spec.split_chunks(split))
        for split in ("eval", "train")
    }
    return dataclasses.replace(spec, eval_tokens=lengths["eval"], train_tokens=lengths["train"])


def grown(spec: StoreSpec, train_rows: int) -> StoreSpec:
    """The same store with another number of rows in the train split."""
    return counted(dataclasses.replace(spec, train_rows=train_rows))


def without_rows(spec: StoreSpec) -> StoreSpec:
    """The spec of a store to which no row was written yet."""
    return dataclasses.replace(spec, eval_rows=0, train_rows=0, eval_tokens=0, train_tokens=0)


def token_rows(spec: StoreSpec, chunk: int) -> TokenRows:
    """Token rows of a chunk, some of them padded; they depend on the row's number alone."""
    rows = range(spec.rows)[spec.chunk_range(chunk)]
    tokens = np.array([[7 * r + t for t in range(spec.context)] for r in rows], np.int32)
    lengths = np.array([spec.context - r % min(3, spec.context) for r in rows], np.int32)
    tokens[np.arange(spec.context) >= lengths[:, None]] = 0
    documents = [json.dumps([[1, {"title": f"№ {row}"}]] if row % 2 else []) for row in rows]
    return TokenRows(tokens, lengths, documents)


def residuals(spec: StoreSpec, chunk: int) -> list[Float32]:
    """For each layer (N, D): a walk from layer to layer, zeros where there is padding."""
    rows = token_rows(spec, chunk)
    n_rows, n_layers = len(rows.lengths_R), len(spec.layers)
    real_N1 = (np.arange(spec.context) < rows.lengths_R[:, None]).reshape(-1, 1)
    rng = np.random.default_rng([chunk, n_rows])
    steps_LND = rng.standard_normal((n_layers, n_rows * spec.context, spec.width))
    x_LND = np.cumsum(steps_LND * 0.3, axis=0) + 2 * steps_LND[0] + 0.1
    return [(x_ND * real_N1).astype(np.float32) for x_ND in x_LND]


def encoded_chunk(
    spec: StoreSpec,
    chunk: int,
    x_LND: Sequence[Float32] | None = None,
    rows: TokenRows | None = None,
) -> tuple[tuple[Codes, ...], ChunkStats]:
    """What `StoreWriter.write_chunk` takes; of synthetic residuals and rows if none are given."""
    x_LND = residuals(spec, chunk) if x_LND is None else x_LND
    rows = token_rows(spec, chunk) if rows is None else rows
    encoded = spec.codec.encode(x_LND)
    stats = StatsBuilder(len(spec.layers), spec.width)
    stats.add(x_LND, encoded.distortion_LN, rows.counted_RT().reshape(-1))
    return encoded.layers, stats.result()


def fill_store(path: Where, spec: StoreSpec, chunks: Iterable[int] | None = None) -> StoreReader:
    """Make the store, or go on with it as a harvest does; `chunks` are committed, None for all."""
    there = as_place(path).exists()
    make = StoreWriter(path) if there else StoreWriter.create(path, without_rows(spec))
    with make as writer:
        if writer.spec.rows < spec.rows:
            for chunk in range(writer.spec.chunks, spec.chunks):
                writer.write_rows(chunk, token_rows(spec, chunk))
            writer.commit_rows(spec)
        for chunk in writer.pending():
            if chunks is None or chunk in chunks:
                layers, stats = encoded_chunk(spec, chunk)
                writer.write_chunk(chunk, token_rows(spec, chunk), layers, stats)
    return StoreReader(path)


def store_bytes(path: os.PathLike[str]) -> dict[str, bytes]:
    """Every file of a store by its path in it."""
    root = Path(path)
    files = (file for file in sorted(root.rglob("*")) if file.is_file())
    return {str(file.relative_to(root)): file.read_bytes() for file in files}


def chunk_file(path: os.PathLike[str], array: str, chunk: int) -> Path:
    """The file with an array's values of one chunk."""
    file = Path(path) / array / "c" / str(chunk)
    while file.is_dir():
        file /= "0"
    return file


class Killed(Exception):
    """The process is said to have ended here."""


@contextmanager
def killed_at(write: int, error: Exception | None = None) -> Iterator[list[Path]]:
    """Let `write` files appear, leave half of the next one, let none appear any more.

    Every file of a store appears by a rename. Yields what appeared; the list grows.
    """
    appeared: list[Path] = []
    alive, lock = True, threading.Lock()

    def until_killed(rename: Callable[..., None]) -> Callable[..., None]:
        def wrapper(source: Path, target: Path) -> None:
            nonlocal alive
            with lock:
                if alive and len(appeared) < write:
                    appeared.append(Path(target))
                    rename(source, target)
                    return
                if alive:
                    content = Path(source).read_bytes()
                    leftover = Path(target).with_suffix(".0123456789abcdef.partial")
                    leftover.write_bytes(content[: len(content) // 2])
                alive = False
            raise error or Killed(f"at write {write}, {target}")

        return wrapper

    with (
        mock.patch("os.replace", until_killed(os.replace)),
        mock.patch("os.link", until_killed(os.link)),
    ):
        yield appeared


def stacked(encoded: Encoded, positions: Sequence[int] | None = None) -> Codes:
    """Codes of an encoded block as `ResidualCodec.decode` takes them."""
    positions = range(len(encoded.layers)) if positions is None else positions
    names = encoded.layers[0]
    return {n: np.stack([encoded.layers[p][n] for p in positions], axis=1) for n in names}


def decoded(codec: ResidualCodec, encoded: Encoded, wanted: Sequence[int] | None = None) -> Float32:
    """Decode some layers of an encoded block, all if None: shape (N, len(wanted), D)."""
    wanted = range(len(encoded.layers)) if wanted is None else wanted
    positions = codec.required(wanted)
    codes = stacked(encoded, positions)
    first = next(iter(codes.values()))
    planes = 2 if isinstance(codec, DeltaCodec) else 1
    out_NLD = np.full((len(first), len(wanted), planes * first.shape[2]), np.nan, np.float32)
    codec.decode(codes, positions, wanted, out_NLD)
    return out_NLD
