"""SIGKILL at many instants of a harvest: after a restart the store is as if nothing had been."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.faults.jobs import STORE, extending, harvest_arguments, harvesting, reference
from tests.faults.kills import (
    Folders,
    at_random_files,
    at_random_instants,
    try_kills,
    was_killed,
)
from tests.faults.processes import SignalAtFile, finished, running
from tests.faults.tally import Tally


def test_harvest(folders: Folders, tiny_model_dir: Path, tiny_corpus: Path, tally: Tally) -> None:
    job = harvesting(tiny_model_dir, tiny_corpus)
    expected, seconds = reference(folders(), job)
    try_kills("harvest", job, expected, at_random_instants(seconds, 1), 100, folders, tally)


def test_harvest_at_its_files(
    folders: Folders, home: Path, tiny_model_dir: Path, tiny_corpus: Path, tally: Tally
) -> None:
    smaller = folders()
    finished(smaller, *harvest_arguments(tiny_model_dir, tiny_corpus, tokens=100))
    job = extending(tiny_model_dir, tiny_corpus, smaller / STORE)
    expected = job.result(home)
    what = "harvest, at its files"
    try_kills(what, job, expected, at_random_files(600, 2), 15, folders, tally)
    job = harvesting(tiny_model_dir, tiny_corpus)
    try_kills(what, job, expected, at_random_files(900, 3), 15, folders, tally)


@pytest.mark.parametrize("at", [1, 2, 5, 20])
def test_while_what_is_no_store_yet_is_removed(
    at: int, home: Path, tiny_model_dir: Path, tiny_corpus: Path, tmp_path: Path, tally: Tally
) -> None:
    """Token rows that are not complete are written anew, by another call that is killed."""
    job = harvesting(tiny_model_dir, tiny_corpus)
    by_name_alone = (
        re.escape(f"{tmp_path.resolve()}/") + r"(zarr\.json|c|\d+)$"
    )  # as rmtree removes
    for dies in (SignalAtFile(rf"/{STORE}/tokens/c/", 2), SignalAtFile(by_name_alone, at)):
        with running(tmp_path, *job.arguments, first=dies) as command:
            assert was_killed(command)
    finished(tmp_path, *job.arguments)
    assert job.result(tmp_path) == job.result(home)
    tally.add("harvest, at its files")
