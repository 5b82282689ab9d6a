"""A training pass on a real Ray cluster: the weights of one pass, whatever dies."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from routesae_cache import ray_train
from routesae_cache.loggers import LogConfig
from routesae_cache.ray_cluster import RayConfig
from routesae_cache.ray_pool import Pool
from routesae_cache.ray_train import train_on_ray
from routesae_cache.runs import Asked
from routesae_cache.train import TrainProgress, train
from routesae_cache.train_plan import TrainConfig, TrainStart
from stores.reader import StoreReader
from tests.cluster.conftest import begun, node_of, wait_until
from tests.pipeline_helpers import config, run, topk
from tests.store_helpers import chunk_file

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

LAYERS = (1, 2, 3)
SAES = [
    Asked(topk((3,)), 1),
    Asked(topk(LAYERS, route_estimator="straight-through", init_bias="mean"), 1),
    Asked(topk((1,), coder="relu", k=None, sparsity_weight=0.1), 1, 1e30),
    Asked(topk((3,), coder="batchtopk"), 2),
    Asked(topk((1,), norm="scalar"), 1),
]
OPTIONS: dict[str, Any] = {"epochs": 120, "batch_tokens": 64, "log_every": 240}


@pytest.fixture(scope="module")
def reader(tiny_model_dir: Path, tiny_corpus: Path, tmp_path_factory: Any) -> StoreReader:
    folder = tmp_path_factory.mktemp("t")
    return run(config(tiny_model_dir, tiny_corpus, folder / "s.zarr", tokens=2000))


@pytest.fixture(scope="module")
def alone(reader: StoreReader, tmp_path_factory: Any) -> Path:
    """The runs of one process."""
    out: Path = tmp_path_factory.mktemp("alone")
    result = train(reader, SAES, TrainConfig(out=out, **OPTIONS))
    assert [state.status for state in result.runs] == ["done", "done", "failed", "done", "done"]
    return out


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[Pool[Any, Any]]:
    """The pools that are made, for their workers' process numbers."""
    found: list[Pool[Any, Any]] = []
    original = ray_train.pool

    @contextmanager
    def watched(*args: Any, **kwargs: Any) -> Iterator[Pool[Any, Any]]:
        with original(*args, **kwargs) as made:
            found.append(made)
            yield made

    monkeypatch.setattr(ray_train, "pool", watched)
    return found


def outcome(runs: Path) -> dict[str, Any]:
    """What a pass left: weights, why runs failed, and metrics but for their times."""
    found: dict[str, Any] = {}
    for file in sorted(runs.glob("*/*")):
        name = str(file.relative_to(runs))
        if file.suffix == ".jsonl":
            lines = map(json.loads, file.read_text().splitlines())
            found[name] = [line | {"seconds": 0, "crc32c": 0} for line in lines]
        elif file.is_file():
            found[name] = file.read_bytes()
    return found


