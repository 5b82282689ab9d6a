"""Tasks that a pool of toy workers is handed, and what becomes of slow and of dying ones."""

from __future__ import annotations

import logging
import os
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from routesae_cache import ray_pool
from routesae_cache.devices import own_cores
from routesae_cache.ray_actor import Worker
from routesae_cache.ray_cluster import RayConfig
from routesae_cache.ray_pool import WorkersDieError, pool

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster


class Sleeper(Worker[float, int]):
    """Sleeps as long as it is told; dies of what is less than 0."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._asked = folder, 0
        self.hello = Path.cwd(), own_cores()

    def work(self, task: float) -> int:
        if task < 0:
            os._exit(1)
        if task > 1:
            logging.getLogger("routesae_cache.toy").warning("going to sleep for %g s", task)
        time.sleep(task)
        return os.getpid()

    def state(self) -> int:
        self._asked += 1
        return self._asked

    def close(self) -> None:
        (self._folder / str(os.getpid())).touch()


def test_a_slow_worker_is_named(
    cluster: Cluster,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_pool, "_STRAGGLES_S", 0.5)
    monkeypatch.chdir(tmp_path)
    config = RayConfig(address=cluster.address, workers=2)
    seen: list[bool] = []
    states: set[int] = set()
    with pool(config, partial(Sleeper, tmp_path), describe="a nap of {:g} s".format) as workers:
        folder, cores = workers.wait_for_one(lambda: None)
        assert folder == tmp_path  # for paths as they were given
        assert cores == 1  # of a node's

        def tick() -> None:
            seen.append(any(place.straggles for place in workers.places))
            states.update(place.state for place in workers.places if place.state is not None)

        workers.waiting.extend([0.1, 0.1, 0.1, 0.1, 3.0, 0.1])
        found = list(workers.results(tick))
        assert sorted(done.task for done in found) == [0.1] * 5 + [3.0]
        assert {done.result for done in found} <= {place.pid for place in workers.places}
    assert True in seen
    assert seen[-1] is False
    assert len(states) > 2
    slow = [m for m in caplog.messages if "is slow" in m]
    assert len(slow) == 1
    assert f"on {os.uname().nodename} is slow" in slow[0]
    assert "at a nap of 3 s so far, 0 s is usual" in slow[0]
    assert caplog.messages.count("going to sleep for 3 s") == 1  # what a worker logs comes here
    assert {int(file.name) for file in tmp_path.iterdir()} >= {done.result for done in found}


def test_workers_that_only_die(
    cluster: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = RayConfig(address=cluster.address, workers=1)
    with pool(config, partial(Sleeper, tmp_path), describe=str, ahead=2) as workers:
        workers.waiting.extend([-1.0, -2.0])
        with pytest.raises(WorkersDieError, match="died 4 times in a row and nothing was"):
            list(workers.results(lambda: None))
    assert caplog.text.count("died at -1.0") == 3
