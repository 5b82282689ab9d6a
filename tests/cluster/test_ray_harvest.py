"""A harvest on a real Ray cluster of several node processes, and what it survives."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from routesae_cache.harvest import HarvestProgress, harvest
from routesae_cache.harvest_plan import HarvestConfig, HarvestPlan, plan_harvest
from routesae_cache.ray_cluster import RayConfig, import_ray
from routesae_cache.ray_harvest import harvest_on_ray
from stores.errors import NonFiniteError, SpecMismatchError, StoreLockedError
from stores.locks import FOLDER
from stores.reader import StoreReader
from tests.cluster.conftest import begun, node_of, wait_until
from tests.pipeline_helpers import TINY, array_files, config, run

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

TOKENS = 3000  # in 48 chunks


@pytest.fixture(scope="module")
def reference(tiny_model_dir: Path, tiny_corpus: Path, tmp_path_factory: Any) -> StoreReader:
    """A harvest by one process."""
    out = tmp_path_factory.mktemp("ref") / "s.zarr"
    return run(config(tiny_model_dir, tiny_corpus, out, tokens=TOKENS))


@pytest.fixture
def wanted(tiny_model_dir: Path, tiny_corpus: Path, tmp_path: Path) -> HarvestConfig:
    return config(tiny_model_dir, tiny_corpus, tmp_path / "s.zarr", tokens=TOKENS, device="cpu")


def plan(wanted: HarvestConfig) -> HarvestPlan:
    return plan_harvest(wanted, here=False)


def committed(store: Path) -> int:
    folder = store / "committed" / "c"
    return len(list(folder.iterdir())) if folder.exists() else 0


def test_a_worker_and_a_node_are_killed(
    cluster: Cluster,
    reference: StoreReader,
    wanted: HarvestConfig,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    cluster.add_node(num_cpus=1)
    killed: list[str] = []
    pids: list[int] = []
    states: list[HarvestProgress] = []

    def progress(state: HarvestProgress) -> None:
        states.append(state)
        busy = [worker for worker in state.workers if worker.chunks and worker.pid not in pids]
        if not busy:
            return
        assert busy[-1].pid is not None
        assert all(len(worker.chunks) <= 2 for worker in busy)
        if state.done > 5 * 64 and not killed:
            os.kill(busy[-1].pid, signal.SIGKILL)
            killed.append("worker")
            pids.append(busy[-1].pid)
        elif state.done > 12 * 64 and len(killed) == 1:
            node = node_of(cluster, busy[-1].pid)
            os.kill(busy[-1].pid, signal.SIGKILL)  # with everything on it
            cluster.remove_node(node, allow_graceful=False)
            killed.append("node")

    result = harvest_on_ray(plan(wanted), RayConfig(address=cluster.address, workers=4), progress)
    assert killed == ["worker", "node"]
    assert sum(worker.deaths for worker in result.workers) >= 2
    assert result.tokens <= reference.spec.chunks * 64
    assert states[-1].done == states[-1].total
    assert {worker.host for worker in states[-1].workers if worker.host} == {os.uname().nodename}
    assert caplog.text.count("died") >= 2
    assert array_files(wanted.out) == array_files(reference.path)
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "")


def test_what_a_worker_finds_wrong_ends_the_harvest(
    cluster: Cluster, tiny_model: Any, tiny_tokenizer: Any, wanted: HarvestConfig, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    broken = config(tmp_path / "model", Path(wanted.dataset), wanted.out, device="cpu")
    with pytest.raises(NonFiniteError, match="layer 2") as caught:
        harvest_on_ray(plan(broken), RayConfig(address=cluster.address, workers=2))
    assert caught.value.layer == 2
    assert StoreReader(wanted.out).committed == []
    assert not import_ray().is_initialized()


def test_another_model_than_the_stores_is_refused(
    cluster: Cluster, tiny_model: Any, tiny_tokenizer: Any, wanted: HarvestConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "tiny"
    tiny_tokenizer.save_pretrained(folder)
    model = tiny_model("llama")
    model.save_pretrained(folder)
    small = config(folder, Path(wanted.dataset), wanted.out, tokens=64, device="cpu")
    run(small)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight += 0.1
    model.save_pretrained(folder)
    before = array_files(wanted.out)
    larger = config(folder, Path(wanted.dataset), wanted.out, tokens=300, device="cpu")
    with pytest.raises(SpecMismatchError, match=r"model\.weights"):
        harvest_on_ray(plan(larger), RayConfig(address=cluster.address, workers=1))
    assert array_files(wanted.out) == before


def test_gpus_that_are_not_there(cluster: Cluster, wanted: HarvestConfig) -> None:
    with pytest.raises(ValueError, match=r"to have 1 GPUs, the Ray cluster has 0"):
        harvest_on_ray(
            plan(wanted), RayConfig(address=cluster.address, workers=1, gpus_per_worker=1)
        )
    assert not wanted.out.exists()


def test_no_cluster_there(wanted: HarvestConfig) -> None:
    with pytest.raises(ValueError, match=r"no Ray cluster at '127\.0\.0\.1:1'"):
        harvest_on_ray(plan(wanted), RayConfig(address="127.0.0.1:1", workers=1))
    assert not wanted.out.exists()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_driver_is_killed(
    how: signal.Signals, cluster: Cluster, reference: StoreReader, wanted: HarvestConfig
) -> None:
    options = {"out": wanted.out, "model": wanted.model, "dataset": wanted.dataset}
    options |= {"tokens": TOKENS, "eval-tokens": TINY["eval_tokens"], "codec": "int8"}
    options |= {name.replace("_", "-"): TINY[name] for name in ("context", "layers", "dtype")}
    options |= {"chunk-rows": 4, "batch-rows": 2, "ray": "local", "workers": 2}
    driver = begun("harvest", *(f"--{name}={value}" for name, value in options.items()))
    wait_until(lambda: committed(wanted.out) >= 5)
    driver.send_signal(how)
    shown, _ = driver.communicate(timeout=60)
    assert driver.returncode == {signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}[how]
    assert "ray" not in shown.replace("--ray", "").replace(str(wanted.out), "").lower()
    done = committed(wanted.out)
    assert done < reference.spec.chunks
    if how == signal.SIGINT:  # gone on with by Ray or without
        assert "Stopped" in shown
        harvest_on_ray(plan(wanted), RayConfig(address=cluster.address, workers=2))
    else:
        wait_until(lambda: _harvested(wanted))
    assert not (wanted.out / FOLDER).exists()
    assert array_files(wanted.out) == array_files(reference.path)


def _harvested(wanted: HarvestConfig) -> bool:
    """By this process alone, once the workers of the killed driver have ended."""
    try:
        harvest(plan_harvest(wanted))
    except StoreLockedError:
        return False
    return True
