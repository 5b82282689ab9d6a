"""Where a store is: what writing and reading one ask of a directory or of an object store.

A key is the name of a file inside the store, such as `residuals/12/low/c/7/0/0`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from zarr.abc.store import Store


class Locks(Protocol):
    """What one writer holds of a store: all of it alone, or a share and some of its chunks."""

    def take_chunk(self, chunk: int) -> bool:
        """Take a chunk; False while another process has it."""

    def leave_chunk(self, chunk: int) -> None:
        """Give a chunk back."""

    def check(self) -> None:
        """StoreLockedError where what was taken is no longer held."""

    def close(self) -> None:
        """Give everything back."""


class Place(ABC):
    """A place for one store; `str` of it is what the user called it. It can be pickled."""

    parallel: int = 1
    """Files that are worth reading at once."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The last part of what it is called."""

    @abstractmethod
    def exists(self) -> bool:
        """Whether anything is here."""

    @abstractmethod
    def read(self, key: str) -> bytes:
        """A file's content; FileNotFoundError, NotADirectoryError, IsADirectoryError."""

    def fetch(self, keys: Iterable[str]) -> list[Callable[[], bytes]]:
        """What gives the content of each file, or raises what `read` does, when it is called.

        Where that is worth it, all are read ahead at once.
        """
        return [lambda key=key: self.read(key) for key in keys]  # type: ignore[misc]

    @abstractmethod
    def write(self, key: str, content: bytes, *, durable: bool = False) -> None:
        """Write a file, which appears whole or not at all.

        It is safe from a power cut once `sync` was called, or on return if `durable`: then a file
        that is replaced is the old one or the new one, whatever happens.
        """

    @abstractmethod
    def commit(self, key: str, content: bytes) -> None:
        """Write a file durably, unless it is there already."""

    @abstractmethod
    def sync(self) -> None:
        """Make everything that was written here safe from a power cut."""

    @abstractmethod
    def make(self, files: Mapping[str, bytes]) -> None:
        """Make a store of these files, `zarr.json` among them, that appears whole, durably.

        StoreError where something is here already.
        """

    @abstractmethod
    def remove(self, key: str) -> None:
        """Remove a file, if it is there."""

    @abstractmethod
    def remove_all(self) -> None:
        """Remove the store."""

    @abstractmethod
    def remove_leftovers(self, keys: Iterable[str] | None = None) -> None:
        """Remove what writers left that were killed in `write`: of these files, or of all."""

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """Names of the files directly in a folder, in no order; none where it is not there."""

    @abstractmethod
    def size(self, key: str) -> int:
        """Bytes of a file; FileNotFoundError."""

    @abstractmethod
    def total_size(self, folder: str = "") -> int:
        """Bytes of all files in a folder, and in those inside it, together."""

    @abstractmethod
    def free_bytes(self) -> int | None:
        """Room for a store here, None where there is no limit; ValueError where none can be."""

    @abstractmethod
    def zarr_store(self) -> Store:
        """The same files, for zarr to read."""

    @abstractmethod
    def lock(self, *, shared: bool) -> Locks | None:
        """The lock on the store: one writer alone, or any number that share it to fill chunks.

        None while another writer lives that this one cannot share with.
        """

    def forget(self, key: str) -> bool:
        """Drop the local copy of a file; whether there was one."""
        return False
