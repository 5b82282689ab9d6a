"""The checksum that JSON objects on disk carry, so that a changed number in them is noticed."""

from __future__ import annotations

import json
from typing import Any

import google_crc32c


def json_checksum(value: Any) -> int:
    """CRC-32C of a value as `json.dumps` writes it on one line, in UTF-8, keys in their order.

    Blanks and line breaks of the file it is in do not matter, the order of its keys does.
    """
    text = json.dumps(value, ensure_ascii=False)
    return int(google_crc32c.value(text.encode("utf-8", "surrogatepass")))
