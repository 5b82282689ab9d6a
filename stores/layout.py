"""Where things are inside a store: array names, shapes and how each is compressed.

Shared by the writer and the reader. Letters: R rows, T positions in a row, L layers, D width.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.buffer import Buffer
from zarr.buffer import cpu
from zarr.codecs import BloscCodec, BloscShuffle, Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore

from stores.chunk_files import STRING
from stores.codecs import ArrayLayout
from stores.errors import NewerFormatError, NotAStoreError
from stores.json_checksum import json_checksum
from stores.place import Place
from stores.places import Where, as_place
from stores.spec import FORMAT_VERSION, Record, StoreSpec

ATTRIBUTE = "routesae_store"
CHECKSUM = "routesae_store_crc32c"
_DESCRIPTION = "zarr.json"
ROW_ARRAYS = ("tokens", "lengths", "documents")
STAT_ARRAYS = ("count", "sum", "sum_squares", "distortion")
Rows = NDArray[Any]
_DTYPES = {STRING: "StringDType()"}  # what numpy calls it
_METADATA_ERRORS = (KeyError, TypeError, ValueError)  # of zarr, reading a malformed zarr.json


class TokenRows(NamedTuple):
    """What a chunk holds before its residuals: the text as the model sees it."""

    tokens_RT: NDArray[np.int32]
    lengths_R: NDArray[np.int32]
    """Real tokens in each row, BOS included; what follows is padding."""
    documents: list[str]
    """For each row a JSON list of [position, metadata] of the documents that begin in it."""

    def counted_RT(self) -> NDArray[np.bool_]:
        """True at the positions that statistics, training and metrics use.

        Padding is left out, and so is the first token of a row, whose norm is tens of times
        that of the others whatever it is.
        """
        position_T = np.arange(self.tokens_RT.shape[1])
        counted: NDArray[np.bool_] = (position_T > 0) & (position_T < self.lengths_R[:, None])
        return counted


@dataclass(frozen=True)
class ChunkStats:
    """Sums over the counted positions of one chunk."""

    count: NDArray[np.int64]
    """Number of positions, shape ()."""
    sum: NDArray[np.float32]
    """Of the residuals, shape (L, D)."""
    sum_squares: NDArray[np.float64]
    """Of the residuals over positions and channels, shape (L,)."""
    distortion: NDArray[np.float64]
    """Of the codec's squared error over the variance, per position, shape (L,)."""


def row_values(rows: TokenRows) -> tuple[Rows, Rows, Rows]:
    """The arrays of ROW_ARRAYS, in that order."""
    return rows.tokens_RT, rows.lengths_R, np.array(rows.documents, dtype=object)


class StoredArray(NamedTuple):
    """One array of a store; its first axis is rows, or chunks with one to a zarr chunk."""

    name: str
    dtype: str
    inner: tuple[int, ...] = ()
    """Shape after the first axis."""
    by: Literal["row", "chunk"] = "row"
    compression: str = "zstd"

    def shape(self, spec: StoreSpec) -> tuple[int, ...]:
        """Shape in a store with the row counts of `spec`."""
        return (spec.rows if self.by == "row" else spec.chunks, *self.inner)

    def chunk_key(self, chunk: int) -> str:
        """The file that holds the values of one chunk."""
        return "/".join([self.name, "c", str(chunk), *["0"] * len(self.inner)])

    def chunk_shape(self, spec: StoreSpec) -> tuple[int, ...]:
        """Shape of a zarr chunk, which is one file."""
        return (spec.chunk_rows if self.by == "row" else 1, *self.inner)


def residual_array(layer: int, layout: ArrayLayout) -> str:
    """Path of one array of one layer."""
    return f"residuals/{layer}/{layout.name}"


def residual_arrays(spec: StoreSpec) -> Iterator[tuple[int, ArrayLayout]]:
    """(layer, array) in the order of the digests."""
    for layer in spec.layers:
        for layout in spec.codec.layout(spec.width):
            yield layer, layout


def stored_arrays(spec: StoreSpec) -> Iterator[StoredArray]:
    """Every array of a store; all but the last two have a checksum in `digest`, in this order."""
    yield StoredArray("tokens", "int32", (spec.context,))
    yield StoredArray("lengths", "int32")
    yield StoredArray("documents", STRING)
    for layer, layout in residual_arrays(spec):
        inner = (spec.context, layout.per_token) if layout.per_token else (spec.context,)
        name = residual_array(layer, layout)
        yield StoredArray(name, layout.dtype, inner, compression=layout.compression)
    n_layers = len(spec.layers)
    yield StoredArray("stats/count", "int64", (), "chunk")
    yield StoredArray("stats/sum", "float32", (n_layers, spec.width), "chunk")
    yield StoredArray("stats/sum_squares", "float64", (n_layers,), "chunk")
    yield StoredArray("stats/distortion", "float64", (n_layers,), "chunk")
    yield StoredArray("digest", "uint32", (len(digested(spec)),), "chunk")
    yield StoredArray("committed", "uint8", (), "chunk")


def digested(spec: StoreSpec) -> tuple[str, ...]:
    """Names of the arrays in the order in which `digest` holds their checksums."""
    residuals = (residual_array(*pair) for pair in residual_arrays(spec))
    return (*ROW_ARRAYS, *residuals, *(f"stats/{name}" for name in STAT_ARRAYS))


def checksum(values: Rows) -> int:
    """CRC-32C of an array's little-endian bytes, or of strings as UTF-8 lines."""
    if values.dtype.kind in "OT":
        return int(google_crc32c.value("\n".join(map(str, values)).encode()))
    # the C implementation takes any contiguous buffer
    return int(google_crc32c.value(np.ascontiguousarray(values).view(np.uint8).reshape(-1)))


