"""Reading a store: any subset of layers, a chunk at a time, every byte checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import takewhile
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from stores.chunk_files import decode_chunk
from stores.codecs import Codes, Float32
from stores.errors import CorruptChunkError, IncompleteStoreError
from stores.layout import (
    ROW_ARRAYS,
    STAT_ARRAYS,
    ChunkStats,
    TokenRows,
    check_arrays,
    checksum,
    committed_chunks,
    digested,
    read_spec,
    residual_array,
    stored_arrays,
)
from stores.places import Where, as_place
from stores.spec import Split

T = TypeVar("T")
Read = Callable[[], bytes]


class StoreReader:
    """A store opened for reading; holds no file open and no lock.

    Raises NotAStoreError and NewerFormatError when opened, CorruptChunkError from every read
    that does not give what was written.
    """

    def __init__(self, path: Where) -> None:
        self.path = as_place(path)
        self.spec = read_spec(self.path)
        check_arrays(self.path, self.spec)
        self._stored = {stored.name: stored for stored in stored_arrays(self.spec)}
        self._digested = {name: i for i, name in enumerate(digested(self.spec))}
        self.committed = committed_chunks(self.path, self.spec)
        """Chunks committed when the store was opened."""

    def chunks(self, split: Split, *, complete: bool = True) -> list[int]:
        """Committed chunks of a split; IncompleteStoreError if `complete` and one is missing."""
        wanted, done = self.spec.split_chunks(split), set(self.committed)
        found = [chunk for chunk in wanted if chunk in done]
        if complete and (len(found) < len(wanted) or not found):
            raise IncompleteStoreError(self.path, len(wanted) - len(found), len(wanted), split)
        return found

    def prefix(self, split: Split) -> list[int]:
        """Committed chunks of a split from its first on, up to the first that is missing.

        Chunks may be committed in any order; while a harvest goes on, this list only grows.
        """
        return list(takewhile(set(self.committed).__contains__, self.spec.split_chunks(split)))

    def each(self, function: Callable[[int], T], chunks: Iterable[int]) -> Iterator[T]:
        """What a function gives for each chunk, in order; several are read at once if it helps."""
        with ThreadPoolExecutor(self.path.parallel) as pool:
            yield from pool.map(function, chunks)

    def rows(self, chunk: int, *, check: bool = True) -> TokenRows:
        """Token rows of a chunk; `check=False` for a chunk whose residuals are still to come."""
        tokens, lengths, documents = self._arrays(ROW_ARRAYS, chunk, check=check)
        # PyTorch takes no array that it may not write to
        return TokenRows(tokens.copy(), lengths.copy(), [str(text) for text in documents])

    def stats(self, chunk: int) -> ChunkStats:
        """Sums over the counted positions of a chunk."""
        arrays = self._arrays([f"stats/{name}" for name in STAT_ARRAYS], chunk)
        return ChunkStats(*(array[0] for array in arrays))

    def codes(self, chunk: int, positions: Sequence[int], out: Codes | None = None) -> Codes:
        """The codec's arrays of the layers at `positions`: shape (N, len(positions)[, per_token]).

        N runs over all positions of all rows of the chunk, padding included. Written to `out`
        where it is given.
        """
        spec, part = self.spec, self.spec.chunk_range(chunk)
        n_tokens = (part.stop - part.start) * spec.context
        if out is None:
            out = spec.codec.empty(n_tokens, len(positions), spec.width)
        room = {
            residual_array(spec.layers[position], layout): out[layout.name][:, index]
            for layout in spec.codec.layout(spec.width)
            for index, position in enumerate(positions)
        }
        for values, target in zip(self._arrays(list(room), chunk), room.values(), strict=True):
            target[:] = values.reshape(target.shape)
        return out

    def residuals(self, chunk: int, layers: Sequence[int]) -> Float32:
        """Decoded residuals of a chunk, shape (N, len(layers), D), padding included."""
        wanted = self.spec.positions(tuple(layers))
        positions = self.spec.codec.required(wanted)
        codes = self.codes(chunk, positions)
        n_tokens = len(next(iter(codes.values())))
        out_NLD = np.empty((n_tokens, len(layers), self.spec.width), np.float32)
        self.spec.codec.decode(codes, positions, wanted, out_NLD)
        return out_NLD

    def files(self, chunk: int) -> dict[str, bytes]:
        """The files of a committed chunk by their key, checked, without the one that commits it."""
        found: dict[str, bytes] = {}
        reads = self._start(["digest", *self._digested], chunk)
        digests: NDArray[np.uint32] | None = None
        for name, read in reads.items():
            content = self._content(name, chunk, read)
            values = self._decoded(name, chunk, content, digests)
            if digests is None:
                digests = values[0]
            found[self._stored[name].chunk_key(chunk)] = content
        return found

    def verify(self) -> Iterator[tuple[int, CorruptChunkError | None]]:
        """Read everything that is committed; yields each chunk with the first error of each array.

        A chunk without fault is yielded once with None.
        """
        for chunk in self.committed:
            faults = list(self._faults(chunk))
            if not faults:
                yield chunk, None
            yield from ((chunk, fault) for fault in faults)

    def _faults(self, chunk: int) -> Iterator[CorruptChunkError]:
        reads = self._start(["digest", "committed", *self._digested], chunk)
        try:
            digests = self._values("digest", chunk, reads["digest"], None)[0]
            self._values("committed", chunk, reads["committed"], None)
        except CorruptChunkError as error:
            yield error
            return
        for name in self._digested:
            try:
                self._values(name, chunk, reads[name], digests)
            except CorruptChunkError as error:
                yield error

    def _arrays(
        self, names: Sequence[str], chunk: int, *, check: bool = True
    ) -> Iterator[NDArray[Any]]:
        """Arrays of a chunk, one after the other; only the rows there are."""
        reads = self._start(["digest", *names] if check else names, chunk)
        digests = self._values("digest", chunk, reads["digest"], None)[0] if check else None
        for name in names:
            yield self._values(name, chunk, reads.pop(name), digests)

    def _start(self, names: Sequence[str], chunk: int) -> dict[str, Read]:
        keys = [self._stored[name].chunk_key(chunk) for name in names]
        return dict(zip(names, self.path.fetch(keys), strict=True))

    def _values(
        self, name: str, chunk: int, read: Read, digests: NDArray[np.uint32] | None
    ) -> NDArray[Any]:
        try:
            return self._decoded(name, chunk, self._content(name, chunk, read), digests)
        except CorruptChunkError:
            key = self._stored[name].chunk_key(chunk)
            if not self.path.forget(key):
                raise
        # a local copy was spoilt, or of a store that was here before
        again = self._content(name, chunk, partial(self.path.read, key))
        return self._decoded(name, chunk, again, digests)

    def _content(self, name: str, chunk: int, read: Read) -> bytes:
        try:
            return read()
        except FileNotFoundError:
            raise CorruptChunkError(self.path, chunk, name, "the file is missing") from None
        except OSError as error:
            reason = f"the file cannot be read: {error.strerror}"
            raise CorruptChunkError(self.path, chunk, name, reason) from error

    def _decoded(
        self, name: str, chunk: int, content: bytes, digests: NDArray[np.uint32] | None
    ) -> NDArray[Any]:
        stored, part = self._stored[name], self.spec.chunk_range(chunk)
        shape = stored.chunk_shape(self.spec)
        try:
            values = decode_chunk(content, stored.dtype, shape, stored.compression)
        except ValueError as error:
            raise CorruptChunkError(self.path, chunk, name, str(error)) from error
        if stored.by == "row":
            values = values[: part.stop - part.start]
        if digests is not None and checksum(values) != digests[self._digested[name]]:
            raise CorruptChunkError(self.path, chunk, name, "the values are not the ones written")
        return values
