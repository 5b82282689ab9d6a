"""JSON files and lines that appear whole and carry a checksum, so that a changed number is noticed.

The checksum is the last key, `crc32c`, over everything before it. What has none is taken as it is:
older files, and files that somebody changed on purpose and took it out of.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from routesae_cache.whole_files import whole_file
from stores.json_checksum import json_checksum

CHECKSUM = "crc32c"


class DamagedJsonError(ValueError):
    """What is not JSON, or not what its checksum was made of."""


def write_json(path: Path, value: Any, *, checked: bool = True) -> None:
    """Write a JSON file whole.

    Args:
        checked: with a checksum, if it is an object; not in files that other programs read.
    """
    if checked and isinstance(value, dict):
        value = with_checksum(value)
    content = (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
    with whole_file(path, len(content)) as temporary:
        temporary.write_bytes(content)


def read_json(path: Path) -> Any:
    """What `write_json` wrote; DamagedJsonError names the file."""
    try:
        return parse_json(path.read_bytes())
    except DamagedJsonError as error:
        raise DamagedJsonError(f"{path}: {error}") from error


def parse_json(content: bytes) -> Any:
    """A value, its checksum compared and taken off; DamagedJsonError."""
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedJsonError(f"expected JSON: {error}") from error
    checksum = value.pop(CHECKSUM, None) if isinstance(value, dict) else None
    if checksum not in (None, json_checksum(value)):
        raise DamagedJsonError(
            f"it does not fit its checksum {checksum!r}: it was damaged, or changed by hand "
            f"(who is sure of it removes {CHECKSUM!r} from it)"
        )
    return value


def json_line(record: Mapping[str, Any]) -> bytes:
    """A record on a line of its own, with its checksum."""
    return json.dumps(with_checksum(record)).encode() + b"\n"


def with_checksum(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record and its checksum."""
    return {**record, CHECKSUM: json_checksum(record)}
