"""A disk that gets full, at many points of what is written: a clear error, nothing lost.

The disk is a tmpfs of a few megabytes, mounted for a test, with a file that takes up all but as
much as is to be left. It takes root, or `unshare --user --map-root-user --mount make test-faults`;
limits on the size of files (RLIMIT_FSIZE) would need neither, but have another error and do not
run out over many files.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.jobs import (
    RUNS,
    STORE,
    Job,
    everything,
    harvesting,
    mining,
    recoding,
    training,
    whole_files,
)
from tests.faults.processes import running
from tests.faults.tally import Tally

_MEGABYTES = 16


@dataclass(frozen=True)
class SmallDisk:
    """A file system of its own."""

    path: Path

    @property
    def free(self) -> int:
        return shutil.disk_usage(self.path).free

    def leave(self, n_bytes: int) -> None:
        """Take up everything else."""
        with (self.path / "ballast").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, self.free - n_bytes)

    def make_space(self) -> None:
        (self.path / "ballast").unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    path = tmp_path / "disk"
    path.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={_MEGABYTES}m", "tmpfs", path]
    subprocess.run(["mount", *options], check=True)
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


def try_full(what: str, job: Job, disk: SmallDisk, points: int, log: Path, tally: Tally) -> None:
    """Let the disk get full at so many points of what a command writes; go on with more space."""
    folder = disk.path / "job"
    folder.mkdir()
    job.prepare(folder)
    before = disk.free
    _run(job, folder, log)
    expected, written = job.result(folder), before - disk.free
    survived = lost = 0
    for point in range(points):
        shutil.rmtree(folder)
        folder.mkdir()
        job.prepare(folder)
        disk.leave(written * (2 * point + 1) // (2 * points + 1))
        with running(folder, *job.arguments, log=log) as command:
            assert command.code() == 2, command.output()
        told = command.output()
        assert "Traceback" not in told
        assert "free space" in told
        # an estimate may tell before it begins
        at_once = "are still to be written" in told
        assert at_once or ("the disk is full" in told and str(disk.path) in told), told
        assert at_once or "are needed" in told, told
        assert not list(folder.rglob("*.partial"))
        disk.make_space()
        kept = job.kept(folder)
        lost += sum(expected.get(name) != content for name, content in kept.items())
        _run(job, folder, log)
        survived += job.result(folder) == expected
    tally.add(f"disk full, {what}", tried=points, survived=survived, lost=lost)
    assert (survived, lost) == (points, 0)


def _run(job: Job, folder: Path, log: Path) -> None:
    with running(folder, *job.arguments, log=log) as command:
        assert command.code() == 0, command.output()


def test_harvest(
    disk: SmallDisk, tiny_model_dir: Path, tiny_corpus: Path, tmp_path: Path, tally: Tally
) -> None:
    job = harvesting(tiny_model_dir, tiny_corpus)
    try_full("harvest", job, disk, 12, tmp_path / "log", tally)


def test_recode(disk: SmallDisk, home: Path, tmp_path: Path, tally: Tally) -> None:
    try_full("recode", recoding(home / STORE), disk, 6, tmp_path / "log", tally)


def test_train(disk: SmallDisk, home: Path, tmp_path: Path, tally: Tally) -> None:
    try_full("train", training(home / STORE, epochs=2), disk, 8, tmp_path / "log", tally)


def test_contexts(
    disk: SmallDisk, home: Path, tiny_model_dir: Path, tmp_path: Path, tally: Tally
) -> None:
    job = mining(home / STORE, tiny_model_dir, home / RUNS)
    try_full("contexts", job, disk, 6, tmp_path / "log", tally)


def test_report(disk: SmallDisk, home: Path, tmp_path: Path, tally: Tally) -> None:
    options = ["--store", home / STORE, "--out", "page/r.html", "--assets", "page/assets"]
    job = Job(
        ["report", home, *options],
        lambda f: everything(f / "page"),
        lambda f: whole_files(f / "page"),
    )
    try_full("report", job, disk, 4, tmp_path / "log", tally)
