"""Whatever happens to the files of a store, reading gives what was written or an error's name."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from stores.codecs import Bf16Codec, DeltaCodec, Int8Codec
from stores.errors import (
    CorruptChunkError,
    NewerFormatError,
    NotAStoreError,
    StoreError,
)
from stores.layout import ATTRIBUTE, digested
from stores.reader import StoreReader
from stores.spec import FORMAT_VERSION
from stores.writer import StoreWriter
from tests.store_helpers import chunk_file, fill_store, store_bytes, store_spec
from tests.test_store_spec import JSON

CODECS = {codec.kind: codec for codec in (Bf16Codec(), Int8Codec(), DeltaCodec())}
ARRAYS = [
    *(("delta", name) for name in digested(store_spec(layers=(4,)))),
    ("int8", "residuals/2/codes"),
    ("bf16", "residuals/2/codes"),
]
"""(kind of codec, array): one of each that there is."""


@pytest.fixture(scope="module")
def sound_stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A complete store for each kind of codec, by kind; not to be changed."""
    folder = tmp_path_factory.mktemp("sound")
    for kind, codec in CODECS.items():
        fill_store(folder / kind, store_spec(codec=codec))
    return {kind: folder / kind for kind in CODECS}


@pytest.fixture
def stores(sound_stores: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Copies of the sound stores, to be spoilt."""
    for kind, path in sound_stores.items():
        shutil.copytree(path, tmp_path / kind)
    return {kind: tmp_path / kind for kind in CODECS}


@pytest.fixture
def store(stores: dict[str, Path]) -> Path:
    """A copy of the sound delta store."""
    return stores["delta"]


def read(reader: StoreReader, array: str, chunk: int) -> object:
    """The public read that needs an array."""
    if array.startswith("residuals/"):
        return reader.residuals(chunk, reader.spec.layers)
    return reader.stats(chunk) if array.startswith("stats/") else reader.rows(chunk)


def assert_corrupt(path: Path, array: str, chunk: int, reason: str = "") -> None:
    """Reading and verifying name the chunk and the array, and find nothing else."""
    reader = StoreReader(path)
    with pytest.raises(CorruptChunkError, match=f"chunk {chunk} of array {array} is corrupt") as at:
        read(reader, array, chunk)
    assert (at.value.chunk, at.value.array) == (chunk, array)
    assert reason in at.value.reason
    found = [(c, fault.array if fault else None) for c, fault in reader.verify()]
    assert found == [(c, array if c == chunk else None) for c in range(reader.spec.chunks)]
    for other in set(range(reader.spec.chunks)) - {chunk}:
        read(reader, array, other)


# chunk files


def flip(content: bytes, at: int) -> bytes:
    changed = bytearray(content)
    changed[at] ^= 0x10
    return bytes(changed)


def with_checksum(content: bytes) -> bytes:
    return content + struct.pack("<I", google_crc32c.value(content))


SPOILERS: dict[str, Callable[[bytes], bytes]] = {
    "first byte": lambda content: flip(content, 0),
    "middle byte": lambda content: flip(content, len(content) // 2),
    "checksum": lambda content: flip(content, -1),
    "half": lambda content: content[: len(content) // 2],
    "one byte less": lambda content: content[:-1],
    "three bytes": lambda content: content[:3],
    "one byte more": lambda content: content + b"\0",
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "noise under a good checksum": lambda content: with_checksum(b"\x28\xb5\x2f\xfd noise" * 3),
    "nothing under a good checksum": lambda content: with_checksum(b""),
}


@pytest.mark.parametrize("spoil", SPOILERS.values(), ids=SPOILERS.keys())
def test_a_spoilt_file_is_named(stores: dict[str, Path], spoil: Callable[[bytes], bytes]) -> None:
    for kind, array in ARRAYS:
        file = chunk_file(stores[kind], array, 1)
        content = file.read_bytes()
        file.write_bytes(spoil(content))
        assert_corrupt(stores[kind], array, 1)
        file.write_bytes(content)


def test_every_flipped_bit_is_found(store: Path) -> None:
    file = chunk_file(store, "residuals/4/scale", 2)
    content, reader = file.read_bytes(), StoreReader(store)
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        with pytest.raises(CorruptChunkError, match=r"chunk 2 of array residuals/4/scale"):
            reader.residuals(2, (4,))


@pytest.mark.parametrize(("kind", "array"), ARRAYS)
def test_a_removed_file_is_named(stores: dict[str, Path], kind: str, array: str) -> None:
    """Though zarr reads zeros, which is what some arrays hold."""
    chunk_file(stores[kind], array, 1).unlink()
    assert_corrupt(stores[kind], array, 1, "the file is missing")


def test_a_folder_in_a_files_place_is_named(stores: dict[str, Path]) -> None:
    for kind, array in ARRAYS:
        file = chunk_file(stores[kind], array, 1)
        content = file.read_bytes()
        file.unlink()
        file.mkdir()
        assert_corrupt(stores[kind], array, 1)
        file.rmdir()
        file.write_bytes(content)


def test_swapped_files_are_named_in_both_chunks(stores: dict[str, Path]) -> None:
    """Each is good by itself: only the digest tells."""
    swapped = 0
    for kind, array in ARRAYS:
        files = [chunk_file(stores[kind], array, chunk) for chunk in (0, 1)]
        contents = [file.read_bytes() for file in files]
        if contents[0] == contents[1]:
            continue
        for file, content in zip(files, reversed(contents), strict=True):
            file.write_bytes(content)
        faults = [
            (chunk, fault.array, fault.reason)
            for chunk, fault in StoreReader(stores[kind]).verify()
            if fault is not None
        ]
        assert faults == [(chunk, array, "the values are not the ones written") for chunk in (0, 1)]
        with pytest.raises(CorruptChunkError, match=f"chunk 1 of array {array}"):
            read(StoreReader(stores[kind]), array, 1)
        for file, content in zip(files, contents, strict=True):
            file.write_bytes(content)
        swapped += 1
    assert swapped > len(ARRAYS) / 2


def test_files_swapped_between_layers_are_named(store: Path) -> None:
    files = [chunk_file(store, f"residuals/{layer}/low", 0) for layer in (1, 2)]
    first, second = (file.read_bytes() for file in files)
    assert first != second
    files[0].write_bytes(second)
    assert_corrupt(store, "residuals/1/low", 0, "the values are not the ones written")
    files[0].write_bytes(first)
    files[1].write_bytes(first)
    assert_corrupt(store, "residuals/2/low", 0, "the values are not the ones written")


@pytest.mark.parametrize("spoil", SPOILERS.values(), ids=SPOILERS.keys())
def test_a_spoilt_digest_is_named(store: Path, spoil: Callable[[bytes], bytes]) -> None:
    file = chunk_file(store, "digest", 1)
    file.write_bytes(spoil(file.read_bytes()))
    reader = StoreReader(store)
    for array in ("tokens", "stats/sum", "residuals/1/low"):
        with pytest.raises(CorruptChunkError, match=r"chunk 1 of array digest"):
            read(reader, array, 1)
    faults = [(chunk, fault.array if fault else None) for chunk, fault in reader.verify()]
    assert faults == [(0, None), (1, "digest"), (2, None)]


def test_a_removed_digest_is_named(store: Path) -> None:
    chunk_file(store, "digest", 0).unlink()
    with pytest.raises(CorruptChunkError, match=r"chunk 0 of array digest is corrupt: the file is"):
        StoreReader(store).rows(0)


def test_another_chunks_digest_fits_nothing(store: Path) -> None:
    shutil.copy(chunk_file(store, "digest", 0), chunk_file(store, "digest", 1))
    reader = StoreReader(store)
    for array in ("tokens", "stats/sum", "residuals/1/low"):
        with pytest.raises(CorruptChunkError, match=f"chunk 1 of array {array}"):
            read(reader, array, 1)
    assert {chunk for chunk, fault in reader.verify() if fault} == {1}


def test_a_spoilt_commit_is_found_by_verify_alone(store: Path) -> None:
    file = chunk_file(store, "committed", 1)
    file.write_bytes(flip(file.read_bytes(), 3))
    reader = StoreReader(store)
    assert [(c, f.array if f else None) for c, f in reader.verify()] == [
        (0, None),
        (1, "committed"),
        (2, None),
    ]
    reader.residuals(1, (1,))


def test_several_faults_of_a_chunk_are_all_listed(store: Path) -> None:
    for array in ("tokens", "residuals/2/high", "stats/count"):
        chunk_file(store, array, 1).write_bytes(b"")
    faults = [f.array for _, f in StoreReader(store).verify() if f is not None]
    assert faults == ["tokens", "residuals/2/high", "stats/count"]


def test_tokens_lost_before_the_residuals_came_are_named(tmp_path: Path) -> None:
    """A harvest that is gone on with must not take zeros for text."""
    reader = fill_store(tmp_path / "s.zarr", store_spec(), chunks=())
    chunk_file(reader.path, "tokens", 1).unlink()
    with pytest.raises(CorruptChunkError, match=r"chunk 1 of array tokens.*file is missing"):
        reader.rows(1, check=False)


# what is no store


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(NotAStoreError, match=r"found nothing there; make one with `routesae harv"):
        StoreReader(tmp_path / "s.zarr")


def make_file(path: Path) -> None:
    path.write_text("dear diary")


def make_zarr_group(path: Path) -> None:
    zarr.create_group(path, attributes={"author": "somebody"})


def make_zarr_array(path: Path) -> None:
    zarr.create_array(path, shape=(3,), dtype="int32", attributes={ATTRIBUTE: {}})


def make_zarr_v2(path: Path) -> None:
    zarr.create_group(path, zarr_format=2, attributes={ATTRIBUTE: store_spec().to_dict()})


def make_folder_named_as_metadata(path: Path) -> None:
    (path / "zarr.json").mkdir(parents=True)


NO_STORES = (
    Path.mkdir,
    make_file,
    make_zarr_group,
    make_zarr_array,
    make_zarr_v2,
    make_folder_named_as_metadata,
)


@pytest.mark.parametrize("make", NO_STORES)
def test_what_is_no_store_is_left_as_it_is(make: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    make(path)
    before = store_bytes(tmp_path)
    for opener in (StoreReader, StoreWriter):
        with pytest.raises(NotAStoreError, match="expected a"):
            opener(path)
    assert store_bytes(tmp_path) == before


def set_record(path: Path, record: Any) -> None:
    """Replace the store's description."""
    metadata = json.loads((path / "zarr.json").read_text())
    metadata["attributes"] = {ATTRIBUTE: record}  # without its checksum, which says more
    (path / "zarr.json").write_text(json.dumps(metadata))


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 10**30])
def test_a_newer_format_says_so(store: Path, version: int) -> None:
    """Whatever else it has or lacks."""
    set_record(store, {"format_version": version, "colour": "blue"})
    for opener in (StoreReader, StoreWriter):
        with pytest.raises(NewerFormatError, match=f"format {version} is newer than format 1.*upg"):
            opener(store)


