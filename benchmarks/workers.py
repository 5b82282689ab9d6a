"""Harvest tokens/s of several single-thread workers over that of one, with Ray and without.

A rate is taken while all workers are at work: not from before the last has loaded the model, nor
after the first has nothing left to do; it is nan where there was no such time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import FOLDER, interleaved, show, spread

OUT = FOLDER / "workers.zarr"
WAYS = ("ray", "share")
Event = tuple[float, int, bool]
"""When, tokens done, whether all workers are at work."""


def main() -> None:
    options = _options()
    if options.child:
        print(json.dumps(_child(options)))
        return
    kinds = [(way, workers) for way in options.ways for workers in options.workers]
    digests: set[str] = set()

    def measure(way: str, workers: int) -> float:
        shutil.rmtree(OUT, ignore_errors=True)
        rate = _ray_rate(workers) if way == "ray" else _share_rate(workers)
        digests.add(_digest(OUT))
        return rate

    rounds = interleaved(options.rounds, [lambda kind=kind: measure(*kind) for kind in kinds])
    shutil.rmtree(OUT)
    rates = dict(zip(kinds, zip(*rounds, strict=True), strict=True))
    rows = []
    for (way, workers), found in rates.items():
        ratios = [a / b for a, b in zip(found, rates.get((way, 1), found), strict=True)]
        name = "--ray local" if way == "ray" else "--worker I/N"
        rows.append((f"{name}, {workers}", spread(found, ",.0f"), spread(ratios)))
    same = "all the same, byte for byte" if len(digests) == 1 else f"{len(digests)} different ones"
    show(
        f"Harvest of {options.tokens} tokens by workers of one thread each, {options.rounds} "
        f"rounds of {options.model}; wanted: 2 workers ÷ 1 of 1.8; the stores: {same}",
        ("workers", "tokens/s", "÷ 1 worker"),
        rows,
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="a tiny one to try this out")
    parser.add_argument("--dataset", default="news")
    parser.add_argument("--tokens", type=int, default=49152)
    parser.add_argument("--context", type=int, default=512, help="fewer for a tiny model")
    parser.add_argument("--layers", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=WAYS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def _ray_rate(workers: int) -> float:
    (events,) = _children([f"ray:{workers}"], [range(workers)])
    busy = [event for event in _when_done_grew(events) if event[2]]
    if len(busy) < 2:
        return math.nan
    (begin, before, _), (end, after, _) = busy[0], busy[-1]
    return (after - before) / (end - begin)


def _share_rate(workers: int) -> float:
    shares = [f"{index}/{workers}" for index in range(workers)]
    each = _children(shares, [range(index, index + 1) for index in range(workers)])
    begin, end = max(events[0][0] for events in each), min(events[-1][0] for events in each)
    if end <= begin:
        return math.nan
    done = 0.0
    for events in each:
        times, tokens, _ = zip(*events, strict=True)
        done += float(np.diff(np.interp([begin, end], times, tokens))[0])
    return done / (end - begin)


def _when_done_grew(events: Sequence[Event]) -> list[Event]:
    return [later for before, later in pairwise(events) if later[1] > before[1]]


def _children(kinds: Sequence[str], cores: Sequence[range]) -> list[list[Event]]:
    """Processes that harvest at once, each on its cores (counted modulo those there are)."""
    here = sorted(os.sched_getaffinity(0))
    started = []
    for kind, mine in zip(kinds, cores, strict=True):
        chosen = {here[core % len(here)] for core in mine}

        def pin(chosen: set[int] = chosen) -> None:
            os.sched_setaffinity(0, chosen)

        command = [sys.executable, "-m", "benchmarks.workers", *sys.argv[1:], "--child", kind]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        started.append(
            subprocess.Popen(
                command, stdout=subprocess.PIPE, text=True, preexec_fn=pin, env=environment
            )
        )
    shown = [process.communicate()[0] for process in started]
    assert all(process.returncode == 0 for process in started)
    return [[tuple(event) for event in json.loads(text.splitlines()[-1])] for text in shown]


def _child(options: argparse.Namespace) -> list[Event]:
    """One worker of several, or a driver with a cluster of its own."""
    from routesae_cache.harvest import HarvestProgress
    from routesae_cache.harvest_plan import HarvestConfig, plan_harvest
    from routesae_cache.ray_cluster import RayConfig
    from routesae_cache.ray_harvest import harvest_on_ray
    from routesae_cache.workers import Share, harvest_share

    events: list[Event] = []

    def note(state: HarvestProgress) -> None:
        if state.phase == "residuals":
            busy = all(worker.chunks and worker.tokens_per_second for worker in state.workers)
            events.append((time.time(), state.done, busy))

    config: dict[str, Any] = {name: getattr(options, name) for name in ("model", "dataset")}
    config |= {"tokens": options.tokens, "context": options.context, "layers": options.layers}
    plan = plan_harvest(
        HarvestConfig(out=OUT, eval_tokens=0, chunk_rows=4, device="cpu", **config), here=False
    )
    way, _, workers = options.child.partition(":")
    if way == "ray":
        harvest_on_ray(plan, RayConfig(address="local", workers=int(workers)), note)
    else:
        harvest_share(plan, Share.parse(way), note)
    return events


def _digest(store: Path) -> str:
    """Of every file of a store, by its place in it."""
    found = hashlib.sha256()
    for path in sorted(path for path in store.rglob("*") if path.is_file()):
        found.update(f"{path.relative_to(store)} {path.stat().st_size}\n".encode())
        found.update(path.read_bytes())
    return found.hexdigest()


if __name__ == "__main__":
    main()
