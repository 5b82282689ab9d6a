"""Training on what a harvest has committed so far, and going on with it as the store grows."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from safetensors.torch import load_file

from routesae_cache.checkpoint import CHECKPOINT, CONFIG, RunConfig, RunError, read_config
from routesae_cache.json_files import read_json, write_json
from routesae_cache.parallel import World
from routesae_cache.prefix import extent
from routesae_cache.runs import Asked
from routesae_cache.train import TrainResult, train
from routesae_cache.train_plan import TrainConfig, prepare
from stores.errors import IncompleteStoreError, StoreError
from stores.reader import StoreReader
from tests.command_helpers import refused, routesae
from tests.pipeline_helpers import topk
from tests.store_helpers import chunk_file, fill_store, grown, store_spec

SMALL = store_spec(context=9, chunk_rows=4, eval_rows=4, train_rows=16)
LARGE = grown(SMALL, 30)
LAYERS = SMALL.layers
SAES = (
    topk((2,), latents=16, norm="scalar"),
    topk(LAYERS, latents=16, init_bias="mean", route_estimator="straight-through"),
)
COMMAND = ["--sae", "topk:layer=2", "--k", 4, "--latents", 16, "--batch-tokens", 16]
T = TypeVar("T")


@pytest.fixture(scope="module")
def small(tmp_path_factory: Any) -> StoreReader:
    """Four chunks to train on."""
    return fill_store(tmp_path_factory.mktemp("small") / "s.zarr", SMALL)


@pytest.fixture(scope="module")
def whole(small: StoreReader, tmp_path_factory: Any) -> Path:
    """The runs on those, never interrupted."""
    out: Path = tmp_path_factory.mktemp("whole")
    assert {state.status for state in go(small, out).runs} == {"done"}
    return out


@pytest.fixture
def store(small: StoreReader, tmp_path: Path) -> Path:
    """The same in the middle of an extension: the fifth is missing, the sixth is committed."""
    path = tmp_path / "s.zarr"
    shutil.copytree(small.path, path)
    fill_store(path, LARGE, chunks=[6])
    return path


def go(reader: StoreReader, out: Path, steps: int | None = None, **options: Any) -> TrainResult:
    """Train; stop after so many steps."""
    left = iter(range(1, 10**9))
    config = TrainConfig(out=out, **{"epochs": 2, "batch_tokens": 16, "log_every": 4} | options)
    return train(reader, [(sae, 3) for sae in SAES], config, stopped=lambda: next(left) == steps)


def outcome(runs: Path) -> dict[str, Any]:
    """Weights, and metrics but for their times."""
    found: dict[str, Any] = {}
    for folder in sorted(runs.iterdir()):
        tensors = load_file(folder / "sae.safetensors")
        found[folder.name] = {name: value.tolist() for name, value in tensors.items()}
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        found[f"{folder.name} metrics"] = [x | {"seconds": 0, "crc32c": 0} for x in lines]
    return found


def test_a_pass_on_the_prefix_is_one_on_a_store_of_that_size(
    store: Path, whole: Path, tmp_path: Path
) -> None:
    reader = StoreReader(store)
    assert (reader.committed, reader.prefix("train")) == ([0, 1, 2, 3, 4, 6], [1, 2, 3, 4])
    go(reader, tmp_path / "runs", so_far=True)
    assert outcome(tmp_path / "runs") == outcome(whole)
    for folder in whole.iterdir():
        mine, theirs = read_config(tmp_path / "runs" / folder.name), read_config(folder)
        assert (mine.chunks, mine.mean_square) == (4, theirs.mean_square)
        assert mine.differences(theirs) == []


@pytest.mark.parametrize(
    ("on", "then"),
    [
        ("the prefix", "complete"),
        ("the prefix", "extended, so far"),
        ("all there was", "extended"),
    ],
)
def test_interrupted_and_gone_on_with_on_what_it_began_with(
    on: str, then: str, small: StoreReader, store: Path, whole: Path, tmp_path: Path
) -> None:
    if on == "all there was":
        shutil.rmtree(store)
        shutil.copytree(small.path, store)
    cut = go(StoreReader(store), tmp_path / "runs", 5, so_far=on == "the prefix")
    assert cut.interrupted
    reader = fill_store(store, LARGE, chunks=None if then == "complete" else [5])
    assert len(reader.prefix("train")) > 4
    go(reader, tmp_path / "runs", resume=True, so_far=then.endswith("so far"))
    assert outcome(tmp_path / "runs") == outcome(whole)
    assert {read_config(run).chunks for run in (tmp_path / "runs").iterdir()} == {4}


def test_runs_of_before_the_number_was_recorded(
    small: StoreReader, store: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "runs"
    for folder in go(small, out, 5).folders:
        record = read_json(folder / CONFIG)
        del record["chunks"]
        write_json(folder / CONFIG, record)
        (folder / CHECKPOINT).unlink()  # which says what its settings were
        assert read_config(folder).chunks == 4
    go(StoreReader(store), out, resume=True)
    assert outcome(out) == outcome(whole)
    record = read_config(folder).to_dict()
    del record["chunks"]
    with pytest.raises(RunError, match=r"store_spec: .*missing or unknown: .*codec"):
        RunConfig.from_dict(record | {"store_spec": {"context": 9}})
    with pytest.raises(RunError, match="store_spec: expected a JSON object"):
        RunConfig.from_dict(record | {"store_spec": 3})


def test_what_is_refused(small: StoreReader, store: Path, tmp_path: Path) -> None:
    reader, out = StoreReader(store), tmp_path / "runs"
    with pytest.raises(
        IncompleteStoreError, match=r"3 of 8 chunks .* or train on the first 4 alone with --so-far"
    ):
        go(reader, out)
    nothing = fill_store(tmp_path / "new.zarr", LARGE, chunks=[0, 2])
    with pytest.raises(IncompleteStoreError, match=r"7 of 8 chunks .* at least the first of them"):
        go(nothing, out, so_far=True)
    assert not out.exists()
    one, two = SAES
    begin = TrainConfig(out=out, batch_tokens=16, so_far=True)
    train(reader, [(one, 3)], begin, stopped=lambda: True)
    reader = fill_store(store, LARGE)
    train(reader, [(two, 3)], begin, stopped=lambda: True)
    with pytest.raises(RunError, match=r"different parts .*\n .*: 4 chunks\n .*: 8 chunks"):
        go(reader, out, resume=True, epochs=1)
    shutil.rmtree(out / sorted(path.name for path in out.iterdir())[-1])  # the one with 4
    with pytest.raises(RunError, match=r"expected a store with 8 chunks .* found 4"):
        go(small, out, resume=True, epochs=1)


def test_replaced_runs_read_what_is_there_now(store: Path, tmp_path: Path) -> None:
    """As an experiment's do whose store was extended."""
    out = tmp_path / "runs"
    go(StoreReader(store), out, so_far=True)
    reader = fill_store(store, LARGE)
    go(reader, out, resume=True)
    assert {read_config(out / run.name).chunks for run in out.glob("[!.]*")} == {4}
    go(reader, out, resume=True, replace_changed=True)
    assert {read_config(out / run.name).chunks for run in out.glob("[!.]*")} == {8}
    assert len(list((out / ".replaced").iterdir())) == 2


