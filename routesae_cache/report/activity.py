"""What SAEs do on held-out text: one pass over the rows of a store that the page shows."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from routesae_cache.checkpoint import RunError
from routesae_cache.trained import Residuals, TrainedSae, layers_read
from stores.codecs import Float32
from stores.reader import StoreReader

logger = logging.getLogger(__name__)

STRONGEST = 6
"""Latents listed for a token of a passage."""


class Window(NamedTuple):
    """A latent and the part of a row to read it over."""

    latent: int
    row: int
    first: int
    last: int
    """Included."""


class Passage(NamedTuple):
    """A stretch of one row, to be read as text."""

    row: int
    first: int
    last: int
    """Included."""
    title: str
    """Of its document, empty where it is not known."""


class Shading(NamedTuple):
    """Where in a window a latent is active."""

    offset_P: list[int]
    """From the window's first position, ascending."""
    value_P: list[float]


class Routing(NamedTuple):
    """How one router read a passage of T tokens."""

    layer_T: list[int]
    """Index into the SAE's layers; under soft routing that of the largest part."""
    router_TL: Float32
    latents_T: list[list[tuple[int, float]]]
    """The strongest latents of each token and their activations, strongest first."""


class Density(NamedTuple):
    """How often latents are active on a sample of the eval split."""

    share_F: NDArray[np.float64]
    """Of the coded vectors."""
    tokens: int


@dataclass(frozen=True, kw_only=True)
class ActivityPlan:
    """What is to be read."""

    windows: Mapping[str, Sequence[Window]]
    """Of each run."""
    passages: Sequence[Passage]
    density_tokens: int
    """At least so many tokens of the eval split, if there are as many."""
    batch_tokens: int = 2048


@dataclass(frozen=True, kw_only=True)
class Activity:
    """What was read, by run."""

    shading: dict[str, dict[Window, Shading]]
    routing: dict[str, list[Routing]]
    """Of SAEs with a router, a passage each."""
    density: dict[str, Density]


def load_saes(runs: Mapping[str, Path], reader: StoreReader, device: str) -> dict[str, TrainedSae]:
    """The SAEs that can read this store, by id; the others are named in the log."""
    saes = {}
    for id, folder in runs.items():
        try:
            saes[id] = TrainedSae(folder, reader.spec, device=device)
        except RunError as error:
            logger.warning("%s; its latents are not read again", error)
    return saes


