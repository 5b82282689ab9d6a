"""A store in another codec: the same rows, decoded and encoded again."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest

from stores.codecs import Bf16Codec, DeltaCodec, Float32, Int8Codec, ResidualCodec
from stores.errors import (
    CorruptChunkError,
    NotAStoreError,
    SpecMismatchError,
    StoreLockedError,
)
from stores.reader import StoreReader
from stores.recode import recode
from stores.spec import StoreSpec
from stores.stats import split_stats
from stores.writer import StoreWriter
from tests.store_helpers import (
    VARIANTS,
    Killed,
    chunk_file,
    decoded,
    encoded_chunk,
    fill_store,
    grown,
    killed_at,
    residuals,
    store_bytes,
    store_spec,
    token_rows,
)

PAIRS = list(itertools.product(("bf16", "int8", "delta", "delta-keyframe-3"), repeat=2))


def large_spec(codec: ResidualCodec) -> StoreSpec:
    """Enough tokens for a mean over them to say something."""
    return store_spec(codec=codec, width=64, context=24, chunk_rows=4, eval_rows=4, train_rows=6)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, StoreReader]:
    """A complete store for each codec, by the codec's id; not to be changed."""
    folder = tmp_path_factory.mktemp("sources")
    return {name: fill_store(folder / name, large_spec(codec)) for name, codec in VARIANTS.items()}


def true_distortion(reader: StoreReader) -> Float32:
    """NMSE by layer against the residuals that were harvested."""
    spec, found = reader.spec, []
    for chunk in range(spec.chunks):
        counted_N = token_rows(spec, chunk).counted_RT().reshape(-1)
        x_NLD = np.stack(residuals(spec, chunk), axis=1)[counted_N].astype(np.float64)
        error_NLD = reader.residuals(chunk, spec.layers)[counted_N] - x_NLD
        found.append((error_NLD**2).mean(-1) / x_NLD.var(-1))
    nmse_L: Float32 = np.concatenate(found).mean(axis=0)
    return nmse_L


@pytest.mark.parametrize(("old", "new"), PAIRS, ids=map(" to ".join, PAIRS))
def test_every_codec_to_every_codec(
    sources: dict[str, StoreReader], old: str, new: str, tmp_path: Path
) -> None:
    source, codec = sources[old], VARIANTS[new]
    before = store_bytes(source.path)
    assert recode(source.path, tmp_path / "s.zarr", codec) == source.spec.chunks
    target = StoreReader(tmp_path / "s.zarr")
    assert target.spec == dataclasses.replace(source.spec, codec=codec)
    assert list(target.verify()) == [(0, None), (1, None), (2, None)]
    for chunk in target.committed:
        x_NLD = source.residuals(chunk, source.spec.layers)
        again = codec.encode(list(np.ascontiguousarray(x_NLD.transpose(1, 0, 2))))
        np.testing.assert_array_equal(
            target.residuals(chunk, target.spec.layers), decoded(codec, again)
        )
        assert target.rows(chunk).documents == source.rows(chunk).documents
        np.testing.assert_array_equal(target.rows(chunk).tokens_RT, source.rows(chunk).tokens_RT)
        np.testing.assert_array_equal(target.stats(chunk).sum, source.stats(chunk).sum)
        assert target.stats(chunk).count == source.stats(chunk).count
    assert store_bytes(source.path) == before
    recorded_L, true_L = split_stats(target).distortion_L, true_distortion(target)
    np.testing.assert_allclose(recorded_L, true_L, rtol=0.1)


