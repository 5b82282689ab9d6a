"""Contexts and spliced metrics on a real Ray cluster: those of one process, whatever dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from routesae_cache import ray_contexts, ray_splicing
from routesae_cache.ray_pool import Pool
from routesae_cache.runs import Asked
from routesae_cache.train import train
from routesae_cache.train_plan import TrainConfig
from stores.reader import StoreReader
from tests.command_helpers import routesae
from tests.pipeline_helpers import array_files, config, run, topk

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster
    from typer.testing import Result

LAYERS = (1, 2, 3)
SAES = [
    Asked(topk((3,)), 1),
    Asked(topk(LAYERS, route_estimator="straight-through"), 1),
    Asked(topk(LAYERS, selector="every"), 1),
]


@pytest.fixture(scope="module")
def reader(tiny_model_dir: Path, tiny_corpus: Path, tmp_path_factory: Any) -> StoreReader:
    out = tmp_path_factory.mktemp("m") / "s.zarr"
    return run(config(tiny_model_dir, tiny_corpus, out, eval_tokens=1000))


@pytest.fixture(scope="module")
def runs(reader: StoreReader, tmp_path_factory: Any) -> list[Path]:
    options = TrainConfig(out=tmp_path_factory.mktemp("runs"), batch_tokens=64)
    return list(train(reader, SAES, options).folders)


@contextmanager
def one_killed(module: ModuleType) -> Iterator[list[Pool[Any, Any]]]:
    """A worker dies as soon as it has work."""
    found: list[Pool[Any, Any]] = []
    original = module.pool

    @contextmanager
    def watched(*args: Any, **kwargs: Any) -> Iterator[Pool[Any, Any]]:
        with original(*args, **kwargs) as made:
            found.append(made)
            give = made._give

            def give_and_kill(place: Any) -> None:
                give(place)
                if not any(each.deaths for each in made.places):
                    os.kill(place.pid, signal.SIGKILL)

            made._give = give_and_kill
            yield made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "pool", watched)
        yield found


@pytest.fixture
def here_and_there(
    cluster: Cluster, reader: StoreReader, runs: list[Path], tiny_model_dir: Path, tmp_path: Path
) -> Callable[..., tuple[Result, Result]]:
    """Run a command in one process and on Ray, where a worker dies: it prints the same."""

    def both(module: ModuleType, command: str, out: str, *options: object) -> tuple[Result, Result]:
        words = [command, reader.path, *runs, *options, "--model", tiny_model_dir, out]
        here = routesae(*words, tmp_path / "here")
        with one_killed(module) as pools:
            ray = ["--ray", cluster.address, "--workers", 2]
            there = routesae(*words, tmp_path / "there", *ray)
        assert there.exit_code == 0, there.output
        assert sum(place.deaths for place in pools[0].places) >= 1
        assert here.stdout.replace("/here", "/there") == there.stdout
        return here, there

    return both


def test_contexts(here_and_there: Callable[..., Any], tmp_path: Path) -> None:
    options = ["--threshold", 0.5, "--format", "delphi", "--batch-tokens", 50]
    here, there = here_and_there(ray_contexts, "contexts", "--out", *options)
    assert "which another takes" in there.stderr
    assert "No interpretable latent" not in here.output
    assert array_files(tmp_path / "there") == array_files(tmp_path / "here")
    assert not list((tmp_path / "there").glob(".parts*"))


def test_spliced(here_and_there: Callable[..., Any], tmp_path: Path) -> None:
    options = ["--spliced", "--rows", 50, "--batch-tokens", 48]
    _, there = here_and_there(ray_splicing, "evaluate", "--json", *options)
    assert "Spliced into tiny-llama on 50 rows" in there.stdout
    assert (tmp_path / "here").read_bytes() == (tmp_path / "there").read_bytes()
