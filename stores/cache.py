"""Chunks of a store that were read, kept in a folder of bounded size for when they come again."""

from __future__ import annotations

import hashlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stores.place import Locks, Place

if TYPE_CHECKING:
    from zarr.abc.store import Store

_LOOK_AGAIN = 20  # times while the folder fills: other processes may use it, too
_SUFFIX = ".chunk"


class _Kept(NamedTuple):
    used: float
    size: int
    file: Path


class CachedPlace(Place):
    """Another place, whose chunks are looked for in a folder first.

    What this process has used stays until it ends, and nothing more is kept once that fills the
    folder: of a store that is read over and over, in another order each time, as much comes from
    the folder as fits in it. What was not used since the process began goes first, the oldest
    before the others. Any number of processes may share a folder.
    """

    def __init__(self, place: Place, folder: Path, gigabytes: float) -> None:
        """ValueError for a size that is none, or a folder that cannot be made."""
        if not 0 < gigabytes < float("inf"):
            raise ValueError(f"--cache-gb: expected more than 0, found {gigabytes:g}")
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--cache-dir: expected a folder, found the file {folder}")
        self._place, self._root, self._gigabytes = place, folder, gigabytes
        self._folder = folder / hashlib.sha256(str(place).encode()).hexdigest()[:16]
        self._folder.mkdir(parents=True, exist_ok=True)
        self._most = int(gigabytes * 1e9)
        self._began = time.time()
        self._lock = threading.Lock()
        self._used: set[str] = set()
        self._size = 0
        self._until_look = 0
        self.parallel = place.parallel

    def __str__(self) -> str:
        return str(self._place)

    @property
    def name(self) -> str:
        return self._place.name

    def __reduce__(self) -> tuple[Any, ...]:
        return CachedPlace, (self._place, self._root, self._gigabytes)

    def _file(self, key: str) -> Path:
        return self._folder / f"{key.replace('/', '.')}{_SUFFIX}"

    def read(self, key: str) -> bytes:
        if not _is_chunk(key):
            return self._place.read(key)
        kept = self._kept(key)
        return self._keep(key, self._place.read(key)) if kept is None else kept

    def fetch(self, keys: Iterable[str]) -> list[Callable[[], bytes]]:
        keys = list(keys)
        here = {key for key in keys if _is_chunk(key) and self._file(key).exists()}
        away = [key for key in keys if key not in here]
        reads = dict(zip(away, self._place.fetch(away), strict=True))
        return [
            partial(self.read, key) if key in here else partial(self._fetched, key, reads[key])
            for key in keys
        ]

    def _fetched(self, key: str, read: Callable[[], bytes]) -> bytes:
        content = read()
        return self._keep(key, content) if _is_chunk(key) else content

    def _kept(self, key: str) -> bytes | None:
        file = self._file(key)
        try:
            content = file.read_bytes()
            if key not in self._used:
                os.utime(file)
        except FileNotFoundError:
            return None
        self._used.add(key)
        return content

    def _keep(self, key: str, content: bytes) -> bytes:
        if not self._make_room(len(content)):
            return content
        file = self._file(key)
        temporary = file.with_suffix(f".{uuid.uuid4().hex}.partial")
        try:
            temporary.write_bytes(content)
            temporary.replace(file)
        except OSError:  # the disk is full or the folder is gone: it is only a copy
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        else:
            self._used.add(key)
        return content

    def _make_room(self, size: int) -> bool:
        """Whether so many bytes more may be kept."""
        with self._lock:
            if self._until_look <= 0:
                self._size = self._clear(size)
                self._until_look = self._most // _LOOK_AGAIN
            if self._size + size > self._most:
                self._until_look -= size  # others may make room
                return False
            self._size += size
            self._until_look -= size
            return True

    def _clear(self, more: int) -> int:
        """Remove what was not used since this process began, until there is room; the bytes left.

        A little more is removed than is needed, so that it is not for every file.
        """
        found = []
        for file in self._root.rglob("*"):
            with suppress(FileNotFoundError):  # another process has removed it
                status = file.stat()
                if file.is_file():
                    found.append(_Kept(status.st_mtime, status.st_size, file))
        size = sum(kept.size for kept in found)
        spare = 2 * self._most // _LOOK_AGAIN
        for kept in sorted(found):
            if size + more + spare <= self._most or kept.used >= self._began - 1:
                break
            kept.file.unlink(missing_ok=True)
            size -= kept.size
        return size

    def forget(self, key: str) -> bool:
        kept = self._file(key).exists()
        self._file(key).unlink(missing_ok=True)
        return kept

    def exists(self) -> bool:
        return self._place.exists()

    def write(self, key: str, content: bytes, *, durable: bool = False) -> None:
        self._place.write(key, content, durable=durable)

    def commit(self, key: str, content: bytes) -> None:
        self._place.commit(key, content)

    def sync(self) -> None:
        self._place.sync()

    def make(self, files: Mapping[str, bytes]) -> None:
        self._place.make(files)

    def remove(self, key: str) -> None:
        self._place.remove(key)

    def remove_all(self) -> None:
        self._place.remove_all()

    def remove_leftovers(self, keys: Iterable[str] | None = None) -> None:
        self._place.remove_leftovers(keys)

    def names(self, folder: str) -> list[str]:
        return self._place.names(folder)

    def size(self, key: str) -> int:
        return self._place.size(key)

    def total_size(self, folder: str = "") -> int:
        return self._place.total_size(folder)

    def free_bytes(self) -> int | None:
        return self._place.free_bytes()

    def zarr_store(self) -> Store:
        return self._place.zarr_store()

    def lock(self, *, shared: bool) -> Locks | None:
        return self._place.lock(shared=shared)


def _is_chunk(key: str) -> bool:
    """Whether a file never changes once its chunk is committed, and is checked by another."""
    return "/c/" in key and not key.startswith(("committed/", "digest/"))
