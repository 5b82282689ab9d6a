"""Where things are inside a store: array names, shapes and how each is compressed.

Shared by the writer and the reader. Letters: R rows, T positions in a row, L layers, D width.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, BloscShuffle, Crc32cCodec, ZstdCodec

from stores.codecs import ArrayLayout
from stores.errors import NewerFormatError, NotAStoreError
from stores.spec import FORMAT_VERSION, Record, StoreSpec

ATTRIBUTE = "routesae_store"
ROW_ARRAYS = ("tokens", "lengths", "documents")
STAT_ARRAYS = ("count", "sum", "sum_squares", "distortion")
Rows = NDArray[Any]


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


def residual_array(layer: int, layout: ArrayLayout) -> str:
    """Path of one array of one layer."""
    return f"residuals/{layer}/{layout.name}"


def residual_arrays(spec: StoreSpec) -> Iterator[tuple[int, ArrayLayout]]:
    """(layer, array) in the order of the digests."""
    for layer in spec.layers:
        for layout in spec.codec.layout(spec.width):
            yield layer, layout


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


def create_arrays(group: zarr.Group, spec: StoreSpec) -> None:
    """Make every array of an empty store, for `spec.rows` rows."""
    by_row = (spec.rows, spec.chunk_rows)
    _create(group, "tokens", "int32", by_row, (spec.context,))
    _create(group, "lengths", "int32", by_row)
    _create(group, "documents", "string", by_row)
    for layer, layout in residual_arrays(spec):
        inner = (spec.context, layout.per_token) if layout.per_token else (spec.context,)
        name = residual_array(layer, layout)
        _create(group, name, layout.dtype, by_row, inner, layout.compression)
    by_chunk, n_layers = (spec.chunks, 1), len(spec.layers)
    _create(group, "stats/count", "int64", by_chunk)
    _create(group, "stats/sum", "float32", by_chunk, (n_layers, spec.width))
    _create(group, "stats/sum_squares", "float64", by_chunk, (n_layers,))
    _create(group, "stats/distortion", "float64", by_chunk, (n_layers,))
    _create(group, "digest", "uint32", by_chunk, (len(digested(spec)),))
    _create(group, "committed", "uint8", by_chunk)


def _create(
    group: zarr.Group,
    name: str,
    dtype: str,
    leading: tuple[int, int],
    inner: tuple[int, ...] = (),
    compression: str = "zstd",
) -> None:
    length, chunk_length = leading
    compressor: Any = {
        "zstd": ZstdCodec(level=1),
        "shuffled-zstd": BloscCodec(cname="zstd", clevel=1, shuffle=BloscShuffle.shuffle),
    }[compression]
    group.create_array(
        name,
        shape=(length, *inner),
        chunks=(chunk_length, *inner),
        dtype=dtype,
        compressors=[compressor, Crc32cCodec()],
        fill_value="" if dtype == "string" else 0,
        config={"write_empty_chunks": True},
    )


def read_spec(path: Path) -> StoreSpec:
    """The description of the store at `path`; NotAStoreError or NewerFormatError."""
    try:
        record = json.loads((path / "zarr.json").read_text())["attributes"][ATTRIBUTE]
    except (FileNotFoundError, NotADirectoryError):
        found = "nothing there" if not path.exists() else "something that is not a zarr v3 group"
        raise NotAStoreError(
            f"{path}: expected an activation store, found {found}; make one with `routesae harvest`"
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        raise NotAStoreError(
            f"{path}: expected an activation store; its zarr.json lacks a readable "
            f"attribute {ATTRIBUTE!r} ({error})"
        ) from None
    return _parse_spec(path, record)


def _parse_spec(path: Path, record: Any) -> StoreSpec:
    version = record.get("format_version") if isinstance(record, dict) else None
    if type(version) is not int:
        raise NotAStoreError(f"{path}: expected a store's format version, found {version!r}")
    if version > FORMAT_VERSION:
        raise NewerFormatError(path, version, FORMAT_VERSION)
    try:
        return StoreSpec.from_dict(record)
    except ValueError as error:
        raise NotAStoreError(f"{path}: {error}") from error


def set_spec(group: zarr.Group, spec: StoreSpec) -> None:
    """Replace the description, in one atomic step."""
    attributes: Record = {ATTRIBUTE: spec.to_dict()}
    group.update_attributes(attributes)


def resize(group: zarr.Group, spec: StoreSpec) -> None:
    """Give every array the length that `spec` implies."""
    by_row = (*ROW_ARRAYS, *(residual_array(*pair) for pair in residual_arrays(spec)))
    by_chunk = (*(f"stats/{name}" for name in STAT_ARRAYS), "digest", "committed")
    for length, names in ((spec.rows, by_row), (spec.chunks, by_chunk)):
        for array in _arrays(group, names):
            if array.shape[0] != length:
                array.resize((length, *array.shape[1:]))


def _arrays(group: zarr.Group, names: Iterable[str]) -> Iterator[zarr.Array[Any]]:
    for name in names:
        array = group[name]
        assert isinstance(array, zarr.Array)
        yield array


def chunk_file(path: Path, array: str, chunk: int) -> Path:
    """The file that holds an array's values of one chunk."""
    rank = len(json.loads((path / array / "zarr.json").read_text())["shape"])
    return path.joinpath(array, "c", str(chunk), *["0"] * (rank - 1))


def committed_chunks(path: Path, spec: StoreSpec) -> list[int]:
    """Chunks whose last write is down, ascending: those with an element file in `committed`."""
    folder = path / "committed" / "c"
    names = (entry.name for entry in folder.iterdir()) if folder.is_dir() else iter(())
    found = sorted(int(name) for name in names if name.isdigit())
    return [chunk for chunk in found if chunk < spec.chunks]
