"""Sums over a chunk's counted positions, and what they say about a whole store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stores.codecs import Float32
from stores.layout import ChunkStats
from stores.places import Where, as_place
from stores.reader import StoreReader
from stores.spec import Split


class StatsBuilder:
    """Adds up the statistics of one chunk, block of tokens by block of tokens."""

    def __init__(self, n_layers: int, width: int) -> None:
        self._count = 0
        self._sum_LD = np.zeros((n_layers, width), np.float64)
        self._sum_squares_L = np.zeros(n_layers)
        self._distortion_L = np.zeros(n_layers)

    def add(
        self, x_LND: Sequence[Float32], distortion_LN: Float32, counted_N: NDArray[np.bool_]
    ) -> None:
        """Add N tokens; those with `counted_N` false are left out."""
        weight_N = counted_N.astype(np.float32)
        self._count += int(counted_N.sum())
        self._distortion_L += distortion_LN[:, counted_N].sum(axis=1, dtype=np.float64)
        for layer, x_ND in enumerate(x_LND):
            self._sum_LD[layer] += weight_N @ x_ND
            self._sum_squares_L[layer] += np.vecdot(x_ND, x_ND)[counted_N].sum(dtype=np.float64)

    def merge(self, other: StatsBuilder) -> None:
        """Add what another builder has added up."""
        self._count += other._count
        self._sum_LD += other._sum_LD
        self._sum_squares_L += other._sum_squares_L
        self._distortion_L += other._distortion_L

    def result(self) -> ChunkStats:
        """What was added so far."""
        return ChunkStats(
            count=np.array(self._count, np.int64),
            sum=self._sum_LD.astype(np.float32),
            sum_squares=self._sum_squares_L,
            distortion=self._distortion_L,
        )


@dataclass(frozen=True, kw_only=True)
class StoreStats:
    """Statistics of one split, over counted positions of committed chunks."""

    count: int
    mean_LD: NDArray[np.float64]
    mean_square_L: NDArray[np.float64]
    """Mean over positions and channels of the squared residual."""
    distortion_L: NDArray[np.float64]
    """NMSE that the codec adds, after per-token normalisation."""


def split_stats(
    reader: StoreReader, split: Split = "all", chunks: Sequence[int] | None = None
) -> StoreStats:
    """Add up the statistics of some chunks of a split; None: of those that are committed."""
    chunks = reader.chunks(split, complete=False) if chunks is None else chunks
    shape = (len(reader.spec.layers), reader.spec.width)
    count, sum_LD = 0, np.zeros(shape)
    squares_L, distortion_L = np.zeros(shape[0]), np.zeros(shape[0])
    for stats in reader.each(reader.stats, chunks):
        count += int(stats.count)
        sum_LD += stats.sum
        squares_L += stats.sum_squares
        distortion_L += stats.distortion
    n = max(count, 1)
    return StoreStats(
        count=count,
        mean_LD=sum_LD / n,
        mean_square_L=squares_L / (n * shape[1]),
        distortion_L=distortion_L / n,
    )


def stored_bytes(path: Where) -> int:
    """Size of every file of the store together, metadata included."""
    return as_place(path).total_size()
