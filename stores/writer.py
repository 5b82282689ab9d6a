"""Writing a store: tokens of all rows first, then residuals chunk by chunk, each committed last."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import zarr
from numpy.typing import NDArray

from stores.chunk_files import write_chunk_file
from stores.codecs import Codes
from stores.errors import StoreError, StoreLockedError
from stores.layout import (
    ROW_ARRAYS,
    STAT_ARRAYS,
    ChunkStats,
    TokenRows,
    checksum,
    committed_chunks,
    create_arrays,
    digested,
    open_array,
    open_group,
    read_spec,
    residual_array,
    residual_arrays,
    resize,
    row_values,
    set_spec,
    stored_arrays,
)
from stores.locks import FileLock, leave_store, take_chunk, take_store
from stores.spec import StoreSpec


class StoreWriter:
    """A process that may write to a store; a context manager that holds its lock.

    Either it has the store alone, or it shares it with others to fill in chunks, one process to
    a chunk. Whatever instant it is killed at, the committed chunks stay good and the rest is
    written again by the next writer. The locks are the operating system's and end with the
    process.
    """

    def __init__(self, path: Path, *, shared: bool = False) -> None:
        """Open an existing store for writing, alone or `shared` with others that say so too.

        StoreLockedError while another writer lives that this one cannot share with.
        """
        self.path, self._shared = path, shared
        read_spec(path)  # before anything is made there
        lock = take_store(path, shared=shared)
        if lock is None:
            raise StoreLockedError(path)
        self._lock = lock
        try:
            self.spec = read_spec(path)
            group = open_group(path, "r+")
        except BaseException:
            leave_store(path, lock)
            raise
        self._group = group
        self._stored = {stored.name: stored for stored in stored_arrays(self.spec)}
        self._arrays: dict[str, zarr.Array[Any]] = {}
        self._claims: dict[int, FileLock] = {}
        if not shared:
            _remove(path.rglob("*.partial"))

    @classmethod
    def create(cls, path: Path, spec: StoreSpec) -> Self:
        """Make an empty store that appears at `path` whole, and open it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            group = zarr.open_group(staging, mode="w", zarr_format=3)
            create_arrays(group, spec)
            set_spec(group, spec)
            staging.chmod(0o777 & ~_umask())
            try:
                staging.rename(path)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    raise
                raise StoreError(
                    f"{path} exists already and is not a store to go on with"
                ) from None
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return cls(path)

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
        for chunk in list(self._claims):
            self._disclaim(chunk)
        leave_store(self.path, self._lock)

    def write_rows(self, chunk: int, rows: TokenRows) -> None:
        """Write the token rows of one chunk; they count once `commit_rows` was called."""
        assert not self._shared
        start = chunk * self.spec.chunk_rows
        part = slice(start, start + len(rows.lengths_R))
        for name, values in zip(ROW_ARRAYS, row_values(rows), strict=True):
            array = self._array(name)
            if array.shape[0] < part.stop:
                array.resize((max(part.stop, 2 * array.shape[0]), *array.shape[1:]))
            array[part] = values

    def commit_rows(self, spec: StoreSpec) -> None:
        """Declare the token rows complete, in one atomic step; `spec` has the new counts."""
        assert not self._shared
        assert not self.spec.differences(spec)
        self.spec = spec
        resize(self._group, self.spec)
        self._arrays.clear()
        set_spec(self._group, self.spec)

    def pending(self) -> list[int]:
        """Chunks without committed residuals, ascending."""
        done = set(committed_chunks(self.path, self.spec))
        return [chunk for chunk in range(self.spec.chunks) if chunk not in done]

    def claim(self, chunk: int) -> bool:
        """Whether the chunk is this writer's to write: not committed, and nobody else's.

        It stays so until it is committed or the writer closed, whatever way the process ends.
        """
        if self._shared and chunk not in self._claims:
            lock = take_chunk(self.path, chunk)
            if lock is None:
                return False
            self._claims[chunk] = lock
        # whoever had the lock before may have committed it; a listing is what network file
        # systems keep up to date
        if chunk in committed_chunks(self.path, self.spec):
            if chunk in self._claims:
                self._disclaim(chunk)
            return False
        if self._shared:
            self._remove_leftovers(chunk)
        return True

    def _disclaim(self, chunk: int) -> None:
        self._claims.pop(chunk).release(remove=True)

    def _remove_leftovers(self, chunk: int) -> None:
        """Of a process that died while it wrote this chunk."""
        for stored in self._stored.values():
            file = stored.chunk_file(self.path, chunk)
            _remove(file.parent.glob(f"{file.name}.*.partial"))

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
        with ThreadPoolExecutor(thread_name_prefix="write") as pool:
            digests += pool.map(
                lambda name: self._write_residuals(name, chunk, residuals[name]), residuals
            )
        for name in STAT_ARRAYS:
            values = getattr(stats, name)
            digests.append(checksum(values))
            self._array(f"stats/{name}")[chunk] = values
        assert len(digests) == len(digested(spec))
        self._array("digest")[chunk] = np.array(digests, np.uint32)
        size = sum(
            self._stored[name].chunk_file(self.path, chunk).stat().st_size
            for name in digested(spec)
        )
        self._array("committed")[chunk] = 1
        if self._shared:
            self._disclaim(chunk)
        return size

    def _write_residuals(self, name: str, chunk: int, flat: NDArray[Any]) -> int:
        """Write one array of one chunk; returns its checksum."""
        stored, part = self._stored[name], self.spec.chunk_range(chunk)
        write_chunk_file(
            stored.chunk_file(self.path, chunk),
            flat.reshape(part.stop - part.start, *stored.inner),
            stored.chunk_shape(self.spec),
            stored.compression,
        )
        return checksum(flat)

    def _array(self, name: str) -> zarr.Array[Any]:
        if name not in self._arrays:
            self._arrays[name] = open_array(self._group, self.spec, self._stored[name])
        return self._arrays[name]


def _remove(files: Iterable[Path]) -> None:
    for file in list(files):
        file.unlink(missing_ok=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
