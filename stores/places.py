"""From what a user writes, a path or a URL, to the place it means."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stores.local import LocalPlace
from stores.objects import ObjectPlace, is_url
from stores.place import Place

Where = Place | Path | str
"""A path, a URL, or the place that one means."""


def as_place(where: Where) -> Place:
    """The place that a path or a URL means; a place is itself. ValueError for another URL."""
    if isinstance(where, Place):
        return where
    if isinstance(where, str) and is_url(where):
        return ObjectPlace(where)
    return LocalPlace(Path(where).expanduser())


def find_place(where: str, folders: Sequence[Path]) -> Place | None:
    """The place that a record names, if it is there; a relative path is looked for in folders."""
    if is_url(where):
        place = as_place(where)
        return place if place.exists() else None
    found = (folder / Path(where).expanduser() for folder in folders)
    return next((LocalPlace(path) for path in found if path.exists()), None)