def new_store(spec: StoreSpec) -> dict[str, bytes]:
    """The files of an empty store with arrays for `spec.rows` rows."""
    files: dict[str, Buffer] = {}
    group = zarr.open_group(MemoryStore(files), mode="w", zarr_format=3)
    compressors: dict[str, Any] = {
        "zstd": ZstdCodec(level=1),
        "shuffled-zstd": BloscCodec(cname="zstd", clevel=1, shuffle=BloscShuffle.shuffle),
    }
    for stored in stored_arrays(spec):
        group.create_array(
            stored.name,
            shape=stored.shape(spec),
            chunks=stored.chunk_shape(spec),
            dtype=stored.dtype,
            compressors=[compressors[stored.compression], Crc32cCodec()],
            fill_value="" if stored.dtype == STRING else 0,
            config={"write_empty_chunks": True},
        )
    _set_spec(group, spec)
    return {key: content.to_bytes() for key, content in files.items()}


def check_arrays(place: Place, spec: StoreSpec) -> None:
    """NotAStoreError where an array is not what `spec` says. It may be longer."""
    try:
        group = zarr.open_group(place.zarr_store(), mode="r", zarr_format=3)
    except _METADATA_ERRORS as error:
        raise NotAStoreError(f"{place}: expected a zarr v3 group: {error}") from error
    check = partial(_check_array, place, group, spec)
    with ThreadPoolExecutor(place.parallel) as pool:
        for _ in pool.map(check, stored_arrays(spec)):
            pass


def _check_array(place: Place, group: zarr.Group, spec: StoreSpec, stored: StoredArray) -> None:
    where = f"{place}: array {stored.name}"
    try:
        array = group[stored.name]
    except _METADATA_ERRORS as error:
        raise NotAStoreError(f"{where} cannot be opened: {error!r}") from error
    if not isinstance(array, zarr.Array):
        raise NotAStoreError(f"{where}: found a group")
    length, *inner = stored.shape(spec)
    expected = (
        *(_DTYPES.get(stored.dtype, stored.dtype), tuple(inner), stored.chunk_shape(spec)),
        "/",  # with another one zarr finds no file, and reads zeros
    )
    encoding = getattr(array.metadata, "chunk_key_encoding", None)
    separator = getattr(encoding, "separator", None)
    found = (str(array.dtype), array.shape[1:], array.chunks, separator)
    if found != expected or array.shape[0] < length:
        raise NotAStoreError(
            f"{where}: expected at least {length} of (dtype, shape, chunks, separator) {expected}, "
            f"found {array.shape[0]} of {found}"
        )


def read_spec(where: Where) -> StoreSpec:
    """The description of the store at a path or URL; NotAStoreError or NewerFormatError."""
    place = as_place(where)
    try:
        content = place.read(_DESCRIPTION)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        found = "something that is not a zarr v3 group" if place.exists() else "nothing there"
        raise NotAStoreError(
            f"{place}: expected an activation store, found {found}; "
            "make one with `routesae harvest`"
        ) from None
    try:
        attributes = json.loads(content)["attributes"]
        record = attributes[ATTRIBUTE]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise NotAStoreError(
            f"{place}: expected an activation store; its zarr.json lacks a readable "
            f"attribute {ATTRIBUTE!r} ({error})"
        ) from None
    return _parse_spec(place, record, attributes.get(CHECKSUM))


def _parse_spec(path: Place, record: Any, checksum: Any) -> StoreSpec:
    version = record.get("format_version") if isinstance(record, dict) else None
    if type(version) is not int or version < 1:
        raise NotAStoreError(f"{path}: expected a store's format version, found {version!r}")
    if version > FORMAT_VERSION:
        raise NewerFormatError(path, version, FORMAT_VERSION)
    if checksum not in (None, json_checksum(record)):
        raise NotAStoreError(
            f"{path}: the description in its zarr.json does not fit its checksum {checksum!r}: it "
            f"was damaged, or changed by hand (who is sure of it removes {CHECKSUM!r} there)"
        )
    try:
        return StoreSpec.from_dict(record)
    except ValueError as error:
        raise NotAStoreError(f"{path}: {error}") from error


def grow(place: Place, spec: StoreSpec) -> None:
    """Give every array the length that `spec` implies, then replace the description.

    Both in steps that are atomic and durable, after all that was written before.
    """
    place.sync()
    keys = [_DESCRIPTION, *(f"{stored.name}/{_DESCRIPTION}" for stored in stored_arrays(spec))]
    before = {key: read() for key, read in zip(keys, place.fetch(keys), strict=True)}
    files: dict[str, Buffer] = {
        key: cpu.Buffer.from_bytes(content) for key, content in before.items()
    }
    group = zarr.open_group(MemoryStore(files), mode="r+", zarr_format=3)
    for stored in stored_arrays(spec):
        array = group[stored.name]
        assert isinstance(array, zarr.Array)
        if array.shape != stored.shape(spec):
            array.resize(stored.shape(spec))
    _set_spec(group, spec)
    for key in reversed(keys):  # the description last
        if (content := files[key].to_bytes()) != before[key]:
            place.write(key, content, durable=True)


def _set_spec(group: zarr.Group, spec: StoreSpec) -> None:
    record = spec.to_dict()
    attributes: Record = {ATTRIBUTE: record, CHECKSUM: json_checksum(record)}
    group.update_attributes(attributes)


def committed_chunks(where: Where, spec: StoreSpec) -> list[int]:
    """Chunks whose last write is down, ascending: those with an element file in `committed`."""
    found = sorted(int(name) for name in as_place(where).names("committed/c") if name.isdigit())
    return [chunk for chunk in found if chunk < spec.chunks]
