"""A harvest by several processes: the same store, and no chunk by two of them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.models.llama.modeling_llama  # noqa: F401  (once, not in each process)

from routesae_cache import workers as workers_module
from routesae_cache.harvest import HarvestProgress, _ChunkEncoding, harvest
from routesae_cache.harvest_plan import HarvestConfig, plan_harvest
from routesae_cache.lm import LanguageModel
from routesae_cache.workers import Share, harvest_share, share_left
from stores.errors import NonFiniteError, SpecMismatchError, StoreError, StoreLockedError
from stores.locks import FOLDER, take_chunk
from stores.reader import StoreReader
from stores.writer import StoreWriter
from tests.pipeline_helpers import array_files, config, run
from tests.store_helpers import encoded_chunk, fill_store, store_bytes, store_spec, token_rows

CHUNKS = 6


@pytest.fixture(scope="module")
def reference(tiny_model_dir: Path, tiny_corpus: Path, tmp_path_factory: Any) -> StoreReader:
    """A harvest by one process."""
    return run(config(tiny_model_dir, tiny_corpus, tmp_path_factory.mktemp("ref") / "s.zarr"))


@pytest.fixture
def wanted(tiny_model_dir: Path, tiny_corpus: Path, tmp_path: Path) -> HarvestConfig:
    return config(tiny_model_dir, tiny_corpus, tmp_path / "s.zarr")


@pytest.fixture
def rows_alone(wanted: HarvestConfig, monkeypatch: pytest.MonkeyPatch) -> HarvestConfig:
    """The store has its token rows, and no chunk."""

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("routesae_cache.harvest.fill_residuals", stop)
        with pytest.raises(KeyboardInterrupt):
            harvest(plan_harvest(wanted))
    return wanted


def _work(wanted: HarvestConfig, share: str, log: Path, hold: float) -> None:
    """A worker's process: writes down what it commits, and takes `hold` seconds for a chunk."""
    torch.set_num_threads(1)
    original = _ChunkEncoding.commit

    def commit(self: Any) -> Any:
        time.sleep(hold)
        with log.open("a") as lines:
            lines.write(f"{self._chunk}\n")
        return original(self)

    _ChunkEncoding.commit = commit  # type: ignore[method-assign]
    harvest_share(plan_harvest(wanted), Share.parse(share))


@contextmanager
def working(wanted: HarvestConfig, shares: dict[str, float], log: Path) -> Iterator[list[Any]]:
    """Processes with these shares, all at once."""
    context = multiprocessing.get_context("forkserver")  # loads the libraries once
    context.set_forkserver_preload([__name__])
    found = [
        context.Process(target=_work, args=(wanted, share, log, hold))
        for share, hold in shares.items()
    ]
    for process in found:
        process.start()
    try:
        yield found
    finally:
        for process in found:
            process.kill()
            process.join()


def committed(store: Path) -> set[int]:
    folder = store / "committed" / "c"
    return {int(file.name) for file in folder.glob("?")} if folder.exists() else set()


def wait_until(condition: Any) -> None:
    give_up = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.005)


# whole harvests


def test_two_workers_at_once_write_the_store_of_one(
    reference: StoreReader, wanted: HarvestConfig, tmp_path: Path
) -> None:
    """Worker 1 waits for the token rows that worker 0 writes."""
    with working(wanted, {"1/2": 0.0, "0/2": 0.0}, tmp_path / "log") as processes:
        for process in processes:
            process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted(map(int, (tmp_path / "log").read_text().split())) == list(range(CHUNKS))
    assert array_files(wanted.out) == array_files(reference.path)


def test_shares_that_overlap_write_no_chunk_twice(
    reference: StoreReader, rows_alone: HarvestConfig, tmp_path: Path
) -> None:
    shares = {"0/1": 0.05, "0/2": 0.05, "0/3": 0.05}
    with working(rows_alone, shares, tmp_path / "log") as processes:
        for process in processes:
            process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sorted(map(int, (tmp_path / "log").read_text().split())) == list(range(CHUNKS))
    assert array_files(rows_alone.out) == array_files(reference.path)


