"""SIGKILL at many instants of the other long commands: a restart ends as if nothing had been."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.jobs import RUNS, STORE, experimenting, mining, recoding, reference, training
from tests.faults.kills import (
    Folders,
    at_random_files,
    at_random_instants,
    try_kills,
    was_killed,
)
from tests.faults.processes import SignalAtFile, finished, running
from tests.faults.tally import Tally


def test_recode(folders: Folders, home: Path, tally: Tally) -> None:
    job = recoding(home / STORE)
    expected, seconds = reference(folders(), job)
    try_kills("recode", job, expected, at_random_instants(seconds, 4), 15, folders, tally)
    at_files = at_random_files(600, 5)
    try_kills("recode, at its files", job, expected, at_files, 15, folders, tally)


def test_train(folders: Folders, home: Path, tally: Tally) -> None:
    job = training(home / STORE, epochs=6)
    expected, seconds = reference(folders(), job)
    try_kills("train", job, expected, at_random_instants(seconds, 6), 15, folders, tally)
    at_files = at_random_files(100, 7)
    try_kills("train, at its files", job, expected, at_files, 15, folders, tally)


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_train_before_it_has_begun(at: int, home: Path, tmp_path: Path, tally: Tally) -> None:
    """While the description of a run is written, by which it is known."""
    job = training(home / STORE, epochs=1)
    job.prepare(tmp_path)
    dies = SignalAtFile(r"/config\.json", at)
    with running(tmp_path, *job.arguments, first=dies) as command:
        assert was_killed(command)
    finished(tmp_path, *job.arguments)
    assert job.result(tmp_path) == job.result(home)
    tally.add("train, at its files")


def test_contexts(folders: Folders, home: Path, tiny_model_dir: Path, tally: Tally) -> None:
    job = mining(home / STORE, tiny_model_dir, home / RUNS)
    expected, seconds = reference(folders(), job)
    try_kills("contexts", job, expected, at_random_instants(seconds, 8), 10, folders, tally)
    at_files = at_random_files(30, 9)
    try_kills("contexts, at its files", job, expected, at_files, 10, folders, tally)


def test_pipeline(folders: Folders, tiny_model_dir: Path, tiny_corpus: Path, tally: Tally) -> None:
    job = experimenting(tiny_model_dir, tiny_corpus)
    expected, seconds = reference(folders(), job)
    try_kills("pipeline", job, expected, at_random_instants(seconds, 10), 12, folders, tally)
