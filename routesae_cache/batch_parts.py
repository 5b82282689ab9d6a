"""Batches decoded in parts, on several threads: which of them does what changes no bit."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from routesae_cache.losses import STD_EPS
from stores.codecs import Codes, Float32, ResidualCodec

_BLOCK_VALUES = 1 << 19  # decoded and normalised while they are in the cache
_LEAST_VALUES = 1 << 16  # for a thread's part of a batch, where there are more than
_FEWEST_PARTS = 2

Norm = Literal["token", "none"]


class Pools(NamedTuple):
    """What reads and what decodes."""

    threads: int
    """Of each."""
    read: ThreadPoolExecutor
    decode: ThreadPoolExecutor


@contextmanager
def open_pools(threads: int) -> Generator[Pools]:
    """Threads that end with the block; what they have not begun by then is left."""
    pools = [ThreadPoolExecutor(threads, thread_name_prefix=name) for name in ("read", "decode")]
    try:
        yield Pools(threads, *pools)
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)


def shares(size: int, parts: int) -> list[slice]:
    """So many slices of about the same length, fewer where there would be nothing in some."""
    parts = min(size, parts)
    ends = [size * part // parts for part in range(parts + 1)]
    return [slice(*each) for each in pairwise(ends)]


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """Codes of shuffled tokens -> residuals."""

    codec: ResidualCodec
    positions: tuple[int, ...]
    """Layers whose codes there are."""
    wanted: tuple[int, ...]
    """Layers to decode."""
    norm: Norm

    def decode(
        self, codes: Codes, token_N: NDArray[np.int64], out_NLD: Float32, pools: Pools
    ) -> None:
        """Decode the tokens at these places in the codes; a thread's error is raised."""
        n_values = len(token_N) * len(self.positions) * out_NLD.shape[-1]
        worthwhile = max(_FEWEST_PARTS, n_values // _LEAST_VALUES)
        parts = [
            pools.decode.submit(self._decode_part, codes, token_N[share], out_NLD[share])
            for share in shares(len(token_N), min(pools.threads, worthwhile))
        ]
        for part in parts:
            part.result()

    def _decode_part(self, codes: Codes, token_N: NDArray[np.int64], out_NLD: Float32) -> None:
        block = max(1, _BLOCK_VALUES // (len(self.positions) * out_NLD.shape[-1]))
        for start in range(0, len(out_NLD), block):
            part = slice(start, min(start + block, len(out_NLD)))
            gathered = {name: values[token_N[part]] for name, values in codes.items()}
            self.codec.decode(gathered, self.positions, self.wanted, out_NLD[part])
            if self.norm == "token":
                _normalise_in_place(out_NLD[part])


def _normalise_in_place(x_NLD: Float32) -> None:
    """`losses.normalise_token`, on a block that is still in the cache."""
    width = x_NLD.shape[-1]
    # vector by vector, so that a layer's last bits do not depend on the layers beside it
    sum_NL = np.vecdot(x_NLD, np.ones(width, np.float32))
    x_NLD -= (sum_NL / np.float32(width))[..., None]
    std_NL = np.sqrt(np.vecdot(x_NLD, x_NLD) / np.float32(width - 1))
    x_NLD *= np.reciprocal(std_NL + np.float32(STD_EPS))[..., None]