def test_what_a_killed_worker_had_is_free_again(
    reference: StoreReader, rows_alone: HarvestConfig, tmp_path: Path
) -> None:
    locks = rows_alone.out / FOLDER
    with working(rows_alone, {"0/2": 60.0}, tmp_path / "log") as (process,):
        wait_until(lambda: (locks / "0").exists())
        assert take_chunk(rows_alone.out, 0) is None
        with StoreWriter(rows_alone.out, shared=True) as beside:
            assert not beside.claim(0)
            assert beside.claim(1)  # of another share; 2 may be begun while 0 is committed
        with pytest.raises(StoreLockedError):
            harvest(plan_harvest(rows_alone))  # it wants the store alone
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    torn = rows_alone.out / "residuals" / "2" / "codes" / "c" / "0" / "0" / "0.0123.partial"
    torn.parent.mkdir(parents=True)
    torn.write_bytes(b"half")
    assert (locks / "0").exists()
    result = harvest_share(plan_harvest(rows_alone), Share(index=0, of=1))
    assert (result.left_of_share, result.left) == (0, 0)
    assert array_files(rows_alone.out) == array_files(reference.path)


def test_workers_one_after_the_other(
    reference: StoreReader, rows_alone: HarvestConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[HarvestProgress] = []
    plan = plan_harvest(rows_alone)
    assert share_left(plan, Share(index=1, of=4)) == (2, 2 * 64, CHUNKS)
    first = harvest_share(plan, Share(index=1, of=4), states.append)
    assert committed(rows_alone.out) == {1, 5}
    assert (first.tokens, first.left_of_share, first.left) == (2 * 64, 0, 4)
    assert (states[-1].done, states[-1].total) == (2 * 64, 2 * 64)
    with monkeypatch.context() as patch:  # nothing to do: without the model
        patch.setattr(workers_module, "load_model", None)
        again = harvest_share(plan_harvest(rows_alone), Share(index=1, of=4))
    assert (again.tokens, again.left) == (0, 4)
    run(rows_alone)  # and a plain harvest does the rest
    assert array_files(rows_alone.out) == array_files(reference.path)


def test_extending_is_worker_0s_and_the_others_wait(
    reference: StoreReader, tiny_model_dir: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    run(config(tiny_model_dir, tiny_corpus, tmp_path / "s.zarr", tokens=200))
    wanted = config(tiny_model_dir, tiny_corpus, tmp_path / "s.zarr")
    with working(wanted, {"1/2": 0.0, "0/2": 0.0}, tmp_path / "log") as processes:
        for process in processes:
            process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert array_files(wanted.out) == array_files(reference.path)


def test_a_chunk_that_another_process_has_is_left_to_it(rows_alone: HarvestConfig) -> None:
    with StoreWriter(rows_alone.out, shared=True) as other:
        assert other.claim(3)
        result = harvest_share(plan_harvest(rows_alone), Share(index=0, of=1))
    assert (result.tokens, result.left_of_share, result.left) == (5 * 64, 1, 1)
    assert committed(rows_alone.out) == {0, 1, 2, 4, 5}


def test_an_error_gives_the_chunk_back(
    rows_alone: HarvestConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, *_: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "write_chunk", full)
        with pytest.raises(OSError, match="No space left"):
            harvest_share(plan_harvest(rows_alone), Share(index=0, of=2))
    assert not (rows_alone.out / FOLDER).exists()


# waiting


def test_without_worker_0_the_others_give_up(
    wanted: HarvestConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(workers_module, "_ROWS_PATIENCE_S", 0.1)
    monkeypatch.setattr(workers_module, "_POLL_S", 0.02)
    states: list[HarvestProgress] = []
    with (
        caplog.at_level("INFO", "routesae_cache.workers"),
        pytest.raises(StoreError, match=r"worker 0 has written nothing .* --worker 0/3"),
    ):
        harvest_share(plan_harvest(wanted), Share(index=2, of=3), states.append)
    assert "the same command with --worker 0/3" in caplog.text
    assert {state.phase for state in states} == {"waiting"}
    assert not wanted.out.exists()


def test_a_worker_waits_no_longer_than_a_moment_for_the_store(
    rows_alone: HarvestConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers_module, "_LOCK_PATIENCE_S", 0.1)
    with StoreWriter(rows_alone.out), pytest.raises(StoreLockedError, match="another process"):
        harvest_share(plan_harvest(rows_alone), Share(index=1, of=2))
    monkeypatch.setattr(workers_module, "_LOCK_PATIENCE_S", 30.0)
    alone = StoreWriter(rows_alone.out)
    release = threading.Timer(0.3, alone.close)
    release.start()
    assert harvest_share(plan_harvest(rows_alone), Share(index=1, of=6)).left == 5
    release.join()


def test_a_worker_with_another_model_is_refused(
    rows_alone: HarvestConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = LanguageModel.__init__

    def other(self: Any, model: Any, identity: Any) -> None:
        original(self, model, type(identity)(**{**vars(identity), "weights": "others"}))

    monkeypatch.setattr(LanguageModel, "__init__", other)
    with pytest.raises(SpecMismatchError, match=r"model\.weights"):
        harvest_share(plan_harvest(rows_alone), Share(index=1, of=2))
    assert not (rows_alone.out / FOLDER).exists()


@pytest.mark.parametrize("text", ["2/2", "1", "-1/2", "a/b", "0/0", "1/2/3", ""])
def test_shares_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"i/n with i from 0 to n-1"):
        Share.parse(text)


def test_shares_are_all_chunks_once() -> None:
    found = [chunk for i in range(4) for chunk in Share.parse(f"{i}/4").of_chunks(range(11))]
    assert sorted(found) == list(range(11))


# the store's locks


def test_one_alone_or_many_that_share(tmp_path: Path) -> None:
    path = Path(fill_store(tmp_path / "s.zarr", store_spec(), chunks=()).path)
    before = store_bytes(path)
    with StoreWriter(path, shared=True) as first, StoreWriter(path, shared=True) as second:
        with pytest.raises(StoreLockedError):
            StoreWriter(path)
        assert first.claim(1)
        assert first.claim(1)
        assert not second.claim(1)
        assert second.claim(2)
    with StoreWriter(path), pytest.raises(StoreLockedError):
        StoreWriter(path, shared=True)
    assert store_bytes(path) == before  # no lock is left behind


def test_a_claim_ends_with_the_commit_and_is_refused_after_it(tmp_path: Path) -> None:
    spec = store_spec()
    path = Path(fill_store(tmp_path / "s.zarr", spec, chunks=()).path)
    with StoreWriter(path, shared=True) as first, StoreWriter(path, shared=True) as second:
        assert first.claim(1)
        layers, stats = encoded_chunk(spec, 1)
        first.write_chunk(1, token_rows(spec, 1), layers, stats)
        assert not (path / FOLDER / "1").exists()
        assert not second.claim(1)
        assert not (path / FOLDER / "1").exists()
    fill_store(path, spec)
    assert store_bytes(path) == store_bytes(fill_store(tmp_path / "once.zarr", spec).path)


def test_leftovers_of_others_that_live_are_left_alone(tmp_path: Path) -> None:
    path = Path(fill_store(tmp_path / "s.zarr", store_spec(), chunks=()).path)
    mine, others = (path / "stats" / "count" / "c" / f"{c}.01.partial" for c in (1, 2))
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"")
    others.write_bytes(b"")
    with StoreWriter(path, shared=True) as writer:
        assert writer.claim(1)
        assert (mine.exists(), others.exists()) == (False, True)
    StoreWriter(path).close()
    assert not others.exists()


def test_locks_that_the_dead_left_go_with_the_last(tmp_path: Path) -> None:
    path = Path(fill_store(tmp_path / "s.zarr", store_spec()).path)
    before = store_bytes(path)
    (path / FOLDER).mkdir()
    for name in ("store", "1"):  # killed after the commit of chunk 1
        (path / FOLDER / name).touch()
    with StoreWriter(path, shared=True):
        StoreWriter(path, shared=True).close()
        assert (path / FOLDER / "1").exists()  # somebody is still there
    assert store_bytes(path) == before


def test_errors_reach_other_processes_as_they_are(tmp_path: Path) -> None:
    for error in (NonFiniteError(7, 3), StoreLockedError(tmp_path), StoreError("words")):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again)) == (type(error), str(error))
        assert vars(again) == vars(error)
