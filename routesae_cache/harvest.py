"""Text and a model -> a store: token rows first, then residuals chunk by chunk."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from routesae_cache.harvest_plan import HarvestPlan
from routesae_cache.lm import LanguageModel, load_lm
from routesae_cache.text import TextSource
from routesae_cache.tokens import Row, rows
from stores.codecs import Codes, Encoded, Float32, join_blocks
from stores.errors import NonFiniteError, SpecMismatchError, StoreError
from stores.layout import TokenRows
from stores.places import as_place
from stores.reader import StoreReader
from stores.spec import Record, StoreSpec
from stores.stats import StatsBuilder
from stores.writer import StoreWriter

logger = logging.getLogger(__name__)
_IN_FLIGHT = 2  # batches waiting to be encoded while the model goes on


@dataclass(frozen=True, kw_only=True)
class WorkerProgress:
    """What one of several workers is at."""

    index: int
    host: str | None
    """None until it has loaded the model."""
    pid: int | None
    tokens_per_second: float
    chunks: tuple[int, ...]
    """In hand; the first is what it is at."""
    seconds: float
    """At this chunk so far."""
    straggles: bool
    """It takes several times as long as is usual."""


@dataclass(frozen=True, kw_only=True)
class HarvestProgress:
    """How far a harvest is; `done` and `total` are tokens, or seconds and 0 while it waits."""

    phase: Literal["waiting", "loading", "tokens", "residuals"]
    done: int
    total: int
    bytes_written: int = 0
    values_written: int = 0
    """In the chunks that took `bytes_written`."""
    workers: tuple[WorkerProgress, ...] = ()
    """Of a harvest on Ray."""


@dataclass(frozen=True, kw_only=True)
class HarvestResult:
    """What a call of `harvest` did."""

    spec: StoreSpec
    tokens: int
    """Whose residuals were computed in this call."""
    seconds: float
    """In forward passes, encoding and writing."""


Progress = Callable[[HarvestProgress], None]


def harvest(plan: HarvestPlan, progress: Progress = lambda _: None) -> HarvestResult:
    """Carry out a plan; whatever instant it ends at, calling it again goes on from there.

    Raises SpecMismatchError where the store has another model's residuals or another text's
    tokens, StoreLockedError while another process writes, NonFiniteError, and OSError where the
    disk is full: what is committed stays.
    """
    plan.check_disk()
    lm = load_model(plan)
    with store_with_rows(plan, lm.identity.to_dict(), progress) as writer:
        start = time.perf_counter()
        tokens = fill_residuals(writer, lm, writer.pending(), progress)
        return HarvestResult(spec=writer.spec, tokens=tokens, seconds=time.perf_counter() - start)


def load_model(plan: HarvestPlan) -> LanguageModel:
    """The model of a plan, on its device."""
    return load_lm(
        plan.model,
        dtype=plan.config.dtype,
        device=plan.device,
        attention=plan.config.attention,
    )


@contextmanager
def store_with_rows(plan: HarvestPlan, model: Record, progress: Progress) -> Iterator[StoreWriter]:
    """The plan's store, this writer's alone, after writing the token rows that it lacks.

    `model` is the identity of the loaded model. Raises what `harvest` does.
    """
    with _open_alone(plan, dataclasses.replace(plan.spec, model=model)) as writer:
        if plan.text is not None:
            try:
                _fill_rows(writer, plan, plan.text, progress)
            except ValueError:
                if not writer.spec.rows:
                    writer.path.remove_all()  # made just now, for nothing
                raise
        yield writer


def open_existing(plan: HarvestPlan, model: Record, *, shared: bool) -> StoreWriter:
    """The plan's store, which is there; SpecMismatchError, StoreLockedError."""
    writer = StoreWriter(plan.config.out, shared=shared)
    spec = dataclasses.replace(plan.spec, model=model)
    if differences := writer.spec.differences(spec):
        writer.close()
        raise SpecMismatchError(writer.path, differences)
    return writer


