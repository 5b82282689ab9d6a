"""How much of the train split a pass reads: all of it, or what a harvest has committed so far."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from routesae_cache.checkpoint import CONFIG, RunError, read_config
from stores.errors import IncompleteStoreError, StoreError
from stores.reader import StoreReader
from stores.spec import StoreSpec

logger = logging.getLogger(__name__)


class Extent(NamedTuple):
    """The first chunks of the train split, or all of it."""

    chunks: int
    tokens: int
    """BOS included; an estimate where rows are padded."""


def extent(spec: StoreSpec, chunks: int) -> Extent:
    """How much so many chunks are."""
    rows = min(chunks * spec.chunk_rows, spec.train_rows)
    return Extent(chunks, round(spec.train_tokens * rows / spec.train_rows))


def chunks_to_read(
    reader: StoreReader, folders: Sequence[Path], *, asked: int | None, so_far: bool
) -> int:
    """Chunks of the train split that a pass reads, from the first on; all of them are committed.

    Args:
        folders: of the runs to be gone on with; those that are there read what they began with.
        asked: so many, whatever the runs say.
        so_far: those that are there suffice where neither says how many.

    Raises:
        IncompleteStoreError: where chunks are missing.
        RunError: where runs were begun with different numbers, or on a larger store.
    """
    wanted, found = reader.spec.split_chunks("train"), len(reader.prefix("train"))
    begun = _begun(folders) if asked is None else asked
    chunks = begun or (found if so_far else 0) or len(wanted)
    if chunks > len(wanted):
        raise RunError(
            f"{reader.path}: expected a store with {chunks} chunks in its train split, as the runs "
            f"were begun with, found {len(wanted)}; is it the store that they were begun on?"
        )
    if found < chunks or not chunks:
        missing = len(set(wanted[:chunks]) - set(reader.committed))
        advice = ""
        if not begun:
            advice = "; --so-far needs at least the first of them"
            if found:
                advice = f"; or train on the first {found} alone with --so-far"
        raise IncompleteStoreError(reader.path, missing, chunks, "train", advice)
    if asked is None and begun and begun < len(wanted):
        logger.info(
            "the runs in %s were begun with the first %d of %d chunks of the train split and keep "
            "to them; --replace would train them anew",
            folders[0].parent,
            begun,
            len(wanted),
        )
    return chunks


def _begun(folders: Sequence[Path]) -> int | None:
    there = {f.name: read_config(f).chunks for f in folders if (f / CONFIG).exists()}
    if len(set(there.values())) > 1:
        lines = (f"{name}: {chunks} chunks" for name, chunks in there.items())
        raise RunError(
            f"the runs in {folders[0].parent} were begun with different parts of the train split, "
            "so they cannot share a pass; go on with those of equal parts by themselves, or "
            "--replace trains the others anew:\n  " + "\n  ".join(lines)
        )
    return next(iter(there.values()), None)


def reader_with(reader: StoreReader, chunks: int) -> StoreReader:
    """A reader that sees so many chunks as another process did, which may have looked later.

    Raises:
        StoreError: where they are not to be seen from here.
    """
    if len(reader.prefix("train")) < chunks:
        reader = StoreReader(reader.path)
    if (found := len(reader.prefix("train"))) < chunks:
        raise StoreError(
            f"{reader.path}: another process found the first {chunks} chunks of the train split, "
            f"this one {found}; all have to see the same store"
        )
    return reader
