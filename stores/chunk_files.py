"""One chunk of one array to and from the bytes of its file, as the store's zarr codecs have it.

It is what zarr does (compress, checksum, and back), in the calling thread: half the time, and
threads that work side by side do not wait for zarr's event loop.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
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
_STRINGS = numcodecs.VLenUTF8()
STRING = "string"
"""What the layout calls the type of an array of texts."""


def encode_chunk(
    values: NDArray[Any], dtype: str, shape: tuple[int, ...], compression: str
) -> bytes:
    """The file of a chunk of `shape`.

    `values` may have fewer rows than the chunk, at the end of an array; fill values follow them.
    """
    if values.shape != shape:
        whole = np.full(shape, "", object) if dtype == STRING else np.zeros(shape, values.dtype)
        whole[: len(values)] = values
        values = whole
    if dtype == STRING:
        raw = _STRINGS.encode(values)
    else:
        assert values.dtype == np.dtype(dtype)
        raw = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    body: bytes = _COMPRESSORS[compression].encode(raw)
    return body + _CRC.pack(google_crc32c.value(body))


def decode_chunk(
    content: bytes, dtype: str, shape: tuple[int, ...], compression: str
) -> NDArray[Any]:
    """The values of a chunk of `shape`; ValueError says what is wrong with the file."""
    if len(content) < _CRC.size:
        raise ValueError(f"the file has only {len(content)} bytes")
    body = np.frombuffer(content, np.uint8)[: -_CRC.size]
    if google_crc32c.value(body) != _CRC.unpack(content[-_CRC.size :])[0]:
        raise ValueError("its checksum does not fit its content")
    try:
        decoded = _COMPRESSORS[compression].decode(body)
        texts = _STRINGS.decode(decoded) if dtype == STRING else None
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"it cannot be decompressed: {error}") from error
    if texts is not None:
        if texts.shape != shape:
            raise ValueError(f"it holds {len(texts)} texts, expected {shape[0]}")
        return np.asarray(texts)
    expected = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if len(decoded) != expected:
        raise ValueError(f"it holds {len(decoded)} bytes, expected {expected}")
    return np.frombuffer(decoded, np.dtype(dtype).newbyteorder("<")).reshape(shape)