def _open_alone(plan: HarvestPlan, spec: StoreSpec) -> StoreWriter:
    out = as_place(plan.config.out)
    if plan.existing is not None:
        return open_existing(plan, spec.model, shared=False)
    if out.exists():  # it was stopped before its rows were complete: nothing is lost
        StoreWriter(out).close()
        out.remove_all()
    return StoreWriter.create(out, spec)


def _fill_rows(
    writer: StoreWriter, plan: HarvestPlan, text: TextSource, progress: Progress
) -> None:
    """Write the token rows that are missing, after comparing those that are there."""
    spec, config = writer.spec, plan.config
    assert plan.tokenizer is not None  # where there is text, there is one
    stored = StoreReader(writer.path)
    stream = rows(text.documents(), plan.tokenizer, context=config.context, packing=config.packing)
    grown = dataclasses.replace(spec, eval_rows=0, train_rows=0, eval_tokens=0, train_tokens=0)
    for chunk, block in enumerate(_blocks(stream, spec.chunk_rows)):
        if chunk >= spec.chunks:
            writer.write_rows(chunk, block)
        elif not np.array_equal(block.tokens_RT, stored.rows(chunk, check=False).tokens_RT):
            raise SpecMismatchError(
                writer.path, [f"text: chunk {chunk} of the tokens is not what this text gives"]
            )
        grown = _count(grown, block)
        progress(HarvestProgress(phase="tokens", done=grown.tokens, total=plan.tokens))
        # a block that is not full is the text's last, and the loop ends by itself
        full = len(block.lengths_R) == spec.chunk_rows
        if full and grown.eval_tokens >= spec.eval_target and grown.train_tokens >= config.tokens:
            break
    else:
        grown = dataclasses.replace(grown, exhausted=True)
        logger.warning("the text ended after %d tokens", grown.tokens)
    if not grown.train_rows:
        raise StoreError(
            f"the text has only {grown.tokens} tokens and all went to the eval split; "
            f"ask for fewer than {spec.eval_target} --eval-tokens or give more text"
        )
    writer.commit_rows(grown)


def _blocks(stream: Iterator[Row], size: int) -> Iterator[TokenRows]:
    while block := list(islice(stream, size)):
        yield TokenRows(
            np.stack([row.tokens for row in block]),
            np.array([row.length for row in block], np.int32),
            [json.dumps(row.documents) for row in block],
        )


def _count(spec: StoreSpec, block: TokenRows) -> StoreSpec:
    n_rows, n_tokens = len(block.lengths_R), int(block.lengths_R.sum())
    if spec.eval_tokens < spec.eval_target:
        return dataclasses.replace(
            spec, eval_rows=spec.eval_rows + n_rows, eval_tokens=spec.eval_tokens + n_tokens
        )
    return dataclasses.replace(
        spec, train_rows=spec.train_rows + n_rows, train_tokens=spec.train_tokens + n_tokens
    )


