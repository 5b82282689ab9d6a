"""What files and folders of a local file system are asked for, beside their content."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Force a file's content, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def existing(path: Path) -> Path:
    """The path, or the innermost of the folders above it that is there."""
    found = path.absolute()
    while not found.exists():
        found = found.parent
    return found
