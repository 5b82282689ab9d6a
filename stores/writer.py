"""Writing a store: tokens of all rows first, then residuals chunk by chunk, each committed last."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Sequence
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
from stores.spec import StoreSpec


class StoreWriter:
    """The one process that may write to a store; a context manager that holds its lock.

    Whatever instant it is killed at, the committed chunks stay good and the rest is written
    again by the next writer. The lock is the operating system's and ends with the process.
    """

    def __init__(self, path: Path) -> None:
        """Open an existing store for writing; StoreLockedError while another writer lives."""
        self.path = path
        self._lock = _lock(path)
        try:
            self.spec = read_spec(path)
            group = open_group(path, "r+")
        except BaseException:
            os.close(self._lock)
            raise
        self._group = group
        self._stored = {stored.name: stored for stored in stored_arrays(self.spec)}
        self._arrays: dict[str, zarr.Array[Any]] = {}
        for leftover in path.rglob("*.partial"):
            leftover.unlink()

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
        """Release the lock."""
        os.close(self._lock)

    def write_rows(self, chunk: int, rows: TokenRows) -> None:
        """Write the token rows of one chunk; they count once `commit_rows` was called."""
        start = chunk * self.spec.chunk_rows
        part = slice(start, start + len(rows.lengths_R))
        for name, values in zip(ROW_ARRAYS, row_values(rows), strict=True):
            array = self._array(name)
            if array.shape[0] < part.stop:
                array.resize((max(part.stop, 2 * array.shape[0]), *array.shape[1:]))
            array[part] = values

    def commit_rows(self, spec: StoreSpec) -> None:
        """Declare the token rows complete, in one atomic step; `spec` has the new counts."""
        assert not self.spec.differences(spec)
        self.spec = spec
        resize(self._group, self.spec)
        self._arrays.clear()
        set_spec(self._group, self.spec)

    def pending(self) -> list[int]:
        """Chunks without committed residuals, ascending."""
        done = set(committed_chunks(self.path, self.spec))
        return [chunk for chunk in range(self.spec.chunks) if chunk not in done]

    def write_chunk(
        self, chunk: int, rows: TokenRows, layers: Sequence[Codes], stats: ChunkStats
    ) -> int:
        """Write the residuals of one chunk, then commit it.

        `rows` are the chunk's token rows as they are in the store; `layers` holds for each layer
        the codec's arrays with tokens flattened on the first axis. Returns the bytes written.
        """
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


def _lock(path: Path) -> int:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        read_spec(path)  # says what is there instead
        raise
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise StoreLockedError(path) from None
    return handle


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