def fill_residuals(
    writer: StoreWriter,
    lm: LanguageModel,
    chunks: Sequence[int],
    progress: Progress,
    *,
    turn: AbstractContextManager[object] | None = None,
) -> int:
    """Compute, encode and commit those of the chunks that this writer can claim.

    Args:
        turn: held while the model is in use, and not while the last of it is encoded and written.

    Returns the number of tokens; the others are committed or being written by another process.
    """
    spec, reader = writer.spec, StoreReader(writer.path)
    state = HarvestProgress(phase="residuals", done=0, total=sum(map(spec.chunk_tokens, chunks)))
    in_flight: deque[Future[_Encoded]] = deque()

    def settle(at_most: int) -> None:
        nonlocal state
        while len(in_flight) > at_most:
            encoded = in_flight.popleft().result()
            state = dataclasses.replace(
                state,
                done=state.done + encoded.tokens,
                bytes_written=state.bytes_written + encoded.bytes_written,
                values_written=state.values_written + encoded.values_written,
            )
            progress(state)

    # where the model has the same cores as the encoder, the two only get in each other's way
    ahead = 0 if lm.device.type == "cpu" else _IN_FLIGHT
    with (
        ThreadPoolExecutor(1, thread_name_prefix="chunk") as background,
        ThreadPoolExecutor(thread_name_prefix="encode") as encoder,
    ):
        with turn or nullcontext():
            for chunk in chunks:
                if not writer.claim(chunk):
                    state = dataclasses.replace(state, total=state.total - spec.chunk_tokens(chunk))
                    continue
                token_rows = reader.rows(chunk, check=False)
                encoding = _ChunkEncoding(writer, chunk, token_rows, encoder)
                for batch in _batches(len(token_rows.lengths_R), spec.batch_rows):
                    ids_RT = torch.from_numpy(token_rows.tokens_RT[batch])
                    residuals = lm.residuals(ids_RT, spec.layers)
                    in_flight.append(background.submit(encoding.add, residuals, batch))
                    settle(ahead)
                in_flight.append(background.submit(encoding.commit))
                settle(max(ahead, 1))  # a commit waits for the disk, more than it computes
        settle(0)
    return state.done


def _batches(n_rows: int, size: int) -> Iterator[slice]:
    for start in range(0, n_rows, size):
        yield slice(start, min(start + size, n_rows))


class _Encoded(NamedTuple):
    """What one step of the encoder's thread has done."""

    tokens: int = 0
    bytes_written: int = 0
    values_written: int = 0


class _ChunkEncoding:
    """Gathers the batches of one chunk, encoded row by row in a pool, then commits it."""

    def __init__(
        self, writer: StoreWriter, chunk: int, rows: TokenRows, pool: ThreadPoolExecutor
    ) -> None:
        self._writer, self._chunk, self._rows, self._pool = writer, chunk, rows, pool
        self._blocks: list[tuple[Codes, ...]] = []
        self._stats = StatsBuilder(len(writer.spec.layers), writer.spec.width)
        self._counted_RT = rows.counted_RT()

    def add(self, residuals: Sequence[Tensor], batch: slice) -> _Encoded:
        x_LRTD = [x_RTD.to("cpu", torch.float32).numpy() for x_RTD in residuals]
        encoded_rows = self._pool.map(
            lambda row: self._encode_row([x_RTD[row - batch.start] for x_RTD in x_LRTD], row),
            range(batch.start, batch.stop),
        )
        for encoded, stats in encoded_rows:
            self._blocks.append(encoded.layers)
            self._stats.merge(stats)
        return _Encoded(tokens=len(x_LRTD[0]) * self._writer.spec.context)

    def _encode_row(self, x_LTD: list[Float32], row: int) -> tuple[Encoded, StatsBuilder]:
        spec, length = self._writer.spec, int(self._rows.lengths_R[row])
        if length < spec.context:
            for x_TD in x_LTD:
                x_TD[length:] = 0
        for layer, x_TD in zip(spec.layers, x_LTD, strict=True):
            # a sum of squares is quick, and not finite where a value is not
            if not np.isfinite(np.vecdot(x_TD, x_TD)).all() and not np.isfinite(x_TD).all():
                raise NonFiniteError(self._chunk * spec.chunk_rows + row, layer)
        encoded = spec.codec.encode(x_LTD)
        stats = StatsBuilder(len(spec.layers), spec.width)
        stats.add(x_LTD, encoded.distortion_LN, self._counted_RT[row])
        return encoded, stats

    def commit(self) -> _Encoded:
        size = self._writer.write_chunk(
            self._chunk, self._rows, join_blocks(self._blocks), self._stats.result()
        )
        values = self._rows.tokens_RT.size * self._writer.spec.values_per_token
        return _Encoded(bytes_written=size, values_written=values)
