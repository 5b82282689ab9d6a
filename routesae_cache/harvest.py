"""Text and a model -> a store: token rows first, then residuals chunk by chunk."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from routesae_cache.harvest_plan import HarvestPlan
from routesae_cache.lm import LanguageModel, load_lm
from routesae_cache.text import TextSource
from routesae_cache.tokens import Row, rows
from stores.codecs import Codes, Float32, join_blocks
from stores.errors import NonFiniteError, SpecMismatchError, StoreError
from stores.layout import TokenRows
from stores.reader import StoreReader
from stores.spec import StoreSpec
from stores.stats import StatsBuilder
from stores.writer import StoreWriter

logger = logging.getLogger(__name__)
_IN_FLIGHT = 2  # batches waiting to be encoded while the model goes on


@dataclass(frozen=True, kw_only=True)
class HarvestProgress:
    """How far a harvest is; `done` and `total` are tokens."""

    phase: Literal["tokens", "residuals"]
    done: int
    total: int
    bytes_written: int = 0
    values_written: int = 0


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
    lm = load_lm(
        plan.model,
        dtype=plan.config.dtype,
        device=plan.device,
        attention=plan.config.attention,
    )
    spec = dataclasses.replace(plan.spec, model=lm.identity.to_dict())
    with _open(plan, spec) as writer:
        if plan.text is not None:
            try:
                _fill_rows(writer, plan, plan.text, progress)
            except ValueError:
                if not writer.spec.rows:
                    shutil.rmtree(writer.path)  # made just now, for nothing
                raise
        start = time.perf_counter()
        tokens = _fill_residuals(writer, lm, progress)
        return HarvestResult(spec=writer.spec, tokens=tokens, seconds=time.perf_counter() - start)


def _open(plan: HarvestPlan, spec: StoreSpec) -> StoreWriter:
    out = plan.config.out
    if plan.existing is None:
        if out.exists():  # it was stopped before its rows were complete: nothing is lost
            StoreWriter(out).close()
            shutil.rmtree(out)
        return StoreWriter.create(out, spec)
    writer = StoreWriter(out)
    if differences := writer.spec.differences(spec):
        writer.close()
        raise SpecMismatchError(out, differences)
    return writer


def _fill_rows(
    writer: StoreWriter, plan: HarvestPlan, text: TextSource, progress: Progress
) -> None:
    """Write the token rows that are missing, after comparing those that are there."""
    spec, config = writer.spec, plan.config
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
        if grown.eval_tokens >= spec.eval_target and grown.train_tokens >= config.tokens:
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


def _fill_residuals(writer: StoreWriter, lm: LanguageModel, progress: Progress) -> int:
    """Compute, encode and commit every pending chunk; returns the number of tokens."""
    spec, reader = writer.spec, StoreReader(writer.path)
    pending = writer.pending()
    row_tokens = spec.context
    total = sum(r.stop - r.start for r in map(spec.chunk_range, pending)) * row_tokens
    done = written = 0

    def report(n_rows: int, n_bytes: int = 0) -> None:
        nonlocal done, written
        done, written = done + n_rows * row_tokens, written + n_bytes
        progress(
            HarvestProgress(
                phase="residuals",
                done=done,
                total=total,
                bytes_written=written,
                values_written=done * spec.values_per_token,
            )
        )

    with ThreadPoolExecutor(1, thread_name_prefix="encode") as encoder:
        in_flight: deque[Future[int]] = deque()
        for chunk in pending:
            token_rows = reader.rows(chunk, check=False)
            encoding = _ChunkEncoding(writer, chunk, token_rows)
            for batch in _batches(len(token_rows.lengths_R), spec.batch_rows):
                residuals = _residuals(lm, token_rows.tokens_RT[batch], spec, chunk, batch)
                in_flight.append(encoder.submit(encoding.add, residuals, batch))
                if len(in_flight) > _IN_FLIGHT:
                    in_flight.popleft().result()
                report(batch.stop - batch.start)
            in_flight.append(encoder.submit(encoding.commit))
            # a commit's result is the bytes it wrote, a batch's is 0
        while in_flight:
            report(0, in_flight.popleft().result())
    return done


def _batches(n_rows: int, size: int) -> Iterator[slice]:
    for start in range(0, n_rows, size):
        yield slice(start, min(start + size, n_rows))


def _residuals(
    lm: LanguageModel, tokens_RT: NDArray[np.int32], spec: StoreSpec, chunk: int, batch: slice
) -> list[Tensor]:
    residuals = lm.residuals(torch.from_numpy(tokens_RT), spec.layers)
    for layer, x_RTD in zip(spec.layers, residuals, strict=True):
        finite_R = x_RTD.isfinite().all(-1).all(-1)
        if not bool(finite_R.all()):
            first = chunk * spec.chunk_rows + batch.start + int((~finite_R).nonzero()[0])
            raise NonFiniteError(first, layer)
    return residuals


class _ChunkEncoding:
    """Gathers the batches of one chunk, then commits it; runs in the encoder's thread."""

    def __init__(self, writer: StoreWriter, chunk: int, rows: TokenRows) -> None:
        self._writer, self._chunk, self._rows = writer, chunk, rows
        self._blocks: list[tuple[Codes, ...]] = []
        self._stats = StatsBuilder(len(writer.spec.layers), writer.spec.width)
        self._counted_RT = rows.counted_RT()

    def add(self, residuals: Iterable[Tensor], batch: slice) -> int:
        spec = self._writer.spec
        real_RT = np.arange(spec.context) < self._rows.lengths_R[batch, None]
        padded = not real_RT.all()
        x_LND: list[Float32] = []
        for x_RTD in residuals:
            x_ND = x_RTD.to("cpu", torch.float32).reshape(-1, spec.width).numpy()
            x_LND.append(x_ND * real_RT.reshape(-1, 1) if padded else x_ND)
        encoded = spec.codec.encode(x_LND)
        self._stats.add(x_LND, encoded.distortion_LN, self._counted_RT[batch].reshape(-1))
        self._blocks.append(encoded.layers)
        return 0

    def commit(self) -> int:
        return self._writer.write_chunk(
            self._chunk, self._rows, join_blocks(self._blocks), self._stats.result()
        )
