"""A store in another place: the same bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from stores.places import Where
from stores.reader import StoreReader
from stores.writer import StoreWriter


@dataclass(frozen=True, kw_only=True)
class Copied:
    """What a call of `copy_store` did."""

    chunks: int
    """Committed chunks that the copy has now."""
    copied: int
    """Of them, those that this call has copied."""
    bytes: int
    """Of the chunks that this call has copied."""
    left: int
    """Chunks that the source itself does not have yet."""


def copy_store(
    source: Where,
    target: Where,
    *,
    on_chunk: Callable[[int, int], None] = lambda done, total: None,
) -> Copied:
    """Write the committed chunks of `source` to `target`, byte for byte.

    Goes on where an interrupted call stopped, and extends a copy of what has grown. Each chunk is
    checked as it is read, read back from the target and compared, and then committed there.
    `on_chunk(done, total)` is called after each chunk. Raises CorruptChunkError for what is bad in
    the source, SpecMismatchError where the target is another store, and StoreError where it does
    not give back what was written.
    """
    reader = StoreReader(source)
    spec = reader.spec
    empty = dataclasses.replace(spec, eval_rows=0, train_rows=0, eval_tokens=0, train_tokens=0)
    committed = set(reader.committed)
    with StoreWriter.create_or_open(target, empty) as out:
        if out.spec.rows < spec.rows:
            checked = (reader.rows(chunk, check=chunk in committed) for chunk in range(spec.chunks))
            for chunk, rows in enumerate(checked):
                out.write_rows(chunk, rows)
            out.commit_rows(spec)
        todo = sorted(committed.intersection(out.pending()))
        done, copied = len(committed) - len(todo), 0
        for chunk in todo:
            copied += out.write_files(chunk, reader.files(chunk))
            done += 1
            on_chunk(done, len(committed))
    return Copied(
        chunks=done, copied=len(todo), bytes=copied, left=spec.chunks - len(reader.committed)
    )