def test_a_worker_and_a_node_are_killed(
    cluster: Cluster,
    reader: StoreReader,
    alone: Path,
    pools: list[Pool[Any, Any]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cluster.add_node(num_cpus=1)
    started: list[TrainStart] = []
    seen: list[TrainProgress] = []
    killed: list[str] = []

    def progress(state: TrainProgress) -> None:
        seen.append(state)
        busy = [p for p in pools[0].places if p.state and p.in_hand]
        at = [p for p in busy if 150 < p.state.progress.step < 2500]  # far from its end
        if at and at[0].pid is not None and not killed:
            os.kill(at[0].pid, signal.SIGKILL)
            killed.append("worker")
        elif len(at) > 1 and at[1].pid is not None and len(killed) == 1:
            node = node_of(cluster, at[1].pid)
            os.kill(at[1].pid, signal.SIGKILL)
            cluster.remove_node(node, allow_graceful=False)
            killed.append("node")

    wanted = TrainConfig(
        out=tmp_path, checkpoint_seconds=0.1, log=LogConfig(to=("tensorboard",)), **OPTIONS
    )
    result = train_on_ray(
        reader,
        SAES,
        wanted,
        progress,
        cluster=RayConfig(address=cluster.address, workers=3),
        on_start=started.append,
    )
    assert killed == ["worker", "node"]
    assert sum(place.deaths for place in pools[0].places) >= 2
    assert caplog.text.count("which another takes") >= 2
    assert "the loss was" in caplog.text
    assert [state.status for state in result.runs] == ["done", "done", "failed", "done", "done"]
    found, wanted_files = outcome(tmp_path), outcome(alone)
    failed = {name for name in found | wanted_files if "lr1e+30" in name}
    assert any(name.endswith("failed.json") for name in failed & found.keys())
    for name in failed:  # a checkpoint finds it, too, and then earlier than a line of metrics
        found.pop(name, None), wanted_files.pop(name, None)
    assert found == wanted_files
    assert len(list(tmp_path.glob("*/tensorboard/events*"))) >= 5
    assert [start.saes for start in started] == [5]
    assert started[0].total_steps == result.tokens // 64 == seen[-1].total_steps
    steps = [state.step for state in seen]
    assert steps[0] == 0
    assert 0 < sorted(steps)[len(steps) // 2] < steps[-1] == started[0].total_steps


def test_workers_read_what_the_driver_has_found(
    cluster: Cluster, reader: StoreReader, tmp_path: Path
) -> None:
    """Although a harvest has gone on when they open the store."""
    store = tmp_path / "s.zarr"
    shutil.copytree(reader.path, store)
    marker = chunk_file(store, "committed", reader.spec.chunks // 2)
    content = marker.read_bytes()
    marker.unlink()

    def commit(_: TrainStart) -> None:
        marker.write_bytes(content)

    sizes: dict[str, Any] = {"batch_tokens": 64, "so_far": True}
    train(StoreReader(store), SAES[:2], TrainConfig(out=tmp_path / "alone", **sizes))
    result = train_on_ray(
        StoreReader(store),
        SAES[:2],
        TrainConfig(out=tmp_path / "runs", **sizes),
        cluster=RayConfig(address=cluster.address, workers=1),
        on_start=commit,
    )
    assert StoreReader(store).committed == reader.committed
    assert [state.status for state in result.runs] == ["done", "done"]
    one, two = (outcome(tmp_path / name) for name in ("alone", "runs"))
    assert one == two


def test_stopped_and_gone_on_with(cluster: Cluster, reader: StoreReader, tmp_path: Path) -> None:
    """Ctrl-C in the command; the rest is done without Ray."""
    (tmp_path / "two.toml").write_text(
        "[train]\nepochs = 40\nbatch_tokens = 16\nlatents = 64\nk = 4\ninit_bias = 'zero'\n"
        '[[sae]]\nsae = "topk"\nlayer = [1, 3]\n'
    )
    given = [reader.path, tmp_path / "two.toml", "--out", tmp_path / "runs"]
    driver = begun("sweep", *given, "--ray", cluster.address, "--workers", 2)
    folders = [tmp_path / "runs" / f"topk_layer{layer}_k4_f64_s42" for layer in (1, 3)]
    lines = [folder / "metrics.jsonl" for folder in folders]
    wait_until(lambda: all(file.exists() and file.stat().st_size for file in lines))
    driver.send_signal(signal.SIGINT)
    shown, _ = driver.communicate(timeout=60)
    assert driver.returncode == 130, shown
    assert shown.count("interrupted") == 2, shown
    assert "--resume" in shown
    assert all((folder / "checkpoint.safetensors").exists() for folder in folders)
    asked = [Asked(topk((layer,)), 42) for layer in (1, 3)]
    whole = TrainConfig(out=tmp_path / "whole", epochs=40, batch_tokens=16)
    cut = TrainConfig(out=tmp_path / "runs", epochs=40, batch_tokens=16, resume=True)
    assert 0 < train(reader, asked, cut).tokens < train(reader, asked, whole).tokens
    assert outcome(tmp_path / "runs") == outcome(tmp_path / "whole")
    again = train_on_ray(  # there is nothing to do: no cluster is looked for
        reader, asked, cut, cluster=RayConfig(address="127.0.0.1:1", workers=2)
    )
    assert (again.tokens, [state.status for state in again.runs]) == (0, ["done", "done"])
