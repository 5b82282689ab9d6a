"""Batches: every counted token once an epoch, decoded and normalised, in a reproducible order."""

from __future__ import annotations

import threading
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from routesae_cache import batch_parts, devices
from routesae_cache import batches as batches_module
from routesae_cache.batch_parts import Decoder
from routesae_cache.batches import BatchConfig, BatchSource, first_tokens
from routesae_cache.devices import batch_threads
from routesae_cache.losses import normalise_token
from stores.errors import CorruptChunkError, IncompleteStoreError
from stores.reader import StoreReader
from tests.pipeline_helpers import all_tokens, config, run
from tests.store_helpers import chunk_file


@pytest.fixture(scope="module")
def reader(tiny_model_dir: Path, tiny_corpus: Path, tmp_path_factory: Any) -> StoreReader:
    return run(config(tiny_model_dir, tiny_corpus, tmp_path_factory.mktemp("b") / "s.zarr"))


@pytest.fixture(params=[1 << 30, 128], ids=["one group", "many groups"], autouse=True)
def group_tokens(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All chunks shuffled together, or one or two at a time."""
    monkeypatch.setattr(batches_module, "_GROUP_TOKENS", request.param)


def collect(reader: StoreReader, start: int = 0, **options: Any) -> list[Any]:
    given = {"layers": (1, 2, 3), "batch_tokens": 32} | options
    with BatchSource(reader, BatchConfig(**given)).batches(start) as batches:
        return [tuple(part.clone() for part in batch) for batch in batches]


@pytest.mark.parametrize("layers", [(1, 2, 3), (2,), (1, 3)])
@pytest.mark.parametrize("norm", ["token", "none"])
def test_every_counted_token_once(reader: StoreReader, layers: Any, norm: str) -> None:
    expected = all_tokens(reader, layers, "train")
    seen = set()
    for x_NLD, row_N, position_N in collect(reader, layers=layers, norm=norm, drop_last=False):
        for x_LD, row, position in zip(x_NLD, row_N.tolist(), position_N.tolist(), strict=True):
            raw_LD = torch.from_numpy(expected[row, position])
            want_LD = normalise_token(raw_LD).x if norm == "token" else raw_LD
            torch.testing.assert_close(x_LD, want_LD, rtol=2e-5, atol=2e-6)
            seen.add((row, position))
    assert seen == set(expected)
    assert all(position > 0 for _, position in seen)


def test_length_and_last_batch(reader: StoreReader) -> None:
    for drop_last in (True, False):
        options = BatchConfig(layers=(1,), batch_tokens=32, epochs=2, drop_last=drop_last)
        source = BatchSource(reader, options)
        assert source.tokens == 2 * 20 * 15
        assert len(source) == (18 if drop_last else 19)
        assert len(collect(reader, layers=(1,), epochs=2, drop_last=drop_last)) == len(source)


def test_same_seed_same_order_and_another_each_epoch(reader: StoreReader) -> None:
    first, second = (collect(reader, epochs=2, batch_tokens=20) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    rows = torch.cat([batch[1] for batch in first])
    assert not torch.equal(rows[:300], rows[300:])
    other = collect(reader, batch_tokens=20, seed=7)
    assert not torch.equal(torch.cat([batch[1] for batch in other]), rows[:300])


@pytest.mark.parametrize("start", [1, 5, 9, 17])
def test_start_in_the_middle(reader: StoreReader, start: int) -> None:
    whole = collect(reader, epochs=2)
    for a, b in zip(whole[start:], collect(reader, start, epochs=2), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def keys(batches: list[Any]) -> list[tuple[int, int]]:
    """Row and position of every token."""
    pairs = (zip(row_N.tolist(), pos_N.tolist(), strict=True) for _, row_N, pos_N in batches)
    return [pair for batch in pairs for pair in batch]


@pytest.mark.parametrize(("streams", "epochs"), [(2, 1), (3, 1), (3, 3), (5, 2)])
def test_streams_share_out_the_chunks(reader: StoreReader, streams: int, epochs: int) -> None:
    """Five chunks of 60 tokens: streams differ by one chunk at most, over all epochs."""
    options = {"epochs": epochs, "streams": streams, "batch_tokens": 20}
    dealt = [collect(reader, own=(stream,), **options) for stream in range(streams)]
    tokens = [len(batches) * 20 for batches in dealt]
    assert sum(tokens) == 300 * epochs
    assert max(tokens) - min(tokens) <= 60
    seen = [key for batches in dealt for key in keys(batches)]
    assert sorted(seen) == sorted(keys(collect(reader, batch_tokens=20)) * epochs)
    source = BatchSource(reader, BatchConfig(layers=(1,), own=(0,), **options))
    assert source.tokens == min(tokens) * streams
    assert len(source) == min(tokens) // 20


@pytest.mark.parametrize("start", [0, 3])
def test_several_streams_in_one_batch(reader: StoreReader, start: int) -> None:
    options = {"epochs": 2, "streams": 3}
    both = collect(reader, start, own=(0, 2), batch_tokens=32, **options)
    first, third = (collect(reader, start, own=(n,), batch_tokens=16, **options) for n in (0, 2))
    assert len(both) == min(len(first), len(third))
    for batch, *parts in zip(both, first, third, strict=False):
        for found, *expected in zip(batch, *parts, strict=True):
            assert torch.equal(found, torch.cat(expected))


def test_unshuffled_is_in_the_order_of_the_store(reader: StoreReader) -> None:
    got = collect(reader, shuffle=False, split="eval", drop_last=False)
    assert keys(got) == sorted(all_tokens(reader, (1,), "eval"))


def test_chunks_by_themselves_give_the_batches_of_all(reader: StoreReader) -> None:
    order = {"shuffle": False, "drop_last": False, "within_chunks": True}
    chunks = reader.chunks("train")
    whole = collect(reader, **order)
    parts = [collect(reader, chunks=(chunk,), **order) for chunk in chunks]
    assert [len(part) for part in parts] == [2] * len(chunks)  # of 60 tokens
    for a, b in zip(whole, [batch for part in parts for batch in part], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert len(torch.cat([rows for _, rows, _ in whole])) == len(all_tokens(reader, (1,), "train"))


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Small blocks and parts; comes to hold how many tokens a part had."""
    seen: set[int] = set()
    decode = Decoder._decode_part

    def noted(decoder: Decoder, codes: Any, token_N: Any, out_NLD: Any) -> None:
        seen.add(len(token_N))
        decode(decoder, codes, token_N, out_NLD)

    monkeypatch.setattr(Decoder, "_decode_part", noted)
    monkeypatch.setattr(batch_parts, "_BLOCK_VALUES", 5 * 3 * 32)
    monkeypatch.setattr(batch_parts, "_LEAST_VALUES", 1)
    return seen


@pytest.mark.parametrize(
    "options",
    [
        {"batch_tokens": 38},
        {"batch_tokens": 38, "drop_last": False, "layers": (2,), "norm": "none"},
        {"shuffle": False, "drop_last": False, "within_chunks": True},
        {"streams": 3, "own": (0, 2), "batch_tokens": 38},
        {"batch_tokens": 2, "chunks": (2, 4)},
    ],
)
def test_the_batches_are_the_same_with_any_number_of_threads(
    reader: StoreReader, options: dict[str, Any], parts: set[int]
) -> None:
    expected = collect(reader, threads=1, **options)
    for threads in (2, 3, 7):
        parts.clear()
        found = collect(reader, threads=threads, **options)
        assert len(found) == len(expected) > 0
        for a, b in zip(found, expected, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        size = options.get("batch_tokens", 32) // len(options.get("own", (0,)))
        assert max(parts) == -(-size // threads)


def test_few_values_are_decoded_in_two_parts(
    reader: StoreReader, parts: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_parts, "_LEAST_VALUES", 1 << 16)
    collect(reader, threads=7, batch_tokens=20)
    assert max(parts) == 10


def test_all_threads_read_where_a_group_has_few_chunks(
    reader: StoreReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, list[Any]] = {}
    codes = StoreReader.codes

    def noted(reader: StoreReader, chunk: int, positions: Any, out: Any = None) -> Any:
        seen.setdefault(chunk, []).append(positions)
        return codes(reader, chunk, positions, out)

    monkeypatch.setattr(StoreReader, "codes", noted)
    for threads, calls in ((1, 1), (2, 2), (3, 3), (7, 3)):
        seen.clear()
        collect(reader, threads=threads, within_chunks=True)
        assert len(seen) == 5
        for shares in seen.values():
            assert len(shares) == calls
            assert sorted(position for share in shares for position in share) == [0, 1, 2]


def test_threads_follow_the_cores(reader: StoreReader, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [batch_threads(n) for n in (0.5, 1, 2, 3.9, 8, 16, 200)] == [2, 2, 2, 3, 8, 16, 16]
    monkeypatch.setattr(devices, "_taken", 5)
    source = BatchSource(reader, BatchConfig(layers=(1,), batch_tokens=8, epochs=50))
    before = set(threading.enumerate())
    with source.batches() as batches:
        next(batches)
        names = [t.name for t in set(threading.enumerate()) - before]
        assert 0 < sum(name.startswith("read") for name in names) <= 5
        assert 0 < sum(name.startswith("decode") for name in names) <= 5
        assert len(names) <= 11


@pytest.mark.parametrize("streams", [1, 3])
def test_no_thread_is_left(reader: StoreReader, streams: int) -> None:
    own = tuple(range(streams))
    config = BatchConfig(layers=(1,), batch_tokens=6, epochs=5, streams=streams, own=own)
    before = set(threading.enumerate())
    for taken in (0, 1, 7, 10_000):
        with BatchSource(reader, config).batches() as batches:
            assert len(list(islice(batches, taken))) <= taken
            assert set(threading.enumerate()) - before
        assert set(threading.enumerate()) == before
    with pytest.raises(KeyError), BatchSource(reader, config).batches() as batches:
        raise KeyError(next(batches))
    assert set(threading.enumerate()) == before


def test_an_error_in_a_decoding_thread_reaches_the_user(
    reader: StoreReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = Decoder._decode_part
    calls = count(1)

    def failing(decoder: Decoder, codes: Any, token_N: Any, out_NLD: Any) -> None:
        decode(decoder, codes, token_N, out_NLD)
        if next(calls) == 8:
            raise FloatingPointError("the eighth")

    monkeypatch.setattr(Decoder, "_decode_part", failing)
    before = set(threading.enumerate())
    source = BatchSource(reader, BatchConfig(layers=(1,), batch_tokens=20, threads=2))
    with source.batches() as batches:
        assert [len(next(batches).row_N) for _ in range(3)] == [20] * 3
        with pytest.raises(FloatingPointError, match="the eighth"):
            next(batches)
    assert set(threading.enumerate()) == before


def test_sample_is_of_the_split(reader: StoreReader) -> None:
    sample_NLD = first_tokens(reader, (2, 3), "train", 50, norm="none", seed=1)
    known = np.stack(list(all_tokens(reader, (2, 3), "train").values()))
    assert sample_NLD.shape == (50, 2, 32)
    distance = np.abs(known[None] - sample_NLD.numpy()[:, None]).max((2, 3)).min(1)
    assert distance.max() < 1e-6


def test_a_corrupt_chunk_is_an_error_in_the_users_thread(
    tiny_model_dir: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    broken = run(config(tiny_model_dir, tiny_corpus, tmp_path / "s.zarr"))
    file = chunk_file(broken.path, "residuals/2/codes", 3)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CorruptChunkError, match=r"chunk 3 of array residuals/2/codes"):
        collect(broken)
    chunk_file(broken.path, "committed", 4).unlink()
    with pytest.raises(IncompleteStoreError, match="1 of 5 chunks of the train split"):
        collect(StoreReader(broken.path))


def test_layers_that_are_not_there(reader: StoreReader) -> None:
    with pytest.raises(ValueError, match=r"layers \[9\] are not in the store; it has 1, 2, 3"):
        collect(reader, layers=(1, 9))
