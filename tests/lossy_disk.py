"""A disk that loses what was not forced onto it when the power is cut, and harvests onto it.

The disk is a journal of what `stores.local` does to files and folders. After a cut at any point,
what was synced is there; of the rest, each name and each content is there or not, by chance.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from stores import local
from stores.errors import NotAStoreError
from stores.reader import StoreReader
from tests.store_helpers import fill_store, grown, store_spec


class PowerCut(Exception):
    """The machine is off from here on."""


class _Node:
    """A file or a folder, as programs see it and as it is on the disk."""

    def __init__(self, *, folder: bool) -> None:
        self.entries: dict[str, _Node] | None = {} if folder else None
        self.synced_entries: dict[str, _Node] = {}
        self.content = b""
        self.synced_content: bytes | None = None

    def sync(self) -> None:
        self.synced_content = self.content
        self.synced_entries = dict(self.entries or {})


class LossyDisk:
    """Goes along with what is done below a folder; the power is cut before step number `cut`."""

    def __init__(self, root: Path, cut: int | None = None) -> None:
        self._root, self._cut, self.steps = root, cut, 0
        self._tree = _Node(folder=True)

    def _step(self) -> None:
        if self.steps == self._cut:
            raise PowerCut
        self.steps += 1

    def _node(self, path: Path) -> _Node:
        node = self._tree
        for part in path.relative_to(self._root).parts:
            assert node.entries is not None
            node = node.entries[part]
        return node

    def _folder(self, path: Path) -> dict[str, _Node]:
        entries = self._node(path).entries
        assert entries is not None
        return entries

    def write(self, path: Path, content: bytes) -> None:
        self._step()
        path.write_bytes(content)
        node = self._folder(path.parent)[path.name] = _Node(folder=False)
        node.content = content

    def sync(self, path: Path) -> None:
        self._step()
        self._node(path).sync()

    def rename(self, source: Path, target: Path) -> None:
        self._step()
        source.rename(target)
        self._folder(target.parent)[target.name] = self._folder(source.parent).pop(source.name)

    def make_folder(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        node = self._tree
        for part in path.relative_to(self._root).parts:
            assert node.entries is not None
            node = node.entries.setdefault(part, _Node(folder=True))

    def restart(self, target: Path, rng: random.Random) -> None:
        """Write what is on the disk after the cut to a folder."""
        self._restore(self._tree, target, rng)

    def _restore(self, node: _Node, path: Path, rng: random.Random) -> None:
        if node.entries is None:
            content = node.content[: rng.choice([0, len(node.content) // 2, len(node.content)])]
            path.write_bytes(content if node.synced_content is None else node.synced_content)
            return
        path.mkdir()
        for name in sorted(node.entries.keys() | node.synced_entries.keys()):
            found = rng.choice([node.entries, node.synced_entries]).get(name)
            if found is not None:
                self._restore(found, path / name, rng)


@contextmanager
def on(disk: LossyDisk, **instead: Callable[..., Any]) -> Iterator[None]:
    """Have `stores.local` write to a disk; `instead` replaces some of what the disk does."""
    does: dict[str, Callable[..., Any]] = {
        "_write": disk.write,
        "sync": disk.sync,
        "_rename": disk.rename,
        "_move": disk.rename,
        "_make_folder": disk.make_folder,
    } | instead
    with mock.patch.multiple(local, **does):
        yield


def history(path: Path) -> None:
    """A harvest, interrupted, gone on with and extended."""
    spec = store_spec()
    fill_store(path, grown(spec, 3), chunks=(0,))
    fill_store(path, grown(spec, 3))
    fill_store(path, spec)


def check_after(disk: LossyDisk, folder: Path, seed: int) -> None:
    """What is committed on the disk after the cut is right; then go on with the harvest."""
    disk.restart(folder, random.Random(seed))
    path = folder / "s.zarr"
    try:
        reader = StoreReader(path)
    except NotAStoreError:
        assert not path.exists()  # a store that is there is whole
    else:
        assert [fault for _, fault in reader.verify() if fault is not None] == []
    fill_store(path, store_spec())


def steps(folder: Path) -> int:
    """Of an uninterrupted harvest."""
    disk = LossyDisk(folder)
    with on(disk):
        history(folder / "s.zarr")
    return disk.steps


def cut_at(cut: int, folder: Path) -> LossyDisk:
    """The disk after a harvest was cut."""
    folder.mkdir()
    disk = LossyDisk(folder, cut)
    with on(disk), pytest.raises(PowerCut):
        history(folder / "s.zarr")
    return disk