@pytest.mark.parametrize("version", [0, -1, None, "1", 1.0, True])
def test_no_format_at_all(store: Path, version: Any) -> None:
    set_record(store, store_spec().to_dict() | {"format_version": version})
    with pytest.raises(NotAStoreError, match="format version"):
        StoreReader(store)


def test_a_truncated_description_is_no_store(store: Path) -> None:
    file = store / "zarr.json"
    content = file.read_bytes()
    for length in range(0, len(content.rstrip()) - 1, 7):
        file.write_bytes(content[:length])
        with pytest.raises(NotAStoreError, match="expected an activation store"):
            StoreReader(store)


def read_everything(path: Path) -> None:
    reader = StoreReader(path)
    for chunk, fault in reader.verify():
        if fault is None:
            reader.rows(chunk)
            reader.stats(chunk)
            reader.residuals(chunk, reader.spec.layers)


VALUES = JSON | st.integers(-2, 12) | st.lists(st.integers(-1, 8), max_size=4)


@settings(max_examples=150)
@given(data=st.data())
def test_a_changed_description_is_a_store_error_or_harmless(
    sound_stores: dict[str, Path], data: st.DataObject
) -> None:
    path = sound_stores[data.draw(st.sampled_from(sorted(sound_stores)))]
    original = (path / "zarr.json").read_bytes()
    record = json.loads(original)["attributes"][ATTRIBUTE]
    place = data.draw(st.sampled_from([record, record, record["codec"]]))
    key = data.draw(st.sampled_from([*place, "colour"]))
    if data.draw(st.booleans()):
        place[key] = data.draw(VALUES)
    else:
        place.pop(key, None)
    try:
        set_record(path, data.draw(JSON) if key == "colour" else record)
        read_everything(path)
    except StoreError:
        pass
    finally:
        (path / "zarr.json").write_bytes(original)


