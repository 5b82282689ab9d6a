"""Results that one process at a time may make: locks in a hidden folder beside them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from stores.locks import FOLDER, FileLock


class InUseError(ValueError):
    """Another process is making the same result."""


@contextmanager
def sole_use(folder: Path, names: Iterable[str]) -> Iterator[None]:
    """Have some results in a folder to oneself; the folder is made.

    The locks are the operating system's: they end with the process, however that ends.
    Raises InUseError while another process has one of them, ValueError for a read-only folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{folder} cannot be written to; choose another place")
    try:
        with ExitStack() as held:
            for name in names:
                lock = FileLock.take(folder / FOLDER / name)
                if lock is None:
                    raise InUseError(
                        f"{folder / name}: another process is making it; wait for that to end, "
                        "stop it, or choose another place"
                    )
                held.callback(lock.release, remove=True)
            yield
    finally:
        with suppress(OSError):  # somebody else has a lock there
            (folder / FOLDER).rmdir()
