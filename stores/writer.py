"""Writing a store: tokens of all rows first, then residuals chunk by chunk, each committed last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from stores.chunk_files import encode_chunk
from stores.codecs import Codes
from stores.errors import SpecMismatchError, StoreError, StoreLockedError
from stores.layout import (
    ROW_ARRAYS,
    STAT_ARRAYS,
    ChunkStats,
    TokenRows,
    check_arrays,
    checksum,
    committed_chunks,
    digested,
    grow,
    new_store,
    read_spec,
    residual_array,
    residual_arrays,
    row_values,
    stored_arrays,
)
from stores.places import Where, as_place
from stores.spec import StoreSpec


class StoreWriter:
    """A process that may write to a store; a context manager that holds its lock.

    Either it has the store alone, or it shares it with others to fill in chunks, one process to
    a chunk. Whatever instant it is killed at, the committed chunks stay good and the rest is
    written again by the next writer. The locks are the operating system's and end with the
    process.
    """

    def __init__(self, path: Where, *, shared: bool = False) -> None:
        """Open an existing store for writing, alone or `shared` with others that say so too.

        StoreLockedError while another writer lives that this one cannot share with.
        """
        self.path, self._shared = as_place(path), shared
        read_spec(self.path)  # before anything is made there
        locks = self.path.lock(shared=shared)
        if locks is None:
            raise StoreLockedError(self.path)
        self._locks = locks
        try:
            self.spec = read_spec(self.path)
            check_arrays(self.path, self.spec)
            if not shared:
                self.path.remove_leftovers()
        except BaseException:
            locks.close()
            raise
        self._stored = {stored.name: stored for stored in stored_arrays(self.spec)}
        self._claims: set[int] = set()

    @classmethod
    def create(cls, path: Where, spec: StoreSpec) -> Self:
        """Make an empty store that appears at `path` whole, and open it."""
        place = as_place(path)
        place.make(new_store(spec))
        return cls(place)

    @classmethod
    def create_or_open(cls, path: Where, spec: StoreSpec) -> Self:
        """Make an empty store, or go on with one of the same description; SpecMismatchError."""
        place = as_place(path)
        if not place.exists():
            return cls.create(place, spec)
        writer = cls(place)
        if differences := writer.spec.differences(spec):
            writer.close()
            raise SpecMismatchError(place, differences)
        return writer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the locks."""
        self._locks.close()

    def write_rows(self, chunk: int, rows: TokenRows) -> None:
        """Write the token rows of one chunk; they count once `commit_rows` was called."""
        assert not self._shared
        for name, values in zip(ROW_ARRAYS, row_values(rows), strict=True):
            self._write(name, chunk, values)

    def commit_rows(self, spec: StoreSpec) -> None:
        """Declare the token rows complete, in one atomic step; `spec` has the new counts."""
        assert not self._shared
        assert not self.spec.differences(spec)
        # what is committed stays as it is: a last chunk that is not full gets no further rows
        assert spec.rows == self.spec.rows or not self.spec.rows % spec.chunk_rows
        self._locks.check()
        grow(self.path, spec)
        self.spec = spec

    def pending(self) -> list[int]:
        """Chunks without committed residuals, ascending."""
        done = set(committed_chunks(self.path, self.spec))
        return [chunk for chunk in range(self.spec.chunks) if chunk not in done]

    def claim(self, chunk: int) -> bool:
        """Whether the chunk is this writer's to write: not committed, and nobody else's.

        It stays so until it is committed or the writer closed, whatever way the process ends.
        """
        if self._shared and chunk not in self._claims:
            if not self._locks.take_chunk(chunk):
                return False
            self._claims.add(chunk)
        # whoever had the lock before may have committed it; a listing is what network file
        # systems keep up to date
        if chunk in committed_chunks(self.path, self.spec):
            if chunk in self._claims:
                self._disclaim(chunk)
            return False
        if self._shared:
            keys = [stored.chunk_key(chunk) for stored in self._stored.values()]
            self.path.remove_leftovers(keys)
        return True

    def _disclaim(self, chunk: int) -> None:
        self._claims.remove(chunk)
        self._locks.leave_chunk(chunk)

    def write_chunk(
        self, chunk: int, rows: TokenRows, layers: Sequence[Codes], stats: ChunkStats
    ) -> int:
        """Write the residuals of one chunk, then commit it.

        `rows` are the chunk's token rows as they are in the store; `layers` holds for each layer
        the codec's arrays with tokens flattened on the first axis. A writer that shares the
        store has claimed the chunk. Returns the bytes written.
        """
        assert not self._shared or chunk in self._claims
        spec = self.spec
        digests = [checksum(values) for values in row_values(rows)]
        by_layer = dict(zip(spec.layers, layers, strict=True))
        residuals = {
            residual_array(layer, layout): by_layer[layer][layout.name]
            for layer, layout in residual_arrays(spec)
        }
        n_rows = len(rows.lengths_R)
        written: list[_Written] = []
        with ThreadPoolExecutor(thread_name_prefix="write") as pool:
            written += pool.map(
                lambda name: self._write(
                    name, chunk, residuals[name].reshape(n_rows, *self._stored[name].inner)
                ),
                residuals,
            )
            written += pool.map(
                lambda name: self._write(f"stats/{name}", chunk, getattr(stats, name)), STAT_ARRAYS
            )
        digests += [array.checksum for array in written]
        assert len(digests) == len(digested(spec))
        self._write("digest", chunk, np.array(digests, np.uint32))
        size = sum(self.path.size(self._stored[name].chunk_key(chunk)) for name in ROW_ARRAYS)
        self.path.sync()
        self._commit(chunk)
        return size + sum(array.size for array in written)

    def write_files(self, chunk: int, files: Mapping[str, bytes]) -> int:
        """Write the files of one chunk as another store has them, then commit it.

        What is there already is not written again; all is read back. Returns the bytes of the
        chunk, and raises StoreError where they do not come back as they are.
        """
        with ThreadPoolExecutor(max(4, self.path.parallel), thread_name_prefix="write") as pool:
            for _ in pool.map(self._copy_file, files.items()):
                pass
        self.path.sync()
        self._commit(chunk)
        return sum(map(len, files.values()))

    def _copy_file(self, file: tuple[str, bytes]) -> None:
        key, content = file
        if self._holds(key, content):
            return
        self._locks.check()
        self.path.write(key, content)
        if not self._holds(key, content):
            raise StoreError(f"{self.path}: {key} does not read back as it was written")

    def _holds(self, key: str, content: bytes) -> bool:
        try:
            return self.path.read(key) == content
        except FileNotFoundError:
            return False

    def _write(self, name: str, chunk: int, values: NDArray[Any]) -> _Written:
        """Write one array of one chunk."""
        stored = self._stored[name]
        shaped = values.reshape(-1, *stored.inner)
        content = encode_chunk(
            shaped, stored.dtype, stored.chunk_shape(self.spec), stored.compression
        )
        self._locks.check()
        self.path.write(stored.chunk_key(chunk), content)
        return _Written(len(content), checksum(values))

    def _commit(self, chunk: int) -> None:
        stored = self._stored["committed"]
        one = np.ones(1, stored.dtype)
        content = encode_chunk(one, stored.dtype, one.shape, stored.compression)
        self._locks.check()
        self.path.commit(stored.chunk_key(chunk), content)
        if self._shared:
            self._disclaim(chunk)


class _Written(NamedTuple):
    """One array of one chunk, as it was written."""

    size: int
    """Bytes of the file."""
    checksum: int
    """Of the values."""
