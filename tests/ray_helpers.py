"""The driver's part of work on Ray, tried without Ray: a pool whose workers are in this process."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest

from routesae_cache import ray_cluster
from routesae_cache.ray_cluster import RayConfig
from routesae_cache.ray_pool import Done, Place


class InlinePool:
    """Does tasks by turns, the last that waits first, so that results come out of order."""

    def __init__(self, config: RayConfig, make: Callable[[], Any]) -> None:
        self.places = [
            Place[Any](index=index, actor=pickle.loads(pickle.dumps(make))(), host="here")
            for index in range(config.workers)
        ]
        self.waiting: deque[Any] = deque()

    def results(self, tick: Callable[[], None]) -> Iterator[Done[Any, Any]]:
        turn = 0
        while self.waiting:
            place = self.places[turn % len(self.places)]
            place.in_hand = [pickle.loads(pickle.dumps(self.waiting.pop()))]
            result = pickle.loads(pickle.dumps(place.actor.work(place.in_hand[0])))
            place.state = place.actor.state()
            tick()
            yield Done(place.in_hand.pop(), result, place.index)
            turn += 1
        tick()


def without_ray(patch: pytest.MonkeyPatch, module: ModuleType) -> None:
    """Have a module use such a pool."""

    @contextmanager
    def inline(config: RayConfig, make: Any, **_: Any) -> Iterator[InlinePool]:
        yield InlinePool(config, make)

    patch.setattr(ray_cluster, "import_ray", lambda: None)
    patch.setattr(module, "pool", inline)
