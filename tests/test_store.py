"""Writing and reading stores: what goes in comes out, whenever the writer was stopped."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stores.codecs import Bf16Codec, DeltaCodec, Int8Codec, ResidualCodec
from stores.errors import (
    IncompleteStoreError,
    NotAStoreError,
    StoreError,
    StoreLockedError,
)
from stores.layout import ChunkStats, TokenRows
from stores.reader import StoreReader
from stores.stats import StatsBuilder, split_stats, stored_bytes
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
    without_rows,
)

ROOT = Path(__file__).parent.parent
over_codecs = pytest.mark.parametrize("codec", VARIANTS.values(), ids=VARIANTS.keys())


def small_spec(**changes: Any) -> Any:
    """Two chunks and few arrays, for tests that write them over and over."""
    return store_spec(**{"layers": (2,), "codec": Int8Codec(), "train_rows": 2} | changes)


# what goes in comes out


@over_codecs
def test_residuals_are_what_the_codec_makes_of_them(codec: ResidualCodec, tmp_path: Path) -> None:
    spec = store_spec(codec=codec)
    reader = fill_store(tmp_path / "s.zarr", spec)
    assert reader.spec == spec
    for chunk in range(spec.chunks):
        encoded = codec.encode(residuals(spec, chunk))
        expected_NLD = decoded(codec, encoded)
        np.testing.assert_array_equal(reader.residuals(chunk, spec.layers), expected_NLD)
        some_NLD = reader.residuals(chunk, (4, 1))
        assert some_NLD.dtype == np.float32
        np.testing.assert_array_equal(some_NLD, expected_NLD[:, [2, 0]])


def test_padding_comes_back_as_zeros(tmp_path: Path) -> None:
    spec = store_spec()
    reader = fill_store(tmp_path / "s.zarr", spec)
    lengths_R = reader.rows(0).lengths_R
    padding_N = (np.arange(spec.context) >= lengths_R[:, None]).reshape(-1)
    assert padding_N.any()
    x_NLD = reader.residuals(0, spec.layers)
    assert not x_NLD[padding_N].any()
    assert x_NLD[~padding_N].any(axis=(1, 2)).all()


def test_token_rows_come_back(tmp_path: Path) -> None:
    spec = store_spec()
    reader = fill_store(tmp_path / "s.zarr", spec)
    for chunk in range(spec.chunks):
        expected, found = token_rows(spec, chunk), reader.rows(chunk)
        np.testing.assert_array_equal(found.tokens_RT, expected.tokens_RT)
        np.testing.assert_array_equal(found.lengths_R, expected.lengths_R)
        assert (found.tokens_RT.dtype, found.lengths_R.dtype) == (np.dtype(np.int32),) * 2
        assert found.documents == expected.documents
    assert "№ 1" in reader.rows(0).documents[1].encode().decode("unicode_escape")


def test_first_token_and_padding_do_not_count() -> None:
    rows = TokenRows(np.zeros((3, 4), np.int32), np.array([4, 2, 1], np.int32), [""] * 3)
    assert rows.counted_RT().astype(int).tolist() == [[0, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]]


@over_codecs
def test_statistics_are_those_of_the_counted_residuals(
    codec: ResidualCodec, tmp_path: Path
) -> None:
    spec = store_spec(codec=codec)
    reader = fill_store(tmp_path / "s.zarr", spec)
    for split in ("eval", "train", "all"):
        raw, lossy = [], []
        for chunk in spec.split_chunks(split):
            counted_N = token_rows(spec, chunk).counted_RT().reshape(-1)
            raw.append(np.stack(residuals(spec, chunk), axis=1)[counted_N])
            lossy.append(reader.residuals(chunk, spec.layers)[counted_N])
        x_NLD, y_NLD = (np.concatenate(parts).astype(np.float64) for parts in (raw, lossy))
        stats = split_stats(reader, split)
        assert stats.count == len(x_NLD) > 0
        np.testing.assert_allclose(stats.mean_LD, x_NLD.mean(axis=0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(stats.mean_square_L, (x_NLD**2).mean(axis=(0, 2)), rtol=1e-5)
        nmse_NL = ((y_NLD - x_NLD) ** 2).mean(-1) / x_NLD.var(-1)
        np.testing.assert_allclose(stats.distortion_L, nmse_NL.mean(axis=0), rtol=1e-2)


def test_statistics_add_up_in_parts() -> None:
    rng = np.random.default_rng(0)
    x_LND = rng.integers(-9, 9, (2, 6, 4)).astype(np.float32)  # sums are exact
    distortion_LN = rng.integers(0, 9, (2, 6)).astype(np.float32)
    counted_N = np.array([False, True, True, False, True, True])
    whole, parts = StatsBuilder(2, 4), StatsBuilder(2, 4)
    whole.add(list(x_LND), distortion_LN, counted_N)
    for part in (slice(0, 2), slice(2, 6)):
        builder = StatsBuilder(2, 4)
        builder.add(list(x_LND[:, part]), distortion_LN[:, part], counted_N[part])
        parts.merge(builder)
    for field in dataclasses.fields(ChunkStats):
        found = getattr(parts.result(), field.name)
        np.testing.assert_array_equal(found, getattr(whole.result(), field.name))
    np.testing.assert_array_equal(whole.result().sum, x_LND[:, counted_N].sum(axis=1))
    np.testing.assert_array_equal(whole.result().distortion, distortion_LN[:, counted_N].sum(1))


def test_statistics_of_nothing_are_zeros(tmp_path: Path) -> None:
    reader = fill_store(tmp_path / "s.zarr", store_spec(), chunks=())
    stats = split_stats(reader)
    assert stats.count == 0
    assert not stats.mean_LD.any()


def test_size_counts_every_file(tmp_path: Path) -> None:
    fill_store(tmp_path / "s.zarr", store_spec())
    files = store_bytes(tmp_path / "s.zarr")
    assert stored_bytes(tmp_path / "s.zarr") == sum(map(len, files.values()))


def test_write_chunk_returns_the_bytes_of_the_chunk(tmp_path: Path) -> None:
    spec, path = small_spec(), tmp_path / "s.zarr"
    fill_store(path, spec, chunks=())
    with StoreWriter(path) as writer:
        size = writer.write_chunk(1, token_rows(spec, 1), *encoded_chunk(spec, 1))
    files = {n: len(b) for n, b in store_bytes(path).items() if "/c/1" in n}
    assert size == sum(files.values()) - files["digest/c/1/0"] - files["committed/c/1"]


# splits and chunks that are not there


def test_splits_give_their_chunks(tmp_path: Path) -> None:
    reader = fill_store(tmp_path / "s.zarr", store_spec())
    assert [reader.chunks(split) for split in ("eval", "train", "all")] == [[0], [1, 2], [0, 1, 2]]


def test_an_incomplete_split_is_an_error(tmp_path: Path) -> None:
    reader = fill_store(tmp_path / "s.zarr", store_spec(), chunks=(0, 2))
    assert reader.committed == [0, 2]
    assert reader.chunks("eval") == [0]
    assert reader.chunks("all", complete=False) == [0, 2]
    assert [reader.prefix(split) for split in ("eval", "train", "all")] == [[0], [], [0]]
    with pytest.raises(IncompleteStoreError, match="1 of 2 chunks of the train split"):
        reader.chunks("train")
    assert list(reader.verify()) == [(0, None), (2, None)]


def test_a_split_without_rows_is_an_error(tmp_path: Path) -> None:
    reader = fill_store(tmp_path / "s.zarr", store_spec(eval_rows=0))
    assert reader.chunks("train") == [0, 1]
    with pytest.raises(IncompleteStoreError, match="the eval split has no tokens"):
        reader.chunks("eval")
    assert reader.chunks("eval", complete=False) == []


def test_a_layer_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    reader = fill_store(tmp_path / "s.zarr", store_spec())
    with pytest.raises(ValueError, match=r"layers \[3\] are not in the store; it has 1, 2, 4"):
        reader.residuals(0, (2, 3))


def test_rows_are_there_before_residuals(tmp_path: Path) -> None:
    spec = store_spec()
    reader = fill_store(tmp_path / "s.zarr", spec, chunks=())
    found = reader.rows(2, check=False)
    np.testing.assert_array_equal(found.tokens_RT, token_rows(spec, 2).tokens_RT)


# making a store


def test_create_makes_the_folders_above(tmp_path: Path) -> None:
    StoreWriter.create(tmp_path / "a" / "b.zarr", store_spec()).close()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.zarr"]


def test_others_may_read_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        StoreWriter.create(tmp_path / "s.zarr", store_spec()).close()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "s.zarr").stat().st_mode) == 0o750


def test_create_takes_an_empty_folder(tmp_path: Path) -> None:
    StoreWriter.create(tmp_path, store_spec()).close()
    assert StoreReader(tmp_path).spec == store_spec()


@pytest.mark.parametrize("what", ["folder", "file", "store"])
def test_create_harms_nothing_that_is_there(what: str, tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    if what == "folder":
        path.mkdir()
        (path / "thesis.tex").write_text("dear")
    elif what == "file":
        path.write_text("dear")
    else:
        fill_store(path, store_spec())
    before = store_bytes(tmp_path)
    with pytest.raises(StoreError, match="exists already"):
        StoreWriter.create(path, store_spec())
    assert store_bytes(tmp_path) == before
    assert list(tmp_path.iterdir()) == [path]


def test_create_below_a_file_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("dear")
    with pytest.raises(OSError, match="file"):
        StoreWriter.create(tmp_path / "file" / "s.zarr", store_spec())


@pytest.mark.parametrize("name", ["nothing", "file", "folder"])
def test_a_writer_opens_nothing_but_a_store(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("dear")
    (tmp_path / "folder").mkdir()
    for _ in range(2):  # twice: the lock was given back
        with pytest.raises(NotAStoreError, match="expected an activation store"):
            StoreWriter(tmp_path / name)


# one writer


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    fill_store(path, small_spec())
    with StoreWriter(path):
        with pytest.raises(StoreLockedError, match="being written to by another process"):
            StoreWriter(path)
        StoreReader(path).rows(0)  # readers need no lock
    StoreWriter(path).close()


WRITING_CHILD = """
import os, signal, sys
from pathlib import Path
from tests.store_helpers import Killed, fill_store, killed_at
from tests.test_store import small_spec
with killed_at(int(sys.argv[2])):
    try:
        fill_store(Path(sys.argv[1]), small_spec(), chunks=(0, 1))
    except Killed:
        pass
    from stores.writer import StoreWriter
    writer = StoreWriter(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


def test_the_lock_of_another_process_ends_with_it(tmp_path: Path) -> None:
    """SIGKILL, while chunk 1 is half written."""
    path, whole = tmp_path / "s.zarr", tmp_path / "whole.zarr"
    expected = fill_store(whole, small_spec())
    with killed_at(10**9) as written:
        fill_store(tmp_path / "counted.zarr", small_spec())
    at = next(n for n, file in enumerate(written) if file.match("residuals/2/*/c/1/*")) + 1
    child = subprocess.Popen(
        [sys.executable, "-c", WRITING_CHILD, path, str(at)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "locked\n"
        with pytest.raises(StoreLockedError):
            StoreWriter(path)
        assert StoreReader(path).committed == [0]
        os.kill(child.pid, signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    fill_store(path, small_spec())
    assert store_bytes(path) == store_bytes(expected.path)


# stopped and gone on with


def assert_sound(path: Path) -> None:
    """Whatever is committed reads well."""
    reader = StoreReader(path)
    assert list(reader.verify()) == [(chunk, None) for chunk in reader.committed]


def test_killed_at_any_write_and_resumed_gives_the_same_bytes(tmp_path: Path) -> None:
    spec, path = small_spec(), tmp_path / "s.zarr"
    with killed_at(10**9) as written:
        fill_store(path, spec)
    expected = store_bytes(path)
    for write in range(len(written)):
        shutil.rmtree(path)
        with pytest.raises(Killed), killed_at(write):
            fill_store(path, spec)
        if path.exists():
            assert_sound(path)
        fill_store(path, spec)
        assert store_bytes(path) == expected, f"killed at write {write}"


def test_killed_at_any_write_of_an_extension_and_resumed(tmp_path: Path) -> None:
    base, path = tmp_path / "base.zarr", tmp_path / "s.zarr"
    small, large = small_spec(train_rows=3), grown(small_spec(), 11)
    fill_store(base, small)
    expected = store_bytes(fill_store(tmp_path / "whole.zarr", large).path)
    shutil.copytree(base, path)
    with killed_at(10**9) as written:
        fill_store(path, large)
    assert store_bytes(path) == expected
    assert not any(file.match("lengths/c/[01]") for file in written)
    for write in range(len(written)):
        shutil.rmtree(path)
        shutil.copytree(base, path)
        with pytest.raises(Killed), killed_at(write):
            fill_store(path, large)
        assert_sound(path)
        assert StoreReader(path).committed[:2] == [0, 1]
        assert StoreReader(path).spec in (small, large)
        fill_store(path, large)
        assert store_bytes(path) == expected, f"killed at write {write}"


def test_chunks_may_be_written_in_any_order(tmp_path: Path) -> None:
    spec, path = store_spec(), tmp_path / "s.zarr"
    fill_store(path, spec, chunks=(2,))
    fill_store(path, spec, chunks=(1,))
    fill_store(path, spec)
    whole = fill_store(tmp_path / "whole.zarr", spec)
    assert store_bytes(path) == store_bytes(whole.path)


def test_what_was_written_stays_good_on_a_full_disk(tmp_path: Path) -> None:
    spec, path = small_spec(), tmp_path / "s.zarr"
    fill_store(path, spec, chunks=(0,))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"), killed_at(2, full):
        fill_store(path, spec)
    assert StoreReader(path).committed == [0]
    assert_sound(path)
    fill_store(path, spec)
    assert StoreReader(path).committed == [0, 1]
    assert_sound(path)


def test_a_chunk_without_its_commit_is_written_again(tmp_path: Path) -> None:
    spec, path = small_spec(), tmp_path / "s.zarr"
    fill_store(path, spec)
    expected = store_bytes(path)
    chunk_file(path, "residuals/2/codes", 0).write_bytes(b"spoilt")
    chunk_file(path, "committed", 0).unlink()
    with StoreWriter(path) as writer:
        assert writer.pending() == [0]
    fill_store(path, spec)
    assert store_bytes(path) == expected


def test_a_reader_goes_on_while_the_store_is_extended(tmp_path: Path) -> None:
    path, small = tmp_path / "s.zarr", small_spec(train_rows=3)
    before = fill_store(path, small)
    first = before.residuals(1, (2,))
    fill_store(path, grown(small, 6), chunks=())
    np.testing.assert_array_equal(before.residuals(1, (2,)), first)
    assert before.chunks("train") == [1]
    after = StoreReader(path)
    np.testing.assert_array_equal(after.residuals(1, (2,)), first)
    with pytest.raises(IncompleteStoreError, match="1 of 2 chunks of the train split"):
        after.chunks("train")


def test_a_file_goes_while_the_store_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(fill_store(tmp_path / "s.zarr", small_spec()).path)
    expected = stored_bytes(path)
    leftover = path / "tokens" / "c" / "0" / "0.0123.partial"
    walk = os.walk

    def walked(*arguments: Any) -> Any:
        leftover.touch()
        found = list(walk(*arguments))
        leftover.unlink()
        return found

    monkeypatch.setattr(os, "walk", walked)
    assert stored_bytes(path) == expected == sum(map(len, store_bytes(path).values()))


def test_arrays_may_be_longer_than_the_row_counts_say(tmp_path: Path) -> None:
    """As they are while token rows are being written."""
    path, small = tmp_path / "s.zarr", small_spec(train_rows=3)
    fill_store(path, small)
    large = grown(small, 6)
    with StoreWriter(path) as writer:
        writer.write_rows(2, token_rows(large, 2))
        reader = StoreReader(path)
        assert reader.spec == small
        assert list(reader.verify()) == [(0, None), (1, None)]
        assert reader.rows(1).documents == token_rows(small, 1).documents


def test_row_counts_change_in_one_step_and_back_is_no_harm(tmp_path: Path) -> None:
    path, spec = tmp_path / "s.zarr", small_spec()
    with StoreWriter.create(path, without_rows(spec)) as writer:
        writer.write_rows(0, token_rows(spec, 0))
        assert StoreReader(path).spec.rows == 0
        writer.write_rows(1, token_rows(spec, 1))
        writer.commit_rows(spec)
        assert StoreReader(path).spec == writer.spec == spec
        assert writer.pending() == [0, 1]
        exhausted = dataclasses.replace(spec, exhausted=True)
        writer.commit_rows(exhausted)
    assert StoreReader(path).spec == exhausted


def test_all_codecs_take_the_same_rows(tmp_path: Path) -> None:
    """Token files do not depend on the codec."""
    stores = [
        store_bytes(fill_store(tmp_path / codec.kind, store_spec(codec=codec), ()).path)
        for codec in (Bf16Codec(), Int8Codec(), DeltaCodec())
    ]
    rows = [
        {name: b for name, b in files.items() if name.split("/")[0] in ("tokens", "documents")}
        for files in stores
    ]
    assert rows[0] == rows[1] == rows[2]
    assert len(rows[0]) == 8
