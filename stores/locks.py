"""Locks on a store and on its chunks: files that are there only while somebody holds them."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from typing import Self

FOLDER = ".locks"
_STORE = "store"


class FileLock:
    """A `flock` on a file made for it; the operating system ends it with the process.

    A file of its own, opened for writing, because on network file systems a lock on a directory
    is seen on one machine alone.
    """

    def __init__(self, file: Path, handle: int) -> None:
        self._file, self._handle = file, handle

    @classmethod
    def take(cls, file: Path, *, shared: bool = False) -> Self | None:
        """The lock, or None while somebody else has it (for `shared`: has it alone)."""
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        while True:
            file.parent.mkdir(exist_ok=True)
            try:
                handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:
                continue  # the last one to leave removed the folder just now
            try:
                fcntl.flock(handle, kind | fcntl.LOCK_NB)
                if _is_at(file, handle):
                    return cls(file, handle)
            except BlockingIOError:
                os.close(handle)
                return None
            except OSError as error:  # says which file it was
                os.close(handle)
                raise OSError(error.errno, error.strerror, str(file)) from error
            os.close(handle)  # its holder removed the file between our opening and locking it

    def alone(self) -> bool:
        """Whether nobody shares the lock, which is exclusive from here on; if False it is lost."""
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return _is_at(self._file, self._handle)

    def release(self, *, remove: bool) -> None:
        """Give the lock back; `remove` the file only while holding the lock exclusively."""
        if remove:
            self._file.unlink(missing_ok=True)
        os.close(self._handle)


class FileLocks:
    """What one process holds of the store in a directory."""

    def __init__(self, store: Path, lock: FileLock) -> None:
        self._store, self._lock = store, lock
        self._chunks: dict[int, FileLock] = {}

    @classmethod
    def take(cls, store: Path, *, shared: bool) -> Self | None:
        """The store's lock, or None while somebody has it that it cannot be shared with."""
        lock = take_store(store, shared=shared)
        return None if lock is None else cls(store, lock)

    def take_chunk(self, chunk: int) -> bool:
        """Take a chunk; False while another process has it."""
        lock = take_chunk(self._store, chunk)
        if lock is not None:
            self._chunks[chunk] = lock
        return lock is not None

    def leave_chunk(self, chunk: int) -> None:
        """Give a chunk back."""
        self._chunks.pop(chunk).release(remove=True)

    def check(self) -> None:
        """The operating system keeps these locks as long as the process lives."""

    def close(self) -> None:
        """Give everything back."""
        for chunk in list(self._chunks):
            self.leave_chunk(chunk)
        leave_store(self._store, self._lock)


def take_store(store: Path, *, shared: bool) -> FileLock | None:
    """The lock on a store: one process alone, or any number that share it to fill chunks."""
    return FileLock.take(store / FOLDER / _STORE, shared=shared)


def take_chunk(store: Path, chunk: int) -> FileLock | None:
    """The exclusive lock on a chunk, for a process that shares the store's lock."""
    return FileLock.take(store / FOLDER / str(chunk))


def leave_store(store: Path, lock: FileLock) -> None:
    """Give the store's lock back; the last one to leave removes what the dead left of theirs."""
    last = lock.alone()
    if last:
        for file in (store / FOLDER).iterdir():
            if file.name != _STORE:
                file.unlink(missing_ok=True)
    lock.release(remove=last)
    if last:
        with suppress(OSError):  # somebody came
            (store / FOLDER).rmdir()


def _is_at(file: Path, handle: int) -> bool:
    try:
        return os.path.samestat(file.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False
