"""docs/STORE_FORMAT.md holds: the bytes of a tiny store, and what the document itself shows."""

from __future__ import annotations

import dataclasses
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest

from stores.codecs import CODECS, Float32
from stores.layout import ATTRIBUTE, CHECKSUM, TokenRows, stored_arrays
from stores.reader import StoreReader
from stores.spec import StoreSpec
from stores.writer import StoreWriter
from tests.store_helpers import (
    VARIANTS,
    chunk_file,
    encoded_chunk,
    fill_store,
    store_bytes,
    store_spec,
    without_rows,
)

DOCUMENT = (Path(__file__).parent.parent / "docs" / "STORE_FORMAT.md").read_text()

# A store of two layers, two chunks and three rows. The numbers are such that every scale is a
# whole number, so nothing in it depends on how a square root or a quotient is rounded.

RECORD: dict[str, Any] = {
    "format_version": 1,
    "model": {"name": "tiny", "revision": None, "dtype": "float32", "weights": "0"},
    "tokenizer": {"bos_id": 1},
    "text": {"dataset": "none", "files": [["a.txt", 12]]},
    "packing": "document",
    "layers": [0, 2],
    "n_blocks": 2,
    "width": 4,
    "context": 3,
    "batch_rows": 1,
    "chunk_rows": 2,
    "eval_target": 5,
    "eval_rows": 2,
    "train_rows": 1,
    "eval_tokens": 5,
    "train_tokens": 3,
    "exhausted": True,
}
CODEC_RECORDS: dict[str, dict[str, Any]] = {
    "delta": {"kind": "delta", "step": 0.001, "keyframe_every": 0},
    "int8": {"kind": "int8"},
    "bf16": {"kind": "bf16"},
}
ROWS = [
    TokenRows(
        np.array([[1, 258, 7], [1, 65536, 0]], np.int32),
        np.array([3, 2], np.int32),
        ['[[1, {"title": "é"}]]', "[]"],
    ),
    TokenRows(np.array([[1, 2, 3]], np.int32), np.array([3], np.int32), ["[]"]),
]
A, B, C, P = (
    [[127, 0, -1, 2], [254, 2, -2, 4]],
    [[-8, 7, 8, -127], [-8, 6, 8, -254]],
    [[-9, -127, 16, 1], [-10, -254, 16, 0]],
    [[0, 0, 0, 0], [0, 0, 0, 0]],
)
"""Residuals of a token in both layers; P is padding."""
CHUNKS = [[A, B, C, B, A, P], [A, C, B]]

# What the files hold without checksum and compression: array -> both chunks, in hexadecimal.

TEXT_CONTENT = {
    "tokens": (
        "01000000 02010000 07000000  01000000 00000100 00000000",
        "01000000 02000000 03000000  00000000 00000000 00000000",
    ),
    "lengths": ("03000000 02000000", "03000000 00000000"),
    "documents": (
        "02000000  16000000 5b5b312c207b227469746c65223a2022c3a9227d5d5d  02000000 5b5d",
        "02000000  02000000 5b5d  00000000",
    ),
}
ONES = ("0000803f 0000803f 0000803f  0000803f 0000803f 00000000", "0000803f" * 3 + "00" * 12)
TWOS = ("00000040 00000040 00000040  00000040 00000040 00000000", "00000040" * 3 + "00" * 12)
RESIDUAL_CONTENT = {
    "delta": {
        "residuals/0/low": ("87a7 f090 9f98  f090 87a7 8888", "87a7 9f98 f090  0000 0000 0000"),
        "residuals/0/high": ("0800 0081 8f01  0081 0800 0000", "0800 8f01 0081  0000 0000 0000"),
        "residuals/0/scale": ONES,
        "residuals/2/low": ("a7a7 7898 9778  7898 a7a7 8888", "a7a7 9778 7898  0000 0000 0000"),
        "residuals/2/high": ("0800 0080 8000  0080 0800 0000", "0800 8000 0080  0000 0000 0000"),
        "residuals/2/scale": ONES,
    },
    "int8": {
        "residuals/0/codes": (
            "7f00ff02 f8070881 f7811001  f8070881 7f00ff02 00000000",
            "7f00ff02 f7811001 f8070881  00000000 00000000 00000000",
        ),
        "residuals/0/scale": ONES,
        "residuals/2/codes": (
            "7f01ff02 fc030481 fb810800  fc030481 7f01ff02 00000000",
            "7f01ff02 fb810800 fc030481  00000000 00000000 00000000",
        ),
        "residuals/2/scale": TWOS,
    },
    "bf16": {
        "residuals/0/codes": (
            "fe42000080bf0040 00c1e0400041fec2 10c1fec28041803f"
            "00c1e0400041fec2 fe42000080bf0040 0000000000000000",
            "fe42000080bf0040 10c1fec28041803f 00c1e0400041fec2" + "00" * 24,
        ),
        "residuals/2/codes": (
            "7e43004000c08040 00c1c04000417ec3 20c17ec380410000"
            "00c1c04000417ec3 7e43004000c08040 0000000000000000",
            "7e43004000c08040 20c17ec380410000 00c1c04000417ec3" + "00" * 24,
        ),
    },
}
STATS_CONTENT = {
    "stats/count": (struct.pack("<q", 3), struct.pack("<q", 2)),
    "stats/sum": (
        struct.pack("<8f", 110, -120, 23, -124, 236, -246, 22, -250),
        struct.pack("<8f", -17, -120, 24, -126, -18, -248, 24, -254),
    ),
    "stats/sum_squares": (struct.pack("<2d", 48907, 194092), struct.pack("<2d", 32773, 129552)),
    "stats/distortion": (bytes(16), bytes(16)),
}

