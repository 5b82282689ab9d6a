"""Two processes at the same thing: one is refused, or both see what is consistent."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from routesae_cache.checkpoint import CONFIG
from stores.reader import StoreReader
from tests.faults.jobs import (
    CODES,
    RUNS,
    STORE,
    Content,
    Job,
    committed,
    everything,
    experimenting,
    harvest_arguments,
    harvesting,
    mining,
    recoding,
    reference,
    runs,
    training,
)
from tests.faults.processes import Command, SignalAtFile, finished, running, wait_until
from tests.faults.tally import Tally

LINES = r"metrics\.jsonl$"


def frozen_at(pattern: str, at: int) -> SignalAtFile:
    """Stops its process at that file, for as long as a test wants, with all that it holds."""
    return SignalAtFile(pattern, at, signal.SIGSTOP)


def wait_for_frozen(command: Command) -> None:
    def frozen() -> bool:
        assert command.process.exitcode is None, command.output()
        return Path(f"/proc/{command.process.pid}/stat").read_text().rpartition(")")[2][1] == "T"

    wait_until(frozen)


@pytest.mark.parametrize(
    ("name", "pattern", "at"),
    [
        ("harvest", r"committed/c/2", 1),
        ("recode", r"committed/c/2", 1),
        ("train", LINES, 5),
        ("contexts", CODES, 2),
        ("pipeline", r"committed/c/2", 1),
    ],
    ids=lambda value: value if str(value).isalpha() else "",
)
def test_one_is_refused_and_a_dead_one_is_succeeded(
    name: str,
    pattern: str,
    at: int,
    home: Path,
    tiny_model_dir: Path,
    tiny_corpus: Path,
    tmp_path: Path,
    tally: Tally,
) -> None:
    jobs: dict[str, Job] = {
        "harvest": harvesting(tiny_model_dir, tiny_corpus),
        "recode": recoding(home / STORE),
        "train": training(home / STORE, epochs=2),
        "contexts": mining(home / STORE, tiny_model_dir, home / RUNS),
        "pipeline": experimenting(tiny_model_dir, tiny_corpus),
    }
    job = jobs[name]
    whole, folder = tmp_path / "whole", tmp_path / "job"
    for each in (whole, folder):
        each.mkdir()
    expected, _ = reference(whole, job)
    job.prepare(folder)
    with running(folder, *job.arguments, first=frozen_at(pattern, at)) as first:
        wait_for_frozen(first)
        with running(folder, *job.arguments, log=tmp_path / "second") as second:
            assert second.code() == 2, second.output()
            assert "another process" in second.output()
            assert "Traceback" not in second.output()
        assert first.kill(signal.SIGKILL)
        first.code()
    finished(folder, *job.arguments)
    assert job.result(folder) == expected
    tally.add(f"two at once, {name}")


def test_other_runs_may_be_trained_in_the_same_folder(home: Path, tmp_path: Path) -> None:
    job = training(home / STORE, epochs=2)
    job.prepare(tmp_path)
    train = ["train", home / STORE, "--sae", "topk", "--layer", 2, "--latents", 64, "--k", 4]
    train += ["--batch-tokens", 32, "--out", RUNS]
    with running(tmp_path, *job.arguments, first=frozen_at(LINES, 5)) as first:
        wait_for_frozen(first)
        with running(tmp_path, *train, log=tmp_path / "second") as second:
            assert second.code() == 0, second.output()
        first.kill(signal.SIGCONT)
        assert first.code() == 0, first.output()
    assert len(list((tmp_path / RUNS).glob("*/sae.safetensors"))) == 3
    assert not (tmp_path / RUNS / ".locks").exists()


def test_two_trainings_read_one_store(home: Path, tmp_path: Path, tally: Tally) -> None:
    job = training(home / STORE, epochs=3)
    folders = [tmp_path / name for name in ("whole", "one", "two")]
    for folder in folders:
        folder.mkdir()
    expected, _ = reference(folders[0], job)
    for folder in folders[1:]:
        job.prepare(folder)
    one, two = folders[1:]
    with running(one, *job.arguments) as first, running(two, *job.arguments) as second:
        assert [first.code(), second.code()] == [0, 0], first.output() + second.output()
    assert job.result(one) == job.result(two) == expected
    tally.add("two at once, readers")


def run_names(out: Path) -> list[str]:
    return sorted(f"{out.name}/{run.name}" for run in out.iterdir() if (run / CONFIG).exists())


def without_configs(out: Path) -> Content:
    """Every file of ended runs but the one that says how large the store was."""
    return {name: v for name, v in runs(out).items() if not name.endswith(CONFIG)}


def test_training_while_a_harvest_extends_the_store(
    home: Path, tiny_model_dir: Path, tiny_corpus: Path, tmp_path: Path, tally: Tally
) -> None:
    """What was opened before stays what it is; what is opened now is told what is missing, or
    takes what is there.
    """
    small, folder = tmp_path / "small", tmp_path / "job"
    small.mkdir()
    finished(small, *harvest_arguments(tiny_model_dir, tiny_corpus, tokens=100))
    shutil.copytree(small, folder)
    job = training(Path(STORE), epochs=4)
    expected, _ = reference(small, job)
    before, reader = committed(small / STORE), StoreReader(folder / STORE)
    job.prepare(folder)
    extend = harvest_arguments(tiny_model_dir, tiny_corpus)
    with running(folder, *job.arguments, first=frozen_at(LINES, 5)) as trains:
        wait_for_frozen(trains)
        stops = frozen_at(r"residuals/2/\w+/c/3/", 2)  # in the middle of the first new chunk
        with running(folder, *extend, first=stops, log=tmp_path / "extends") as extends:
            wait_for_frozen(extends)
            for each in (reader, StoreReader(folder / STORE)):
                assert [fault for _, fault in each.verify() if fault] == []
            found = committed(folder / STORE)
            assert {name: found[name] for name in before} == before
            late = [*job.arguments[:3], "--out", "late"]
            with running(folder, *late, log=tmp_path / "late") as refused:
                assert refused.code() == 2, refused.output()
                assert "3 of 5 chunks of the train split are not harvested" in refused.output()
                assert "the first 2 alone with --so-far" in refused.output()
            assert not (folder / "late").exists()
            finished(folder, *late, "--so-far")
            assert without_configs(folder / "late") == without_configs(small / RUNS)
            cut = [*job.arguments[:3], "--out", "cut"]
            killed = SignalAtFile(LINES, 5)
            with running(folder, *cut, "--so-far", first=killed, log=tmp_path / "cut") as begun:
                assert begun.code() == -signal.SIGKILL
                assert "the first 2 of 5 chunks" in begun.output()
            with running(folder, "store", "info", STORE, log=tmp_path / "info") as info:
                assert info.code() == 0
                assert "3 of 6 chunks: eval 1 of 1, train 2 of 5" in info.output()
            evaluate = ["evaluate", STORE, *run_names(folder / "late"), "--json"]
            finished(folder, *evaluate, "during.json")
            trains.kill(signal.SIGCONT)
            assert trains.code() == 0, trains.output()
            extends.kill(signal.SIGCONT)
            assert extends.code() == 0, extends.output()
    assert job.result(folder) == expected
    assert everything(folder / STORE) == everything(home / STORE)
    finished(folder, *cut, "--resume")
    assert without_configs(folder / "cut") == without_configs(small / RUNS)
    finished(folder, *evaluate, "after.json")
    assert (folder / "during.json").read_bytes() == (folder / "after.json").read_bytes()
    finished(folder, *job.arguments[:3], "--out", "after")
    tally.add("two at once, training beside a harvest")
