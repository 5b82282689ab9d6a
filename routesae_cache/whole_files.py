"""Files that appear whole, and what is said of a disk that has no room for them."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from stores.disk import existing, sync
from stores.places import Where

PARTIAL = ".partial"
_FULL = (errno.ENOSPC, errno.EDQUOT)


class FullDiskError(OSError):
    """No space is left; says on which file system, and how much is needed."""


@contextmanager
def whole_file(path: Path, size: int | None = None) -> Iterator[Path]:
    """Where to write what is at `path` once the block has ended well, and nowhere otherwise.

    It survives a power cut from then on. `size` is that of the content where it is known.
    FullDiskError then says it.
    """
    temporary = partial_of(path)
    try:
        with named_full_disk(path, lambda: size):
            yield temporary
            rename_durably(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def partial_of(path: Path) -> Path:
    """Where to write a file before it is renamed to `path`; what is there is removed.

    It may be a link that somebody laid, and writing would follow it out of the folder.
    """
    partial = path.with_name(path.name + PARTIAL)
    partial.unlink(missing_ok=True)
    return partial


def rename_durably(source: Path, target: Path) -> None:
    """Rename a file that was just written, its content on the disk before and its name after."""
    sync(source)
    source.replace(target)
    sync(target.parent)


@contextmanager
def named_full_disk(target: Where, needed: Callable[[], float | None]) -> Iterator[None]:
    """Turn the error of a full disk, which may name nothing at all, into a FullDiskError.

    `needed` estimates the bytes that are still to be written to `target`, None where nobody knows;
    an error inside that knows better stays as it is.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL or isinstance(error, FullDiskError):
            raise
        mount = _mount_point(Path(str(target)))
        usage = shutil.disk_usage(mount)
        n_bytes = needed()
        more = "more" if n_bytes is None else f"about {_megabytes(n_bytes)}"
        raise FullDiskError(
            errno.ENOSPC,
            f"{target}: the disk is full; of the {_megabytes(usage.total)} of the file system at "
            f"{mount} {_megabytes(usage.free)} are free, {more} are needed",
        ) from error


def _mount_point(path: Path) -> Path:
    found = existing(path)
    while not found.is_mount():
        found = found.parent
    return found


def _megabytes(n_bytes: float) -> str:
    return f"{n_bytes / 1e6:,.1f} MB" if n_bytes > 1e5 else f"{n_bytes / 1e3:,.1f} kB"
