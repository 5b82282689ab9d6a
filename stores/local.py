"""A store in a directory of a local or network file system."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from zarr.storage import LocalStore

from stores.disk import existing, sync
from stores.errors import StoreError
from stores.locks import FileLocks
from stores.place import Place

_SYNCS = 8  # at once; the file system does them together


class LocalPlace(Place):
    """A directory. Files appear by a rename; `sync` forces them, and their names, to the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._unsynced: set[Path] = set()

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    def __fspath__(self) -> str:
        return str(self.path)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LocalPlace) and self.path.resolve() == other.path.resolve()

    def __hash__(self) -> int:
        return hash(self.path.resolve())

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalPlace, (self.path,)

    def exists(self) -> bool:
        return self.path.exists()

    def read(self, key: str) -> bytes:
        return (self.path / key).read_bytes()

    def write(self, key: str, content: bytes, *, durable: bool = False) -> None:
        file = self.path / key
        _make_folder(file.parent)
        temporary = file.with_suffix(f".{uuid.uuid4().hex}.partial")
        try:
            _write(temporary, content)
            if durable:
                sync(temporary)
            _rename(temporary, file)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if durable:
            for folder in self._folders([file]):
                sync(folder)
        else:
            self._unsynced.add(file)

    def commit(self, key: str, content: bytes) -> None:
        self.write(key, content, durable=True)  # the lock is what keeps others from it

    def sync(self) -> None:
        files, self._unsynced = self._unsynced, set()
        _sync_all(files)
        _sync_all(self._folders(files))

    def _folders(self, files: Iterable[Path]) -> list[Path]:
        """Folders whose entries lead to the files, the innermost first."""
        root = self.path
        above = {folder for file in files for folder in file.parents if folder.is_relative_to(root)}
        return sorted(above, key=lambda folder: -len(folder.parts))

    def make(self, files: Mapping[str, bytes]) -> None:
        path = self.path
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = self._beside()
        try:
            staged = LocalPlace(staging)
            for key, content in files.items():
                staged.write(key, content)
            staged.sync()
            staging.chmod(0o777 & ~_umask())
            try:
                _move(staging, path)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    raise
                raise StoreError(
                    f"{path} exists already and is not a store to go on with"
                ) from None
            sync(path.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _beside(self) -> Path:
        """A hidden, empty folder beside the store."""
        return Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", dir=self.path.parent))

    def remove(self, key: str) -> None:
        (self.path / key).unlink(missing_ok=True)

    def remove_all(self) -> None:
        aside = self._beside()  # at its place, a part of it would be a store that is damaged
        _move(self.path, aside)
        shutil.rmtree(aside)

    def remove_leftovers(self, keys: Iterable[str] | None = None) -> None:
        if keys is None:
            found = list(self.path.rglob("*.partial"))
        else:
            files = [self.path / key for key in keys]
            found = [old for file in files for old in file.parent.glob(f"{file.name}.*.partial")]
        for file in found:
            file.unlink(missing_ok=True)

    def names(self, folder: str) -> list[str]:
        inside = self.path / folder
        return [entry.name for entry in inside.iterdir()] if inside.is_dir() else []

    def size(self, key: str) -> int:
        return (self.path / key).stat().st_size

    def total_size(self, folder: str = "") -> int:
        total = 0
        for inside, _, names in os.walk(self.path / folder):
            for name in names:
                with suppress(FileNotFoundError):  # a writer has renamed or removed it since
                    total += Path(inside, name).stat().st_size
        return total

    def free_bytes(self) -> int:
        folder = existing(self.path)
        if not folder.is_dir():
            raise StoreError(f"{self} cannot be made: {folder} is not a directory")
        if not os.access(folder, os.W_OK):
            raise StoreError(f"{self} cannot be made: {folder} cannot be written to")
        free: int = shutil.disk_usage(folder).free
        return free

    def zarr_store(self) -> LocalStore:
        return LocalStore(self.path, read_only=True)

    def lock(self, *, shared: bool) -> FileLocks | None:
        return FileLocks.take(self.path, shared=shared)


def _sync_all(paths: Iterable[Path]) -> None:
    with ThreadPoolExecutor(_SYNCS, thread_name_prefix="sync") as pool:
        for _ in pool.map(sync, paths):
            pass


def _write(file: Path, content: bytes) -> None:
    file.write_bytes(content)


def _rename(source: Path, target: Path) -> None:
    source.replace(target)


def _move(source: Path, target: Path) -> None:
    """Rename a folder to where nothing is, or an empty one."""
    source.rename(target)


def _make_folder(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
