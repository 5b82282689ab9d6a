"""A real Ray cluster of several node processes, and ways to watch and hurt it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from routesae_cache.ray_cluster import import_ray

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

import_ray()  # quietly
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A node without work for the driver, and three that take a worker each."""
    from ray.cluster_utils import Cluster

    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        for _ in range(3):
            found.add_node(num_cpus=1)
        yield found
        found.shutdown()


def begun(command: str, *arguments: object) -> subprocess.Popen[str]:
    """A command of the program, in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "cli.app", command, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # ignored, and inherited so, where the tests run in a shell's background
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def node_of(cluster: Cluster, pid: int) -> Any:
    """The node that a worker's process is on."""
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return next(
        node
        for node in cluster.worker_nodes
        if node.all_processes["raylet"][0].process.pid == parent
    )