def test_another_eval_split_is_another_store(small: StoreReader, tmp_path: Path) -> None:
    (folder, *_) = go(small, tmp_path, 1).folders
    config = read_config(folder)
    for name in ("eval_rows", "eval_tokens", "chunk_rows", "width"):
        other = {**config.to_dict(), "store_spec": {**config.store_spec, name: 1}}
        (line,) = config.differences(RunConfig.from_dict(other))
        assert line.startswith(f"store_spec.{name}: the run has")


class Second(World):
    """The second of two processes, as far as it is told what to read."""

    rank = 1

    def __init__(self, chunks: int) -> None:
        self._chunks = chunks

    def first(self, function: Callable[[], T]) -> T:
        return self._chunks  # type: ignore[return-value]


def test_all_processes_read_what_the_first_has_found(
    small: StoreReader, store: Path, tmp_path: Path
) -> None:
    """Although this one opened the store before it was extended."""
    early = StoreReader(store)
    fill_store(store, LARGE, chunks=[5])
    asked = [Asked(SAES[0], 3)]
    config = TrainConfig(out=tmp_path, batch_tokens=16, so_far=True)
    for chunks in (3, 6):
        plan, _ = prepare(early, asked, config, None, Second(chunks))
        assert plan.runs[0].chunks == chunks
        assert plan.chunks == tuple(range(1, chunks + 1))
    with pytest.raises(StoreError, match=r"found the first 7 chunks .* this one 6"):
        prepare(early, asked, config, None, Second(7))


def test_how_much_a_prefix_is(small: StoreReader) -> None:
    assert extent(LARGE, 8) == (8, LARGE.train_tokens)
    assert extent(LARGE, 4) == (4, round(LARGE.train_tokens * 16 / 30))


def test_what_a_user_sees(store: Path, tmp_path: Path) -> None:
    train = ["train", store, *COMMAND, "--out", tmp_path / "runs"]
    refused(routesae(*train), "3 of 8 chunks", "the first 4 alone with --so-far")
    assert not (tmp_path / "runs").exists()
    begun = routesae(*train, "--so-far")
    assert begun.exit_code == 0, begun.output
    words = "of the train split, the first 4 of 8 chunks, 128 of 240 tokens"
    assert words in " ".join(begun.stderr.split())
    info = routesae("store", "info", store).stdout
    words = "6 of 9 chunks: eval 1 of 1, train 5 of 8, the first 4 without a gap"
    assert words in info
    chunk_file(store, "committed", 6).unlink()
    (line,) = re.findall(r"committed +(.*)", routesae("store", "info", store).stdout)
    assert line.rstrip() == "5 of 9 chunks: eval 1 of 1, train 4 of 8"
    facts = json.loads(routesae("store", "info", store, "--json").stdout)
    assert facts["splits"]["train"] == {"chunks": 8, "committed": 4, "so_far": 4}
    (folder,) = (tmp_path / "runs").iterdir()
    evaluated = routesae("evaluate", store, folder)
    assert evaluated.exit_code == 0, evaluated.output
    fill_store(store, LARGE)
    again = routesae(*train, "--so-far", "--resume")
    assert "begun with the first 4 of 8 chunks" in " ".join(again.stderr.split())
    assert "done" in again.stdout
    (tmp_path / "s.toml").write_text(
        '[train]\nlatents = 16\nk = 4\nbatch_tokens = 16\n[[sae]]\nsae = "topk"\nlayer = 2\n'
    )
    chunk_file(store, "committed", 8).unlink()
    swept = routesae("sweep", store, tmp_path / "s.toml", "--so-far", "--out", tmp_path / "swept")
    assert "the first 7 of 8 chunks" in " ".join(swept.stderr.split())
