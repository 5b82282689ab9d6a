"""The Ray cluster that work is shared out on: one of this machine alone, or one that runs."""

from __future__ import annotations

import logging
import math
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from routesae_cache.devices import cores

LOCAL = "local"
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # what it would print about a worker's death, we say
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """Where the workers run, and how many."""

    address: str
    """`local` for a cluster of this machine alone that ends with the work, `auto` for the one
    that runs here, or HOST:PORT."""
    workers: int
    gpus_per_worker: float = 0.0

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers: expected at least 1, found {self.workers}")
        if not 0 <= self.gpus_per_worker < math.inf:
            raise ValueError(f"gpus per worker: expected 0 or more, found {self.gpus_per_worker}")
        known = self.address in (LOCAL, "auto")
        if not known and not re.fullmatch(r"[^:/]+:\d+|\[[^/]+\]:\d+", self.address):
            raise ValueError(
                f"ray: expected local, auto or HOST:PORT, found {self.address!r}; "
                "start the command on a node of the cluster"
            )
        import_ray()  # is found missing now

    @property
    def device(self) -> str:
        """Of every worker."""
        return "cuda" if self.gpus_per_worker else "cpu"


def import_ray() -> Any:
    """Ray, which is an extra; ValueError where it is not installed."""
    os.environ.update(_ENVIRONMENT)
    try:
        import ray
    except ImportError:
        raise ValueError(
            "--ray needs Ray, which is not installed: pip install 'routesae-cache[ray]'"
        ) from None
    return ray


@contextmanager
def cluster(config: RayConfig) -> Iterator[Any]:
    """Ray, connected; a local cluster is started, and ends with the block or the process.

    ValueError where there is none, or not the GPUs for a worker.
    """
    ray = import_ray()
    where: dict[str, Any] = {"address": config.address}
    if config.address == LOCAL:
        where |= {"num_cpus": max(config.workers, cores()), "include_dashboard": False}
        where |= {"object_store_memory": 100 << 20}  # little goes through it
    try:
        if config.address not in (LOCAL, "auto"):  # Ray itself tries for a minute
            host, _, port = config.address.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        ray.init(**where, log_to_driver=False, logging_level=logging.CRITICAL)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ValueError(
            f"no Ray cluster at {config.address!r}: {error}\nStart one with `ray start --head` "
            "and this command on one of its nodes, or use --ray local"
        ) from error
    try:
        gpus = ray.cluster_resources().get("GPU", 0)
        if config.gpus_per_worker > gpus:
            raise ValueError(
                f"a worker is to have {config.gpus_per_worker:g} GPUs, the Ray cluster has "
                f"{gpus:g}; lower --gpus-per-worker (0: on CPUs)"
            )
        yield ray
    finally:
        ray.shutdown()


def threads_of_each(ray: Any, config: RayConfig) -> int:
    """PyTorch's threads in each worker: cores of the smallest node, over its workers."""
    if config.address == LOCAL:
        return max(1, cores() // config.workers)
    found = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    nodes = [int(n) for n in found if n >= 1]
    return max(1, min(nodes, default=1) // math.ceil(config.workers / max(1, len(nodes))))
