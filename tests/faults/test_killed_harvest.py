"""SIGKILL at many instants of a harvest: after a restart the store is as if nothing had been."""

from __future__ import annotations

from pathlib import Path

from tests.faults.jobs import STORE, extending, harvest_arguments, harvesting, reference
from tests.faults.kills import Folders, at_random_files, at_random_instants, try_kills
from tests.faults.processes import finished
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
