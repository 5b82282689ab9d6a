"""Counts faults, and what became of them, over all tests and xdist's workers.

A test takes the fixture `tally` and calls `tally.add(kind, tried=…, survived=…, lost=…)`; the sums
are a table at the end of the run, the one in docs/RELIABILITY.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import pytest

_PROPERTY = "fault"


class Count(NamedTuple):
    """Of one kind of fault."""

    tried: int = 0
    survived: int = 0
    """After which everything was as promised."""
    lost: int = 0
    """Chunks, checkpoints or results that were complete before it and were not the same after."""


class Tally:
    """The faults of one test."""

    def __init__(self, properties: list[tuple[str, object]]) -> None:
        self._properties = properties  # pytest carries them to where the summary is made

    def add(self, kind: str, *, tried: int = 1, survived: int = 1, lost: int = 0) -> None:
        """Count faults of a kind, which is a line of the table."""
        assert 0 <= survived <= tried
        self._properties.append((_PROPERTY, (kind, tried, survived, lost)))


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    """Counts the faults that a test tries."""
    return Tally(request.node.user_properties)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table, also of tests that failed after they had counted."""
    reports = [each for found in terminalreporter.stats.values() for each in found]
    counts = total(
        value
        for report in reports
        if getattr(report, "when", None) == "call"
        for name, value in report.user_properties
        if name == _PROPERTY
    )
    if not counts:
        return
    terminalreporter.section("faults")
    width = max(map(len, counts))
    terminalreporter.write_line(f"{'':{width}}  {'tried':>9} {'survived':>9} {'lost':>9}")
    for kind, count in sorted(counts.items()):
        terminalreporter.write_line(
            f"{kind:{width}}  {count.tried:9,} {count.survived:9,} {count.lost:9,}"
        )


def total(faults: Iterable[tuple[str, int, int, int]]) -> dict[str, Count]:
    """Sums by kind."""
    counts: dict[str, Count] = {}
    for kind, *numbers in faults:
        sums = map(sum, zip(counts.get(kind, Count()), numbers, strict=True))
        counts[kind] = Count(*sums)
    return counts
