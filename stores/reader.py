"""Reading a store: any subset of layers, a chunk at a time, every byte checked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stores.chunk_files import read_chunk_file
from stores.codecs import Codes, Float32
from stores.errors import CorruptChunkError, IncompleteStoreError
from stores.layout import (
    ROW_ARRAYS,
    STAT_ARRAYS,
    ChunkStats,
    TokenRows,
    checksum,
    committed_chunks,
    digested,
    open_array,
    open_group,
    read_spec,
    residual_array,
    stored_arrays,
)
from stores.spec import Split


class StoreReader:
    """A store opened for reading; holds no file open and no lock.

    Raises NotAStoreError and NewerFormatError when opened, CorruptChunkError from every read
    that does not give what was written.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.spec = read_spec(self.path)
        group = open_group(self.path, "r")
        self._stored = {stored.name: stored for stored in stored_arrays(self.spec)}
        self._arrays = {
            name: open_array(group, self.spec, stored) for name, stored in self._stored.items()
        }
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

    def rows(self, chunk: int, *, check: bool = True) -> TokenRows:
        """Token rows of a chunk; `check=False` for a chunk whose residuals are still to come."""
        part = self.spec.chunk_range(chunk)
        digests = self._digests(chunk) if check else None
        tokens, lengths, documents = (self._read(name, chunk, part, digests) for name in ROW_ARRAYS)
        return TokenRows(tokens, lengths, [str(text) for text in documents])

    def stats(self, chunk: int) -> ChunkStats:
        """Sums over the counted positions of a chunk."""
        digests = self._digests(chunk)
        return ChunkStats(*(self._read(f"stats/{n}", chunk, chunk, digests) for n in STAT_ARRAYS))

    def codes(self, chunk: int, positions: Sequence[int], out: Codes | None = None) -> Codes:
        """The codec's arrays of the layers at `positions`: shape (N, len(positions)[, per_token]).

        N runs over all positions of all rows of the chunk, padding included. Written to `out`
        where it is given.
        """
        spec, part, digests = self.spec, self.spec.chunk_range(chunk), self._digests(chunk)
        n_tokens = (part.stop - part.start) * spec.context
        if out is None:
            out = spec.codec.empty(n_tokens, len(positions), spec.width)
        for layout in spec.codec.layout(spec.width):
            stacked = out[layout.name]
            for index, position in enumerate(positions):
                name = residual_array(spec.layers[position], layout)
                values = self._residual_chunk(name, chunk, digests)[: part.stop - part.start]
                stacked[:, index] = values.reshape(n_tokens, *stacked.shape[2:])
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
        try:
            digests = self._digests(chunk)
            self._read("committed", chunk, chunk, None)
        except CorruptChunkError as error:
            yield error
            return
        part = self.spec.chunk_range(chunk)
        for name in self._digested:
            where = chunk if name.startswith("stats/") else part
            try:
                if name.startswith("residuals/"):
                    self._residual_chunk(name, chunk, digests)
                else:
                    self._read(name, chunk, where, digests)
            except CorruptChunkError as error:
                yield error

    def _digests(self, chunk: int) -> NDArray[np.uint32]:
        return self._read("digest", chunk, chunk, None)

    def _read(
        self, name: str, chunk: int, where: int | slice, digests: NDArray[np.uint32] | None
    ) -> NDArray[Any]:
        array = self._arrays[name]
        if not self._stored[name].chunk_file(self.path, chunk).exists():  # zarr would read zeros
            raise CorruptChunkError(self.path, chunk, name, "the file is missing")
        try:
            values = np.asarray(array[where])
        except (ValueError, RuntimeError, TypeError, OSError) as error:
            raise CorruptChunkError(self.path, chunk, name, str(error)) from error
        self._compare(name, chunk, values, digests)
        return values

    def _residual_chunk(self, name: str, chunk: int, digests: NDArray[np.uint32]) -> NDArray[Any]:
        """All rows of a chunk, those beyond the end of the array included."""
        stored = self._stored[name]
        shape = stored.chunk_shape(self.spec)
        try:
            file = stored.chunk_file(self.path, chunk)
            values = read_chunk_file(file, stored.dtype, shape, stored.compression)
        except ValueError as error:
            raise CorruptChunkError(self.path, chunk, name, str(error)) from error
        part = self.spec.chunk_range(chunk)
        self._compare(name, chunk, values[: part.stop - part.start], digests)
        return values

    def _compare(
        self, name: str, chunk: int, values: NDArray[Any], digests: NDArray[np.uint32] | None
    ) -> None:
        if digests is not None and checksum(values) != digests[self._digested[name]]:
            raise CorruptChunkError(self.path, chunk, name, "the values are not the ones written")