@given(content=JSON.map(json.dumps).map(str.encode) | st.binary(max_size=60))
def test_a_foreign_metadata_file_is_no_store(sound_stores: dict[str, Path], content: bytes) -> None:
    path = sound_stores["int8"]
    original = (path / "zarr.json").read_bytes()
    (path / "zarr.json").write_bytes(content)
    try:
        with pytest.raises(NotAStoreError, match="expected an activation store"):
            StoreReader(path)
    finally:
        (path / "zarr.json").write_bytes(original)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("zarr_format", None),
        ("zarr_format", 4),
        ("zarr_format", "three"),
        ("node_type", "array"),
        ("node_type", "tree"),
        ("node_type", []),
    ],
)
def test_a_group_that_zarr_refuses(store: Path, key: str, value: Any) -> None:
    metadata = json.loads((store / "zarr.json").read_text())
    (store / "zarr.json").write_text(json.dumps(metadata | {key: value}))
    with pytest.raises(NotAStoreError, match="expected a zarr v3 group"):
        StoreReader(store)


# metadata of arrays


def become_a_group(metadata: dict[str, Any]) -> None:
    metadata.clear()
    metadata.update(zarr_format=3, node_type="group", attributes={})


METADATA: dict[str, Callable[[dict[str, Any]], object]] = {
    "nothing left": lambda m: m.clear(),
    "dtype": lambda m: m.update(data_type="float64", fill_value=0.0),
    "chunks": lambda m: m["chunk_grid"]["configuration"]["chunk_shape"].reverse(),
    "inner shape": lambda m: m["shape"].__setitem__(-1, 77),
    "separator": lambda m: m["chunk_key_encoding"]["configuration"].update(separator="."),
    "shorter": lambda m: m["shape"].__setitem__(0, 1),
    "codecs": lambda m: m.update(codecs=[{"name": "zip"}]),
    "no codecs": lambda m: m.update(codecs=[]),
    "no shape": lambda m: m.pop("shape"),
    "shape of words": lambda m: m.update(shape=["many"]),
    "a group": become_a_group,
}


