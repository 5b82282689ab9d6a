"""Store -> shuffled, decoded, normalised tensors, read and decoded by background threads.

Codes, not residuals, are what is held and shuffled: about one byte a value. Tokens are decoded
when their batch is put together, straight into its buffer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from routesae_cache.batch_parts import Decoder, Pools, open_pools, shares
from routesae_cache.batch_parts import Norm as Norm
from routesae_cache.batch_slots import Batch as Batch
from routesae_cache.batch_slots import Slot, filled_in_background, make_slots
from routesae_cache.devices import batch_threads, own_cores
from stores.codecs import Codes
from stores.reader import StoreReader
from stores.spec import Split

_GROUP_TOKENS = 1 << 14  # shuffled together, whatever the codec; two groups are in memory


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Which tokens to read and in what order."""

    layers: tuple[int, ...]
    batch_tokens: int
    split: Split = "train"
    norm: Norm = "token"
    shuffle: bool = True
    seed: int = 42
    epochs: int = 1
    drop_last: bool = True
    """Leave out a last batch that is not full."""
    device: str = "cpu"
    streams: int = 1
    """The chunks are dealt out to so many, in turn; each is shuffled by itself."""
    own: tuple[int, ...] = (0,)
    """The streams to read; a batch has equally many tokens of each, one after the other."""
    chunks: tuple[int, ...] | None = None
    """Committed ones of the split, in order; None: all of it."""
    within_chunks: bool = False
    """Each batch is of one chunk, so that a chunk gives the same batches by itself."""
    threads: int | None = None
    """That read, and as many that decode; None: by the cores of this process. The batches are the
    same."""

    def __post_init__(self) -> None:
        if self.batch_tokens < 1 or self.epochs < 1:
            raise ValueError(
                "expected batch tokens and epochs of at least 1, "
                f"found {self.batch_tokens} and {self.epochs}"
            )


class _Group(NamedTuple):
    """Some chunks' counted tokens, in the order in which they are to be read."""

    codes: Codes
    """Of all tokens of the chunks."""
    token_N: NDArray[np.int64]
    """Index into the codes."""
    row_N: NDArray[np.int64]
    position_N: NDArray[np.int64]


