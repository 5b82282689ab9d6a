"""Directories that appear whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from routesae_cache.whole_files import named_full_disk


def check_free(out: Path) -> None:
    """ValueError where something is at `out` already, an empty directory apart."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} is there already; choose another --out or remove it")


@contextmanager
def whole_directory(out: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `out` at the end; nothing is left where filling fails."""
    check_free(out)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of one that was killed
    partial.mkdir(parents=True)
    try:
        with named_full_disk(out, lambda: None):
            yield partial
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
