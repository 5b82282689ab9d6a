"""What the tests with real faults share; they run when they are named: `make test-faults`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.jobs import STORE, harvesting, reference, training
from tests.faults.kills import Folders
from tests.faults.place import place
from tests.faults.tally import pytest_terminal_summary, tally

__all__ = ["place", "pytest_terminal_summary", "tally"]


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, tiny_corpus: Path) -> Path:
    """A folder with a store and runs; not to be changed."""
    folder = tmp_path_factory.mktemp("home")
    reference(folder, harvesting(tiny_model_dir, tiny_corpus))
    reference(folder, training(folder / STORE, epochs=1))
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Makes empty folders."""
    return lambda: tmp_path_factory.mktemp("job")