class BatchSource:
    """The batches of a split of a store; every call of `batches` gives the same ones.

    Padding and the first token of each row are left out. Memory does not grow with the store.
    """

    def __init__(self, reader: StoreReader, config: BatchConfig) -> None:
        """IncompleteStoreError where chunks are missing; ValueError for layers there are not."""
        self._reader, self._config = reader, config
        codec, wanted = reader.spec.codec, reader.spec.positions(config.layers)
        self._positions = codec.required(wanted)
        self._decoder = Decoder(
            codec=codec, positions=self._positions, wanted=wanted, norm=config.norm
        )
        chunks = reader.chunks(config.split) if config.chunks is None else config.chunks
        self._chunks = list(chunks)
        self._counts = {chunk: self._count(chunk) for chunk in self._chunks}
        self.tokens = config.streams * self._shortest()
        """Tokens over all epochs and streams, each stream cut to the length of the shortest."""
        if not any(self._counts.values()):
            raise ValueError(f"{reader.path}: the {config.split} split has no tokens")

    @classmethod
    def in_order(
        cls,
        reader: StoreReader,
        layers: tuple[int, ...],
        *,
        split: Split,
        batch_tokens: int,
        device: str = "cpu",
        chunks: tuple[int, ...] | None = None,
        within_chunks: bool = False,
    ) -> BatchSource:
        """Every token of a split once, as the store has them, not normalised."""
        config = BatchConfig(
            layers=layers,
            batch_tokens=batch_tokens,
            split=split,
            norm="none",
            shuffle=False,
            drop_last=False,
            device=device,
            chunks=chunks,
            within_chunks=within_chunks,
        )
        return cls(reader, config)

    def __len__(self) -> int:
        assert not self._config.within_chunks
        own_tokens = self.tokens // self._config.streams * len(self._config.own)
        full, rest = divmod(own_tokens, self._config.batch_tokens)
        return full + (rest > 0 and not self._config.drop_last)

    @contextmanager
    def batches(self, start: int = 0) -> Generator[Iterator[Batch]]:
        """Batches from number `start` on, made in the background while the block is open."""
        threads = self._config.threads
        if threads is None:
            threads = batch_threads(own_cores())
        with open_pools(threads) as pools, ExitStack() as reading:
            streams = self._config.own
            parts = [reading.enter_context(self._read(each, start, pools)) for each in streams]
            yield parts[0] if len(parts) == 1 else map(_joined, zip(*parts, strict=False))

    @contextmanager
    def _read(self, stream: int, start: int, pools: Pools) -> Generator[Iterator[Batch]]:
        """Each batch's part from one stream."""
        size, rest = divmod(self._config.batch_tokens, len(self._config.own))
        assert not rest
        shape = (size, len(self._config.layers), self._reader.spec.width)
        slots = make_slots(shape, self._config.device)
        fill = partial(self._produce, stream, start, size, pools)
        with filled_in_background(fill, slots) as produced:
            yield produced

    def _count(self, chunk: int) -> int:
        spec = self._reader.spec
        part = spec.chunk_range(chunk)
        n_rows: int = part.stop - part.start
        if spec.packing == "joined" and chunk < spec.chunks - 1:
            return n_rows * (spec.context - 1)
        return int(self._reader.rows(chunk).counted_RT().sum())

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """All chunks, as an epoch has them."""
        order = np.array(self._chunks, np.int64)
        if self._config.shuffle:
            np.random.default_rng([self._config.seed, epoch]).shuffle(order)
        return order

    def _first(self, stream: int, epoch: int) -> int:
        """Which chunk of an epoch's order is a stream's first: dealing goes on across epochs."""
        return (stream - epoch * len(self._chunks)) % self._config.streams

    def _shortest(self) -> int:
        """Tokens of the stream that has the fewest."""
        streams = range(self._config.streams)
        tokens = dict.fromkeys(streams, 0)
        for epoch in range(self._config.epochs):
            counts = [self._counts[chunk] for chunk in self._order(epoch).tolist()]
            for stream in streams:
                tokens[stream] += sum(counts[self._first(stream, epoch) :: len(streams)])
        return min(tokens.values())

    def _plan(self, stream: int) -> Iterator[tuple[NDArray[np.int64], np.random.Generator]]:
        """Chunks of each of a stream's groups, and what permutes its tokens."""
        config, size = self._config, self._group_chunks()
        for epoch in range(config.epochs):
            order = self._order(epoch)
            dealt = range(self._first(stream, epoch), len(order), config.streams)
            for group in (dealt[first : first + size] for first in range(0, len(dealt), size)):
                group_rng = np.random.default_rng([config.seed, epoch, group.start])
                yield order[group], group_rng

    def _group_chunks(self) -> int:
        """Chunks whose codes are in memory together."""
        if self._config.within_chunks:
            return 1
        return min(max(1, _GROUP_TOKENS // self._chunk_tokens()), len(self._chunks))

    def _chunk_tokens(self) -> int:
        return self._reader.spec.chunk_rows * self._reader.spec.context

    def _groups(self, stream: int, skip_tokens: int, pools: Pools) -> Iterator[tuple[_Group, int]]:
        """Groups and the index of the first token to use; one is read ahead of the one in use."""
        spec = self._reader.spec
        room = self._group_chunks() * self._chunk_tokens()
        buffers = [spec.codec.empty(room, len(self._positions), spec.width) for _ in range(2)]
        ahead: Callable[[], _Group] | None = None
        ahead_start = 0
        for chunks, rng in self._plan(stream):
            size = sum(self._counts[int(chunk)] for chunk in chunks)
            if skip_tokens >= size:
                skip_tokens -= size
                continue
            if ahead is not None:
                group = ahead()
                ahead = self._load(chunks, rng, buffers[0], pools)
                yield group, ahead_start
                ahead_start = 0
            else:
                ahead = self._load(chunks, rng, buffers[0], pools)
                ahead_start, skip_tokens = skip_tokens, 0
            buffers.reverse()
        if ahead is not None:
            yield ahead(), ahead_start

    def _load(
        self, chunks: NDArray[np.int64], rng: np.random.Generator, buffer: Codes, pools: Pools
    ) -> Callable[[], _Group]:
        """Begin to read a group; returns what waits for it."""
        read, size = pools.read, self._chunk_tokens()
        begins = range(0, len(chunks) * size, size)
        layers = shares(len(self._positions), math.ceil(pools.threads / len(chunks)))
        reads = [
            (
                read.submit(self._load_rows, chunk, begin),
                [read.submit(self._load_codes, buffer, chunk, begin, each) for each in layers],
            )
            for chunk, begin in zip(chunks.tolist(), begins, strict=True)
        ]

        def loaded() -> _Group:
            parts = []
            for rows, codes in reads:
                parts.append(rows.result())
                for each in codes:
                    each.result()
            columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
            if self._config.shuffle:
                order = rng.permutation(len(columns[0]))
                columns = [column[order] for column in columns]
            return _Group(buffer, *columns)

        return loaded

    def _load_rows(self, chunk: int, begin: int) -> tuple[NDArray[np.int64], ...]:
        """Which of a chunk's tokens count: their place in the group, rows and positions."""
        counted_RT = self._reader.rows(chunk).counted_RT()
        row_N, position_N = np.nonzero(counted_RT)
        first_row = self._reader.spec.chunk_range(chunk).start
        return np.flatnonzero(counted_RT) + begin, row_N + first_row, position_N

    def _load_codes(self, buffer: Codes, chunk: int, begin: int, share: slice) -> None:
        """Of some of the layers."""
        part = self._reader.spec.chunk_range(chunk)
        end = begin + (part.stop - part.start) * self._reader.spec.context
        room = {name: values[begin:end, share] for name, values in buffer.items()}
        self._reader.codes(chunk, self._positions[share], room)

    def _produce(
        self, stream: int, start: int, size: int, pools: Pools, next_free: Callable[[], Slot]
    ) -> Iterator[tuple[Slot, int]]:
        slot, filled = next_free(), 0
        for group, first in self._groups(stream, start * size, pools):
            while first < len(group.row_N):
                taken = slice(first, min(first + size - filled, len(group.row_N)))
                target = slice(filled, filled + taken.stop - taken.start)
                room = slot.room()
                room.row_N[target] = group.row_N[taken]
                room.position_N[target] = group.position_N[taken]
                token_N, out_NLD = group.token_N[taken], room.x_NLD[target]
                self._decoder.decode(group.codes, token_N, out_NLD, pools)
                first, filled = taken.stop, target.stop
                if filled == size or (self._config.within_chunks and first == len(group.row_N)):
                    yield slot, filled
                    slot, filled = next_free(), 0
        if filled and not self._config.drop_last:
            yield slot, filled


def _joined(parts: Sequence[Batch]) -> Batch:
    return Batch(*map(torch.cat, zip(*parts, strict=True)))


def first_tokens(
    reader: StoreReader,
    layers: Sequence[int],
    split: Split,
    count: int,
    *,
    norm: Norm,
    seed: int,
    chunks: tuple[int, ...] | None = None,
) -> Tensor:
    """A sample of about `count` tokens of a split, drawn as training would, shape (N, L, D).

    `chunks` are as `BatchConfig` has them.
    """
    config = BatchConfig(
        layers=tuple(layers),
        batch_tokens=count,
        split=split,
        norm=norm,
        seed=seed,
        drop_last=False,
        chunks=chunks,
    )
    with BatchSource(reader, config).batches() as batches:
        return next(batches).x_NLD.clone()