def read_activity(
    reader: StoreReader,
    saes: Mapping[str, TrainedSae],
    plan: ActivityPlan,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Activity:
    """Read what the plan asks for, a chunk at a time; `progress(done, total)` counts chunks."""
    readers = {id: _Reader(sae, plan, plan.windows.get(id, ())) for id, sae in saes.items()}
    sampled = set(_sampled_chunks(reader, plan.density_tokens))
    size = reader.spec.chunk_rows
    rows = {window.row for windows in plan.windows.values() for window in windows}
    rows |= {passage.row for passage in plan.passages}
    chunks = sorted(sampled | {row // size for row in rows})
    layers = layers_read(sae.config for sae in saes.values())
    device = next((next(sae.sae.parameters()).device for sae in saes.values()), None)
    for done, chunk in enumerate(chunks if saes else ()):
        progress(done, len(chunks))
        x_NLD = reader.residuals(chunk, layers)
        counted_N = reader.rows(chunk).counted_RT().reshape(-1)
        part = _Chunk(chunk * size, reader.spec.context, x_NLD, layers, counted_N)
        everyone = list(readers.values())
        # of a sampled chunk all read every token, and the tokens are normalised once for all
        groups = [(counted_N, everyone)]
        if chunk not in sampled:
            groups = [(counted_N & one.wanted_N(part), [one]) for one in everyone]
        for wanted_N, members in groups:
            for index_N in _batches(np.nonzero(wanted_N)[0], plan.batch_tokens):
                residuals = part.residuals(index_N, device)
                for one in members:
                    one.encode(index_N, residuals)
        for one in everyone:
            one.finish(part, device, sampled=chunk in sampled)
    progress(len(chunks), len(chunks))
    return Activity(
        shading={id: one.shading for id, one in readers.items()},
        routing={
            id: [one.routing[passage] for passage in plan.passages]
            for id, one in readers.items()
            if one.routes
        },
        density={id: one.density() for id, one in readers.items() if sampled},
    )


class _Chunk(NamedTuple):
    first_row: int
    context: int
    x_NLD: Float32
    layers: tuple[int, ...]
    counted_N: NDArray[np.bool_]

    def positions(self, row: int, first: int, last: int) -> slice:
        """Where a stretch of a row is among the chunk's tokens."""
        start = (row - self.first_row) * self.context
        return slice(start + first, start + last + 1)

    def holds(self, row: int) -> bool:
        return 0 <= row - self.first_row < len(self.counted_N) // self.context

    def residuals(self, index: NDArray[np.intp] | slice, device: torch.device | None) -> Residuals:
        return Residuals(torch.from_numpy(self.x_NLD[index]).to(device), self.layers)


class _Reader:
    """One SAE's part of the pass."""

    def __init__(self, sae: TrainedSae, plan: ActivityPlan, windows: Sequence[Window]) -> None:
        self._sae, self._plan, self._windows = sae, plan, windows
        self.routes = sae.config.sae.selector == "route"
        self.shading: dict[Window, Shading] = {}
        self.routing: dict[Passage, Routing] = {}
        self._fired_F = np.zeros(sae.config.sae.latents, np.int64)
        self._tokens = self._read = 0
        self._found: list[tuple[NDArray[np.intp], NDArray[np.int64], Float32]] = []

    def wanted_N(self, chunk: _Chunk) -> NDArray[np.bool_]:
        """The tokens of a chunk that windows show."""
        wanted_N = np.zeros(len(chunk.counted_N), np.bool_)
        for window in self._windows_in(chunk):
            wanted_N[chunk.positions(*window[1:])] = True
        return wanted_N

    def encode(self, index_N: NDArray[np.intp], residuals: Residuals) -> None:
        """Read tokens, given with their places in the chunk."""
        pairs = self._sae.read(residuals.seen_by(self._sae.config).x).latents.pairs()
        row_P, latent_P, value_P = (part.cpu().numpy() for part in pairs)
        self._found.append((index_N[row_P // self._vectors_a_token], latent_P, value_P))
        self._read += len(index_N)

    def finish(self, chunk: _Chunk, device: torch.device | None, *, sampled: bool) -> None:
        """Take up what was read of a chunk."""
        if self._found:
            token_P, latent_P, value_P = (
                np.concatenate(parts) for parts in zip(*self._found, strict=True)
            )
            if sampled:
                self._fired_F += np.bincount(latent_P, minlength=len(self._fired_F))
                self._tokens += self._read
            self._shade(chunk, token_P, latent_P, value_P)
        self._found, self._read = [], 0
        if self.routes:
            for passage in self._plan.passages:
                if chunk.holds(passage.row):
                    self.routing[passage] = self._route(chunk, passage, device)

    def density(self) -> Density:
        """Divide."""
        return Density(self._fired_F / max(self._tokens * self._vectors_a_token, 1), self._tokens)

    @property
    def _vectors_a_token(self) -> int:
        every = self._sae.config.sae.selector == "every"
        return len(self._sae.config.sae.layers) if every else 1

    def _windows_in(self, chunk: _Chunk) -> list[Window]:
        return [window for window in self._windows if chunk.holds(window.row)]

    def _shade(
        self,
        chunk: _Chunk,
        token_P: NDArray[np.intp],
        latent_P: NDArray[np.int64],
        value_P: Float32,
    ) -> None:
        size = len(chunk.counted_N)
        key_P = latent_P * size + token_P
        order = np.argsort(key_P, kind="stable")
        key_P, token_P, value_P = key_P[order], token_P[order], value_P[order]
        for window in self._windows_in(chunk):
            where = chunk.positions(*window[1:])
            ends = window.latent * size + np.array([where.start, where.stop])
            begin, end = np.searchsorted(key_P, ends)
            values: dict[int, float] = {}
            for token, value in zip(token_P[begin:end], value_P[begin:end], strict=True):
                offset = int(token) - where.start
                if value > 0:
                    values[offset] = max(values.get(offset, 0.0), float(value))
            self.shading[window] = Shading(list(values), list(values.values()))

    def _route(self, chunk: _Chunk, passage: Passage, device: torch.device | None) -> Routing:
        residuals = chunk.residuals(chunk.positions(*passage[:3]), device)
        output = self._sae.read(residuals.seen_by(self._sae.config).x)
        assert output.router_NL is not None
        layer_N = output.router_NL.argmax(-1) if output.layer_M is None else output.layer_M
        dense_NF = output.latents.dense(self._sae.config.sae.latents)
        value_NK, index_NK = dense_NF.topk(min(STRONGEST, dense_NF.shape[1]), dim=-1)
        latents = [
            [(index, value) for index, value in zip(*token, strict=True) if value > 0]
            for token in zip(index_NK.tolist(), value_NK.tolist(), strict=True)
        ]
        return Routing(layer_N.tolist(), output.router_NL.cpu().numpy(), latents)


def _batches(index_N: NDArray[np.intp], size: int) -> Iterator[NDArray[np.intp]]:
    for start in range(0, len(index_N), size):
        yield index_N[start : start + size]


def _sampled_chunks(reader: StoreReader, tokens: int) -> list[int]:
    """Evenly spaced chunks of the eval split with so many tokens."""
    chunks = reader.chunks("eval", complete=False) if tokens else []
    wanted = -(-tokens // (reader.spec.chunk_rows * reader.spec.context))
    return chunks[:: max(1, len(chunks) // wanted)][:wanted] if chunks else []


def choose_passages(reader: StoreReader, count: int, length: int) -> list[Passage]:
    """Stretches of evenly spaced rows of the eval split, each within one document.

    The first position of a row is not among them: no SAE reads it.
    """
    found: list[Passage] = []
    chunks = reader.chunks("eval", complete=False)
    per_chunk = -(-count // max(1, min(count, len(chunks))))
    for chunk in chunks[:: max(1, len(chunks) // count)]:
        rows = reader.rows(chunk)
        step = max(1, len(rows.lengths_R) // per_chunk)
        for index in range(0, len(rows.lengths_R), step)[:per_chunk]:
            first_row = reader.spec.chunk_range(chunk).start
            end = int(rows.lengths_R[index])
            passage = passage_of(first_row + index, end, rows.documents[index], length)
            if passage.last > passage.first:
                found.append(passage)
    return found[:count]


def passage_of(row: int, end: int, documents: str, length: int) -> Passage:
    """The beginning of a row's longest piece of one document.

    Args:
        end: how many real tokens the row has.
        documents: as `TokenRows.documents` has them.
        length: in tokens, at most.
    """
    # nothing reads the first position of a row
    begun = [(max(at, 1), about) for at, about in json.loads(documents) if at < end]
    starts = [(1, {}), *begun] if not begun or begun[0][0] > 1 else begun
    stops = [start - 1 for start, _ in starts[1:]] + [end]  # before the separator
    pieces = [
        (min(stop - start, length), position)
        for position, ((start, _), stop) in enumerate(zip(starts, stops, strict=True))
    ]
    # of those long enough, one that begins in this row: its title is known
    size, best = max(pieces, key=lambda piece: (piece[0], piece[1] > 0))
    start, about = starts[best]
    return Passage(row, start, start + size - 1, str(about.get("title", "")))
