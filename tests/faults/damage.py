"""Damage done to files in place and undone again, and the time that it may take to notice."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple

_BITS = (0, 1, 2, 3, 4, 5, 6, 7)
_TEXT_BITS = (0, 1, 2, 3, 4)  # they make one character of another; the higher ones make none at all


class Damage(NamedTuple):
    """One file, and what it holds instead of what was written; None: it is gone."""

    file: Path
    content: bytes | None
    what: str


def flips(file: Path, every: int = 1) -> Iterator[Damage]:
    """Bytes with one bit of them turned over, of which the next byte has the next one."""
    content = file.read_bytes()
    bits = _TEXT_BITS if file.suffix in (".json", ".jsonl") else _BITS
    for at in range(0, len(content), every):
        changed = bytearray(content)
        changed[at] ^= 1 << bits[at % len(bits)]
        yield Damage(file, bytes(changed), f"byte {at} of {file.name} flipped")


def cuts(file: Path, every: int = 1) -> Iterator[Damage]:
    """Cut off at every length, 0 among them; then gone."""
    content = file.read_bytes()
    for length in range(0, len(content), every):
        yield Damage(file, content[:length], f"{file.name} cut to {length} bytes")
    yield Damage(file, None, f"{file.name} removed")


@contextmanager
def done(*damages: Damage) -> Iterator[None]:
    """The damage, for as long as the block lasts."""
    before = {damage.file: damage.file.read_bytes() for damage in damages}
    try:
        for damage in damages:
            if damage.content is None:
                damage.file.unlink()
            else:
                damage.file.write_bytes(damage.content)
        yield
    finally:
        for file, content in before.items():
            file.write_bytes(content)


def swapped(first: Path, second: Path) -> tuple[Damage, Damage]:
    """Two files in each other's place."""
    what = f"{first} and {second} swapped"
    return Damage(first, second.read_bytes(), what), Damage(second, first.read_bytes(), what)


def compact(folder: Path) -> None:
    """Take the blanks out of all JSON files below a folder: bytes that say nothing."""
    for file in folder.rglob("*.json"):
        content = json.dumps(json.loads(file.read_bytes()), separators=(",", ":"))
        file.write_text(content)


@contextmanager
def no_hang(seconds: int) -> Iterator[None]:
    """AssertionError where the block takes longer."""

    def late(_: int, frame: FrameType | None) -> None:
        raise AssertionError(f"still at it after {seconds} s, in {frame}")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
