"""Context mining on a Ray cluster: workers take chunks, what they find is put together in order."""

from __future__ import annotations

import math
import shutil
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np

from routesae_cache.contexts.activation_files import ActivationFile, read_activations
from routesae_cache.contexts.contexts import ContextsConfig, Mined, Mining
from routesae_cache.contexts.findings import Findings
from routesae_cache.contexts.mining import NO_TYPE, Activations
from routesae_cache.devices import resolve_device
from routesae_cache.ray_actor import Worker
from routesae_cache.ray_cluster import RayConfig
from routesae_cache.ray_pool import pool
from stores.place import Place
from stores.reader import StoreReader

_PARTS_PER_WORKER = 4
_AHEAD_PER_WORKER = 2  # parts that may be done or under way before the next in order

Chunks = tuple[int, ...]


def mine_on_ray(
    reader: StoreReader,
    runs: Sequence[Path],
    config: ContextsConfig,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    cluster: RayConfig,
) -> list[Mined]:
    """Find contexts as `mine_contexts` does, by the workers of a cluster; the files are the same.

    Raises what `mine_contexts` does, and ValueError where there is no such cluster or workers
    only die.
    """
    mining = Mining(reader, runs, replace(config, device="cpu"))
    parts = deque(_parts(reader.chunks(config.split), cluster.workers))
    cluster = replace(cluster, workers=min(cluster.workers, len(parts)))
    findings = mining.findings()
    with mining.alone():
        with (
            mining.files() as files,
            TemporaryDirectory(
                prefix=".parts-", dir=config.out, ignore_cleanup_errors=True
            ) as folder,
            pool(
                cluster,
                partial(_Miner, reader.path, runs, config, Path(folder)),
                describe=_describe,
            ) as workers,
        ):
            found: dict[int, _Part] = {}
            order = iter([part[0] for part in parts])
            expected, merged = next(order), 0

            def tick() -> None:
                at = [p.state for p in workers.places if p.state and p.in_hand == [p.state[0]]]
                done = merged + sum(part.tokens for part in found.values())
                progress(done + sum(tokens for _, tokens in at), mining.tokens)

            for _ in range(min(_AHEAD_PER_WORKER * cluster.workers, len(parts))):
                workers.waiting.append(parts.popleft())
            for done in workers.results(tick):
                found[done.task[0]] = done.result
                while part := found.pop(expected, None):
                    _merge(mining, findings, files, part)
                    merged += part.tokens
                    expected = next(order, -1)
                    if parts:
                        workers.waiting.append(parts.popleft())
        return mining.results(findings)


class _Part(NamedTuple):
    """What was found in some chunks."""

    findings: list[Findings]
    type_names: list[str]
    folder: Path
    """Of the files with the activations."""
    tokens: int


class _Miner(Worker[Chunks, _Part]):
    """Loads the SAEs once, looks through the chunks that it is told."""

    def __init__(
        self, store: Place, runs: Sequence[Path], config: ContextsConfig, folder: Path
    ) -> None:
        resolve_device(config.device)
        self._mining, self._folder = Mining(StoreReader(store), runs, config), folder
        self._at: tuple[Chunks, int] | None = None

    def work(self, task: Chunks) -> _Part:
        """Look through some chunks; the activations go to files."""
        tokens = 0

        def note(done: int, _: int) -> None:
            nonlocal tokens
            tokens, self._at = done, (task, done)

        folder = self._folder / str(task[0])
        folder.mkdir(exist_ok=True)
        findings = self._mining.findings()
        with self._mining.files(folder) as files:
            self._mining.mine(task, findings, files, note)
        return _Part(findings, self._mining.text.type_names, folder, tokens)

    def state(self) -> tuple[Chunks, int] | None:
        return self._at


def _merge(
    mining: Mining, findings: Sequence[Findings], files: Sequence[ActivationFile], part: _Part
) -> None:
    types = mining.text.numbers_of(part.type_names)
    for found, more in zip(findings, part.findings, strict=True):
        found.merge(more, types)
    context = mining.reader.spec.context
    for file, path in zip(files, mining.activations(part.folder), strict=True):
        for rows in read_activations(path):
            token_P = rows.row_P.astype(np.int64) * context + rows.position_P
            latent_P, type_P = rows.latent_P.astype(np.int64), np.full_like(token_P, NO_TYPE)
            file.add(Activations(token_P, latent_P, rows.value_P, rows.layer_P, type_P))
    shutil.rmtree(part.folder)


def _parts(chunks: Sequence[int], workers: int) -> list[Chunks]:
    """Runs of neighbouring chunks, a few for each worker."""
    size = math.ceil(len(chunks) / (_PARTS_PER_WORKER * workers))
    return [tuple(chunks[start : start + size]) for start in range(0, len(chunks), size)]


def _describe(chunks: Chunks) -> str:
    return f"chunks {chunks[0]} to {chunks[-1]}" if len(chunks) > 1 else f"chunk {chunks[0]}"
