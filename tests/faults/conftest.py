"""What the tests with real faults share; they run when they are named: `make test-faults`."""

from tests.faults.tally import pytest_terminal_summary, tally

__all__ = ["pytest_terminal_summary", "tally"]
