"""A local folder that keeps what was read of a store."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from stores.cache import CachedPlace
from stores.errors import CorruptChunkError
from stores.local import LocalPlace
from stores.reader import StoreReader
from tests.command_helpers import refused, routesae
from tests.store_helpers import chunk_file, fill_store, store_spec


class Counting(LocalPlace):
    """A directory that counts the files that are read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.reads: list[str] = []

    def read(self, key: str) -> bytes:
        self.reads.append(key)
        return super().read(key)


@pytest.fixture
def place(tmp_path: Path) -> Counting:
    fill_store(tmp_path / "s.zarr", store_spec())
    return Counting(tmp_path / "s.zarr")


def read_all(place: CachedPlace) -> bytes:
    """Everything of the train split."""
    reader = StoreReader(place)
    found = b""
    for chunk in reader.chunks("train"):
        found += reader.rows(chunk).tokens_RT.tobytes()
        found += reader.residuals(chunk, reader.spec.layers).tobytes()
    return found


def kept(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in kept(folder))


def chunks(reads: list[str]) -> list[str]:
    """Those of the keys whose files the cache is for."""
    return [key for key in reads if "/c/" in key and not key.startswith(("digest", "committed"))]


def test_a_second_epoch_reads_no_chunk_again(place: Counting, tmp_path: Path) -> None:
    cached = CachedPlace(place, tmp_path / "cache", 1.0)
    first = read_all(cached)
    once = chunks(place.reads)
    assert len(once) == len(set(once)) == 2 * (3 + 9)
    assert read_all(cached) == first
    assert chunks(place.reads) == once
    again = pickle.loads(pickle.dumps(cached))  # as another process has it
    assert read_all(again) == first
    assert str(again) == str(place)
    assert again.free_bytes() == place.free_bytes()


def test_what_fits_is_kept_and_stays(place: Counting, tmp_path: Path) -> None:
    folder, everything = tmp_path / "cache", tmp_path / "everything"
    read_all(CachedPlace(place, everything, 1.0))
    most = size(everything) // 2
    cached = CachedPlace(place, folder, most / 1e9)
    first = read_all(cached)
    assert 0.8 * most < size(folder) <= most
    before = set(kept(folder))
    place.reads.clear()
    assert read_all(cached) == first
    assert set(kept(folder)) == before  # in a loop, what goes out would be what comes next
    assert len(chunks(place.reads)) == 24 - len(before)


def test_what_was_not_used_for_long_goes_first(place: Counting, tmp_path: Path) -> None:
    folder, everything = tmp_path / "cache", tmp_path / "everything"
    read_all(CachedPlace(place, everything, 1.0))
    most = size(everything) + 1500
    old = folder / "of-another-store"
    old.mkdir(parents=True)
    for i in range(10):
        (old / f"{i}.chunk").write_bytes(b"x" * 400)
        os.utime(old / f"{i}.chunk", (i + 1, i + 1))
    cached = CachedPlace(place, folder, most / 1e9)
    read_all(cached)
    assert size(folder) <= most
    left = {int(file.stem) for file in old.iterdir()}
    assert left == set(range(10 - len(left), 10))
    assert len(left) < 10
    assert len(kept(folder)) - len(left) == 24


def test_a_spoilt_copy_is_fetched_again(place: Counting, tmp_path: Path) -> None:
    cached = CachedPlace(place, tmp_path / "cache", 1.0)
    first = read_all(cached)
    for file in kept(tmp_path / "cache")[::2]:
        file.write_bytes(b"spoilt")
    assert read_all(cached) == first
    assert read_all(CachedPlace(place, tmp_path / "cache", 1.0)) == first


def test_a_store_that_was_made_anew(place: Counting, tmp_path: Path) -> None:
    cached = CachedPlace(place, tmp_path / "cache", 1.0)
    read_all(cached)
    place.remove_all()
    fill_store(place, store_spec(layers=(1, 2, 3)))
    assert read_all(cached) == read_all(CachedPlace(place, tmp_path / "other", 1.0))


def test_a_chunk_that_is_bad_in_the_store_is_an_error(place: Counting, tmp_path: Path) -> None:
    chunk_file(place, "residuals/2/low", 1).write_bytes(b"spoilt")
    cached = CachedPlace(place, tmp_path / "cache", 1.0)
    for _ in range(2):
        with pytest.raises(CorruptChunkError, match="chunk 1 of array residuals/2/low"):
            read_all(cached)


def test_without_its_folder_it_reads_all_the_same(place: Counting, tmp_path: Path) -> None:
    cached = CachedPlace(place, tmp_path / "cache", 1.0)
    first = read_all(cached)
    for file in kept(tmp_path / "cache"):
        file.unlink()
    next((tmp_path / "cache").iterdir()).rmdir()
    assert read_all(cached) == first


def test_options_that_mean_nothing(place: Counting, tmp_path: Path) -> None:
    def train(*options: object) -> object:
        return routesae("train", place, "--sae", "topk:k=4", "--out", tmp_path / "runs", *options)

    (tmp_path / "file").touch()
    refused(train("--cache-gb", 3), "--cache-gb belongs to --cache-dir")
    refused(train("--cache-dir", tmp_path / "c", "--cache-gb", 0), "expected more than 0")
    refused(train("--cache-dir", tmp_path / "c", "--cache-gb", "nan"), "expected more than 0")
    refused(train("--cache-dir", tmp_path / "file"), "expected a folder")
    assert not (tmp_path / "c").exists()