ZSTD = {"name": "zstd", "configuration": {"level": 1, "checksum": False}}
BLOSC = {
    "name": "blosc",
    "configuration": {
        "typesize": 2,
        "cname": "zstd",
        "clevel": 1,
        "shuffle": "shuffle",
        "blocksize": 0,
    },
}
BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
BYTE = {"name": "bytes"}
STRINGS = {"name": "vlen-utf8", "configuration": {}}
METADATA: dict[str, tuple[str, list[int], list[int], list[dict[str, Any]]]] = {
    # array: dtype, shape, zarr chunk, codecs before the checksum
    "tokens": ("int32", [3, 3], [2, 3], [BYTES, ZSTD]),
    "lengths": ("int32", [3], [2], [BYTES, ZSTD]),
    "documents": ("string", [3], [2], [STRINGS, ZSTD]),
    "low": ("uint8", [3, 3, 2], [2, 3, 2], [BYTE, ZSTD]),
    "high": ("uint8", [3, 3, 2], [2, 3, 2], [BYTE, ZSTD]),
    "scale": ("float32", [3, 3], [2, 3], [BYTES, ZSTD]),
    "int8 codes": ("int8", [3, 3, 4], [2, 3, 4], [BYTE, ZSTD]),
    "bf16 codes": ("uint16", [3, 3, 4], [2, 3, 4], [BYTES, BLOSC]),
    "stats/count": ("int64", [2], [1], [BYTES, ZSTD]),
    "stats/sum": ("float32", [2, 2, 4], [1, 2, 4], [BYTES, ZSTD]),
    "stats/sum_squares": ("float64", [2, 2], [1, 2], [BYTES, ZSTD]),
    "stats/distortion": ("float64", [2, 2], [1, 2], [BYTES, ZSTD]),
    "committed": ("uint8", [2], [1], [BYTE, ZSTD]),
}


