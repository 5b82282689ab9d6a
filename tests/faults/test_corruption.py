"""Every file of a tiny store damaged in every place: an error with a name, or the same values."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from routesae_cache.batches import BatchSource
from stores.codecs import Bf16Codec, DeltaCodec, Int8Codec
from stores.errors import StoreError
from stores.layout import stored_arrays
from stores.reader import StoreReader
from tests.faults.damage import Damage, compact, cuts, done, flips, no_hang, swapped
from tests.faults.tally import Tally
from tests.store_helpers import chunk_file, fill_store, store_spec

CODECS = {codec.kind: codec for codec in (Bf16Codec(), Int8Codec(), DeltaCodec())}
SECONDS = 300


@pytest.fixture(scope="module", params=CODECS)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two chunks of a row each, eval and train, two layers of width 2: some bytes a file."""
    path = tmp_path_factory.mktemp("store") / f"{request.param}.zarr"
    sizes = {"layers": (1, 2), "width": 2, "context": 2, "batch_rows": 1, "chunk_rows": 1}
    fill_store(path, store_spec(codec=CODECS[request.param], eval_rows=1, train_rows=1, **sizes))
    compact(path)
    return path


def everything(reader: StoreReader) -> list[Any]:
    """All that a reader gives; StoreError where it gives less than everything."""
    values: list[Any] = [reader.spec.to_dict()]
    for chunk in reader.chunks("all"):
        values += [*reader.rows(chunk), *vars(reader.stats(chunk)).values()]
        values.append(reader.residuals(chunk, reader.spec.layers))
    return values


def same(found: Iterable[Any], expected: Iterable[Any]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def verified(reader: StoreReader) -> None:
    """StoreError for what `routesae store verify` finds, a missing chunk among it."""
    for _, fault in reader.verify():
        if fault is not None:
            raise fault
    reader.chunks("all")


def check(
    opened: Callable[[], StoreReader],
    damages: Iterable[tuple[Damage, ...]],
    kind: str,
    tally: Tally,
) -> None:
    """Each damage is found by reading and by verifying, or changes nothing that is read."""
    expected = everything(opened())
    tried = harmless = 0
    wrong: list[str] = []
    with no_hang(SECONDS):
        for several in damages:
            tried += 1
            with done(*several):
                try:
                    reader = opened()
                except StoreError:  # so verifying says it, too
                    continue
                try:
                    if same(everything(reader), expected):
                        harmless += 1
                    else:
                        wrong.append(f"{several[0].what}: other values are read")
                    continue
                except StoreError:
                    pass
                try:
                    verified(reader)
                    wrong.append(f"{several[0].what}: verify finds nothing")
                except StoreError:
                    pass
    assert not wrong, "\n".join(wrong)
    assert tried > harmless
    assert same(everything(opened()), expected)
    tally.add(kind, tried=tried, survived=tried)


def chunk_files(path: Path) -> list[Path]:
    """Of one chunk; of the delta store all, of the others those that differ from its."""
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    every = [file for file in files if file.suffix != ".json" and file.parts[-2:] != ("c", "0")]
    every = [file for file in every if "/c/0/" not in file.as_posix()]
    return every if path.stem == "delta" else [f for f in every if "residuals" in f.parts]


def metadata_files(path: Path) -> list[Path]:
    """Of one layer, otherwise as `chunk_files`."""
    every = [file for file in sorted(path.rglob("zarr.json")) if "2" not in file.parts]
    named = {"codes", path.name}
    return every if path.stem == "delta" else [f for f in every if f.parent.name in named]


def single(damages: Iterable[Damage]) -> Iterator[tuple[Damage, ...]]:
    return ((damage,) for damage in damages)


def test_every_byte_of_the_chunks_flipped(store: Path, tally: Tally) -> None:
    damages = itertools.chain.from_iterable(map(flips, chunk_files(store)))
    reader = StoreReader(store)  # it keeps no file open
    check(lambda: reader, single(damages), "store: a byte of a chunk's file flipped", tally)


def test_bytes_of_the_metadata_flipped(store: Path, tally: Tally) -> None:
    damages = itertools.chain.from_iterable(
        flips(file, every=1 if file.parent == store else 4) for file in metadata_files(store)
    )
    check(lambda: StoreReader(store), single(damages), "store: a byte of zarr.json flipped", tally)


def test_every_chunk_file_cut_or_removed(store: Path, tally: Tally) -> None:
    damages = itertools.chain.from_iterable(cuts(file, every=3) for file in chunk_files(store))
    check(lambda: StoreReader(store), single(damages), "store: a file cut or removed", tally)


def test_every_metadata_file_cut_or_removed(store: Path, tally: Tally) -> None:
    damages = itertools.chain.from_iterable(cuts(file, every=29) for file in metadata_files(store))
    check(lambda: StoreReader(store), single(damages), "store: a file cut or removed", tally)


def test_files_swapped(store: Path, tally: Tally) -> None:
    """Those of two chunks of an array, of two arrays or layers in a chunk, and metadata."""
    names = [stored.name for stored in stored_arrays(StoreReader(store).spec)]
    pairs = [tuple(chunk_file(store, name, chunk) for chunk in (0, 1)) for name in names]
    residuals = [name for name in names if name.startswith("residuals")]
    pairs += itertools.combinations([chunk_file(store, name, 1) for name in residuals], 2)
    pairs += itertools.pairwise([chunk_file(store, name, 1) for name in names])
    pairs += itertools.pairwise(metadata_files(store))
    check(
        lambda: StoreReader(store),
        (swapped(*pair) for pair in pairs),
        "store: two files swapped",
        tally,
    )


def read_batches(path: Path) -> None:
    reader = StoreReader(path)
    source = BatchSource.in_order(reader, reader.spec.layers, split="all", batch_tokens=4)
    with source.batches() as batches:
        list(batches)


def test_batches_name_what_is_damaged(store: Path, tally: Tally) -> None:
    """They read in a thread of their own."""
    tried = 0
    for file in chunk_files(store):
        name = file.relative_to(store).as_posix()
        if name.startswith(("stats", "documents", "committed")):  # which they do not read
            continue
        for damage in (*itertools.islice(flips(file), 0, None, 7), Damage(file, None, "removed")):
            with no_hang(60), done(damage), pytest.raises(StoreError):
                read_batches(store)
            tried += 1
    tally.add("store: damage that batches meet", tried=tried, survived=tried)
