"""One chunk of one array straight from and to its file, as the store's zarr codecs have it.

It is what zarr does (compress, checksum, temporary file, rename, and back), in the calling
thread: half the time, and threads that work side by side do not wait for zarr's event loop.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numcodecs
import numpy as np
from numpy.typing import NDArray

_CRC = struct.Struct("<I")
_COMPRESSORS: Mapping[str, Any] = {
    "zstd": numcodecs.Zstd(level=1),
    "shuffled-zstd": numcodecs.Blosc(cname="zstd", clevel=1, shuffle=numcodecs.Blosc.SHUFFLE),
}


def write_chunk_file(
    file: Path, values: NDArray[Any], shape: tuple[int, ...], compression: str
) -> int:
    """Write a chunk of `shape`, whole or not at all; returns the file's size.

    `values` may have fewer rows than the chunk, at the end of an array; zeros follow them.
    """
    if values.shape != shape:
        whole = np.zeros(shape, values.dtype)
        whole[: len(values)] = values
        values = whole
    little = values.dtype.newbyteorder("<")
    body = _COMPRESSORS[compression].encode(np.ascontiguousarray(values, little))
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{uuid.uuid4().hex}.partial")
    try:
        with temporary.open("wb") as out:
            out.write(body)
            out.write(_CRC.pack(google_crc32c.value(bytes(body))))
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return len(body) + _CRC.size


def read_chunk_file(
    file: Path, dtype: str, shape: tuple[int, ...], compression: str
) -> NDArray[Any]:
    """The values of a chunk of `shape`; ValueError says what is wrong with the file."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise ValueError("the file is missing") from None
    except OSError as error:
        raise ValueError(f"the file cannot be read: {error.strerror}") from error
    if len(content) < _CRC.size:
        raise ValueError(f"the file has only {len(content)} bytes")
    body = np.frombuffer(content, np.uint8)[: -_CRC.size]
    if google_crc32c.value(body) != _CRC.unpack(content[-_CRC.size :])[0]:
        raise ValueError("its checksum does not fit its content")
    try:
        decoded = _COMPRESSORS[compression].decode(body)
    except RuntimeError as error:
        raise ValueError(f"it cannot be decompressed: {error}") from error
    expected = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if len(decoded) != expected:
        raise ValueError(f"it holds {len(decoded)} bytes, expected {expected}")
    return np.frombuffer(decoded, np.dtype(dtype).newbyteorder("<")).reshape(shape)