@pytest.mark.parametrize("codec", VARIANTS.values(), ids=VARIANTS.keys())
def test_from_exact_residuals_it_is_what_a_harvest_gives(
    codec: ResidualCodec, tmp_path: Path
) -> None:
    """Byte for byte: bf16 loses nothing of a model that computes in bfloat16."""
    for path, kind in ((tmp_path / "bf16", Bf16Codec()), (tmp_path / "direct", codec)):
        spec = store_spec(codec=kind)
        fill_store(path, spec, chunks=())
        with StoreWriter(path) as writer:
            for chunk in range(spec.chunks):
                exact_LND = [
                    (x_ND.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
                    for x_ND in residuals(spec, chunk)
                ]
                writer.write_chunk(
                    chunk, token_rows(spec, chunk), *encoded_chunk(spec, chunk, exact_LND)
                )
    recode(tmp_path / "bf16", tmp_path / "recoded", codec)
    assert store_bytes(tmp_path / "recoded") == store_bytes(tmp_path / "direct")


@pytest.fixture
def source(tmp_path: Path) -> StoreReader:
    """A small complete store."""
    return fill_store(tmp_path / "source.zarr", store_spec(layers=(3,), train_rows=2))


def test_progress_is_told_after_each_chunk(source: StoreReader, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    recode(source.path, tmp_path / "t.zarr", Int8Codec(), on_chunk=lambda *now: told.append(now))
    assert told == [(1, 2), (2, 2)]
    assert recode(source.path, tmp_path / "t.zarr", Int8Codec()) == 2  # nothing left to do


def test_stopped_at_any_write_and_called_again(source: StoreReader, tmp_path: Path) -> None:
    path = tmp_path / "t.zarr"
    with killed_at(10**9) as written:
        recode(source.path, path, Bf16Codec())
    expected = store_bytes(path)
    for write in range(0, len(written), 3):
        shutil.rmtree(path)
        with pytest.raises(Killed), killed_at(write):
            recode(source.path, path, Bf16Codec())
        assert recode(source.path, path, Bf16Codec()) == 2
        assert store_bytes(path) == expected, f"killed at write {write}"


def test_what_is_not_harvested_yet_follows_later(tmp_path: Path) -> None:
    spec, codec = store_spec(train_rows=6), DeltaCodec(keyframe_every=1)
    source, target = tmp_path / "source.zarr", tmp_path / "target.zarr"
    fill_store(source, spec, chunks=(1,))
    assert recode(source, target, codec) == 1
    assert StoreReader(target).committed == [1]
    fill_store(source, spec)
    assert recode(source, target, codec) == 3
    fill_store(source, grown(spec, 9))
    assert recode(source, target, codec) == 4
    recode(source, tmp_path / "whole.zarr", codec)
    assert store_bytes(target) == store_bytes(tmp_path / "whole.zarr")


def test_more_tokens_than_are_decoded_at_a_time(
    source: StoreReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recode(source.path, tmp_path / "whole.zarr", Int8Codec())
    monkeypatch.setattr("stores.recode._BLOCK_VALUES", 4 * source.spec.values_per_token)
    recode(source.path, tmp_path / "blocks.zarr", Int8Codec())
    assert source.rows(0).tokens_RT.size % 4  # the last block is not full
    for chunk in source.committed:
        whole, blocks = (StoreReader(tmp_path / f"{n}.zarr") for n in ("whole", "blocks"))
        np.testing.assert_array_equal(whole.residuals(chunk, (3,)), blocks.residuals(chunk, (3,)))
        np.testing.assert_allclose(
            whole.stats(chunk).distortion, blocks.stats(chunk).distortion, rtol=1e-5
        )


def test_a_corrupt_source_is_named_and_nothing_of_the_chunk_is_kept(
    source: StoreReader, tmp_path: Path
) -> None:
    chunk_file(source.path, "residuals/3/low", 1).write_bytes(b"")
    with pytest.raises(CorruptChunkError, match=r"source.zarr: chunk 1 of array residuals/3/low"):
        recode(source.path, tmp_path / "t.zarr", Int8Codec())
    assert StoreReader(tmp_path / "t.zarr").committed == [0]


def test_another_target_is_left_as_it_is(source: StoreReader, tmp_path: Path) -> None:
    path = tmp_path / "t.zarr"
    recode(source.path, path, Int8Codec())
    before = store_bytes(path)
    with pytest.raises(SpecMismatchError, match=r"codec.kind: the store has 'int8', asked for 'bf"):
        recode(source.path, path, Bf16Codec())
    with pytest.raises(SpecMismatchError, match=r"codec.kind"):
        recode(source.path, source.path, Bf16Codec())
    assert store_bytes(path) == before
    StoreWriter(path).close()  # the lock was given back


def test_what_is_no_store_is_refused(source: StoreReader, tmp_path: Path) -> None:
    with pytest.raises(NotAStoreError, match="found nothing there"):
        recode(tmp_path / "nothing", tmp_path / "t.zarr", Int8Codec())
    assert not (tmp_path / "t.zarr").exists()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("dear")
    with pytest.raises(NotAStoreError, match="thesis"):
        recode(source.path, tmp_path / "thesis", Int8Codec())
    assert (tmp_path / "thesis" / "thesis.tex").read_text() == "dear"


def test_a_target_that_is_being_written_to_is_refused(source: StoreReader, tmp_path: Path) -> None:
    path = tmp_path / "t.zarr"
    recode(source.path, path, Int8Codec())
    with StoreWriter(path), pytest.raises(StoreLockedError, match="another process"):
        recode(source.path, path, Int8Codec())


def test_a_width_that_the_codec_refuses_makes_no_target(tmp_path: Path) -> None:
    fill_store(tmp_path / "source.zarr", store_spec(width=7, codec=Int8Codec()))
    with pytest.raises(ValueError, match="even width"):
        recode(tmp_path / "source.zarr", tmp_path / "t.zarr", DeltaCodec())
    assert not (tmp_path / "t.zarr").exists()