def crc32c(content: bytes) -> int:
    """Bit by bit, from the polynomial."""
    register = 0xFFFFFFFF
    for byte in content:
        register ^= byte
        for _ in range(8):
            register = (register >> 1) ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def expected_content(kind: str) -> dict[str, tuple[bytes, bytes]]:
    """Array -> what its two files hold, `digest` and `committed` included."""
    literal = TEXT_CONTENT | RESIDUAL_CONTENT[kind]
    by_row = {name: (bytes.fromhex(a), bytes.fromhex(b)) for name, (a, b) in literal.items()}
    # of the last chunk only the first of its two rows is there
    digested = {name: (whole, half[: len(half) // 2]) for name, (whole, half) in by_row.items()}
    digested["documents"] = ('[[1, {"title": "é"}]]\n[]'.encode(), b"[]")
    checksums = [[crc32c(part) for part in parts] for parts in (digested | STATS_CONTENT).values()]
    first, last = (struct.pack(f"<{len(c)}I", *c) for c in zip(*checksums, strict=True))
    return by_row | STATS_CONTENT | {"digest": (first, last), "committed": (b"\1", b"\1")}


@pytest.fixture(params=CODEC_RECORDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind of codec."""
    found: str = request.param
    return found


@pytest.fixture
def tiny_store(kind: str, tmp_path: Path) -> Path:
    """The store that the literals above describe."""
    spec = StoreSpec.from_dict(RECORD | {"codec": CODEC_RECORDS[kind]})
    path = tmp_path / "tiny.zarr"
    with StoreWriter.create(path, without_rows(spec)) as writer:
        for chunk, rows in enumerate(ROWS):
            writer.write_rows(chunk, rows)
        writer.commit_rows(spec)
        for chunk, rows in enumerate(ROWS):
            x_LND = list(np.array(CHUNKS[chunk], np.float32).transpose(1, 0, 2).copy())
            writer.write_chunk(chunk, rows, *encoded_chunk(spec, chunk, x_LND, rows))
    return path


def uncompressed(file: Path, compressor: Any) -> bytes:
    """Content of a chunk's file, its checksum compared and its compression undone."""
    content = file.read_bytes()
    assert struct.unpack("<I", content[-4:]) == (crc32c(content[:-4]),)
    return bytes(compressor.decode(content[:-4]))


def test_the_checksum_is_crc32c() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert "`123456789` it is `e3069283`" in DOCUMENT


def test_every_byte_of_every_chunk(tiny_store: Path, kind: str) -> None:
    for array, contents in expected_content(kind).items():
        blosc = kind == "bf16" and array.endswith("codes")
        compressor = numcodecs.Blosc() if blosc else numcodecs.Zstd()
        for chunk, content in enumerate(contents):
            found = uncompressed(chunk_file(tiny_store, array, chunk), compressor)
            assert found.hex() == content.hex(), f"{array}, chunk {chunk}"


def test_there_are_no_other_files(tiny_store: Path, kind: str) -> None:
    arrays = expected_content(kind)
    groups = ("", "residuals/", "residuals/0/", "residuals/2/", "stats/")
    expected = {f"{group}zarr.json" for group in groups} | {f"{name}/zarr.json" for name in arrays}
    for name in arrays:
        rank = len(json.loads((tiny_store / name / "zarr.json").read_text())["shape"])
        expected |= {f"{name}/c/{chunk}" + "/0" * (rank - 1) for chunk in range(2)}
    assert set(store_bytes(tiny_store)) == expected


def test_metadata_of_arrays(tiny_store: Path, kind: str) -> None:
    arrays = expected_content(kind)
    n_digests = len(arrays) - 2
    digest = ("uint32", [2, n_digests], [1, n_digests], [BYTES, ZSTD])
    metadata = METADATA | {"digest": digest}
    for name in arrays:
        last = name.split("/")[-1] if name.startswith("residuals/") else name
        key = f"{kind} codes" if last == "codes" else last
        dtype, shape, chunk_shape, codecs = metadata[key]
        found = json.loads((tiny_store / name / "zarr.json").read_text())
        expected = {
            "zarr_format": 3,
            "node_type": "array",
            "data_type": dtype,
            "shape": shape,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk_shape}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": "" if dtype == "string" else 0,
            "codecs": [*codecs, {"name": "crc32c"}],
        }
        assert {key: found[key] for key in expected} == expected, name


def test_metadata_of_the_group(tiny_store: Path, kind: str) -> None:
    found = json.loads((tiny_store / "zarr.json").read_text())
    assert (found["zarr_format"], found["node_type"]) == (3, "group")
    record = RECORD | {"codec": CODEC_RECORDS[kind]}
    line = json.dumps(found["attributes"][ATTRIBUTE], ensure_ascii=False)  # keys as they come
    assert found["attributes"] == {ATTRIBUTE: record, CHECKSUM: crc32c(line.encode())}


def test_the_tiny_store_reads_back(tiny_store: Path) -> None:
    reader = StoreReader(tiny_store)
    assert list(reader.verify()) == [(0, None), (1, None)]
    for chunk, tokens in enumerate(CHUNKS):
        np.testing.assert_array_equal(reader.residuals(chunk, (0, 2)), np.array(tokens))
        assert reader.rows(chunk).documents == ROWS[chunk].documents


# what the document shows


def section(title: str) -> str:
    """Text of the document from a heading to the next of the same level."""
    found = re.search(rf"^(#+) {title}\n(.*?)(?=^\1 |\Z)", DOCUMENT, re.DOTALL | re.MULTILINE)
    assert found is not None, f"no section {title}"
    return found[2]


def first_column(text: str) -> list[str]:
    """Names in the first column of a table."""
    cells = re.findall(r"^\| ([^|]*`[^|]*) \|", text, re.MULTILINE)
    return [name for cell in cells for name in re.findall(r"`([^`]*)`", cell)]


def test_the_document_lists_every_attribute() -> None:
    listed = first_column(section("Attributes"))
    assert sorted(listed) == sorted(f.name for f in dataclasses.fields(StoreSpec))


def test_the_document_lists_every_array() -> None:
    listed = set(first_column(section("Arrays").split("The codecs of an array")[0]))
    stored = {
        re.sub(r"^residuals/\d+", "residuals/{ℓ}", array.name)
        for codec in VARIANTS.values()
        for array in stored_arrays(store_spec(codec=codec))
    }
    assert listed == stored


def test_the_document_lists_every_codec() -> None:
    assert re.findall(r"^### (\w+)$", section("Codecs"), re.MULTILINE) == list(CODECS)


def test_the_documents_example_of_nibble_planes() -> None:
    cells = {
        name: [cell.strip().replace("−", "-") for cell in rest.split("|")]
        for name, rest in re.findall(r"^\| (q|u|low|high) \|(.*)\|$", DOCUMENT, re.MULTILINE)
    }
    q = [int(cell) for cell in cells["q"]]
    assert [int(cell, 16) for cell in cells["u"]] == [(value + 8) % 256 for value in q]
    codec = CODECS["delta"](step=1e-3)  # type: ignore[call-arg]
    codes = codec.encode([np.array([q], np.float32)]).layers[0]
    for plane in ("low", "high"):
        assert codes[plane].tobytes().hex(" ") == " ".join(filter(None, cells[plane]))


@pytest.fixture(scope="module")
def read_chunk() -> Callable[[Path, int], dict[int, Float32]]:
    """The reader in the document's appendix."""
    blocks = re.findall(r"```python\n(.*?)```", section("Appendix: a reader"), re.DOTALL)
    assert len(blocks) == 1
    namespace: dict[str, Any] = {}
    exec(blocks[0], namespace)
    reader: Callable[[Path, int], dict[int, Float32]] = namespace["read_chunk"]
    return reader


@pytest.mark.parametrize("codec", VARIANTS.values(), ids=VARIANTS.keys())
def test_the_documents_reader_reads_every_codec(
    codec: Any, read_chunk: Callable[[Path, int], dict[int, Float32]], tmp_path: Path
) -> None:
    reader = fill_store(tmp_path / "s.zarr", store_spec(codec=codec))
    layers = reader.spec.layers
    for chunk in reader.committed:
        residuals = read_chunk(Path(reader.path), chunk)
        assert tuple(residuals) == layers
        expected_NLD = reader.residuals(chunk, layers)
        for index, layer in enumerate(layers):
            found_RTD = residuals[layer]
            assert found_RTD.dtype == np.float32
            assert found_RTD.shape == (*reader.rows(chunk).tokens_RT.shape, reader.spec.width)
            np.testing.assert_array_equal(
                found_RTD.reshape(-1, reader.spec.width), expected_NLD[:, index]
            )


def test_the_documents_reader_refuses_what_it_must(
    read_chunk: Callable[[Path, int], dict[int, Float32]], tmp_path: Path
) -> None:
    path = Path(fill_store(tmp_path / "s.zarr", store_spec(), chunks=(0,)).path)
    assert set(read_chunk(path, 0)) == {1, 2, 4}
    for chunk in (1, 3, -1):
        with pytest.raises(ValueError, match=f"chunk {chunk} is not committed"):
            read_chunk(path, chunk)
    metadata = (path / "zarr.json").read_text()
    newer = metadata.replace('"format_version": 1', '"format_version": 2')
    assert newer != metadata
    (path / "zarr.json").write_text(newer)
    with pytest.raises(ValueError, match="newer version"):
        read_chunk(path, 0)