@pytest.mark.parametrize("spoil", METADATA.values(), ids=METADATA.keys())
def test_spoilt_metadata_of_an_array_is_a_store_error(
    store: Path, spoil: Callable[[dict[str, Any]], object]
) -> None:
    for array in ("tokens", "stats/sum", "digest", "residuals/2/scale"):
        file = store / array / "zarr.json"
        content = file.read_text()
        metadata = json.loads(content)
        spoil(metadata)
        file.write_text(json.dumps(metadata))
        with pytest.raises(StoreError, match=array):
            read_everything_or_raise_fault(store)
        file.write_text(content)


def read_everything_or_raise_fault(path: Path) -> None:
    for _, fault in StoreReader(path).verify():
        if fault is not None:
            raise fault


@pytest.mark.parametrize("array", [*digested(store_spec()), "digest", "committed"])
def test_a_missing_array_is_named(store: Path, array: str) -> None:
    shutil.rmtree(store / array)
    with pytest.raises(NotAStoreError, match=f"array {array}"):
        StoreReader(store)


def test_a_writer_names_an_array_that_is_missing(store: Path) -> None:
    shutil.rmtree(store / "tokens")
    with pytest.raises(NotAStoreError, match="array tokens"):
        StoreWriter(store)


def test_sound_stores_are_sound(sound_stores: dict[str, Path]) -> None:
    """What every test above starts from, and what none may leave behind."""
    for path in sound_stores.values():
        reader = StoreReader(path)
        assert list(reader.verify()) == [(0, None), (1, None), (2, None)]
        assert np.isfinite(reader.residuals(0, reader.spec.layers)).all()
