"""A harvest by several processes that know nothing of each other: worker i of n."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Self

from routesae_cache.harvest import (
    HarvestProgress,
    Progress,
    fill_residuals,
    load_model,
    open_existing,
    store_with_rows,
)
from routesae_cache.harvest_plan import HarvestConfig, HarvestPlan, plan_harvest
from stores.errors import NotAStoreError, StoreError, StoreLockedError
from stores.layout import committed_chunks, read_spec
from stores.place import Place
from stores.places import as_place
from stores.spec import Record
from stores.writer import StoreWriter

logger = logging.getLogger(__name__)
_POLL_S = 0.5
_LOCK_PATIENCE_S = 5.0  # worker 0 gives the store up a moment after its token rows count
_ROWS_PATIENCE_S = 3600.0  # a large model may load for long before the first token is written


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which chunks are a worker's: every `of`-th, beginning with number `index`."""

    index: int
    of: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.of:
            raise ValueError(
                f"worker: expected i/n with i from 0 to n-1, such as 0/4 to 3/4, found {self}"
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """A share written as `i/n`."""
        index, _, of = text.partition("/")
        if not (index.isdecimal() and of.isdecimal()):
            raise ValueError(
                f"worker: expected i/n with i from 0 to n-1, such as 0/4 to 3/4, found {text!r}"
            )
        return cls(index=int(index), of=int(of))

    def __str__(self) -> str:
        return f"{self.index}/{self.of}"

    def of_chunks(self, chunks: Iterable[int]) -> list[int]:
        """The chunks that are this worker's."""
        return [chunk for chunk in chunks if chunk % self.of == self.index]


class ShareLeft(NamedTuple):
    """What is still to be done of a share; an estimate while token rows are missing."""

    chunks: int
    tokens: int
    chunks_of_all: int
    """That are still to be done by any worker."""


@dataclass(frozen=True, kw_only=True)
class ShareResult:
    """What a call of `harvest_share` did."""

    tokens: int
    """Whose residuals were computed in this call."""
    seconds: float
    """In forward passes, encoding and writing."""
    left_of_share: int
    """Chunks of this share that another process is writing."""
    left: int
    """Chunks of the store that nobody has committed."""


def share_left(plan: HarvestPlan, share: Share) -> ShareLeft:
    """What a worker has to do by its plan."""
    spec = plan.existing or plan.spec
    per_chunk = spec.chunk_rows * spec.context
    if plan.existing is None or plan.text is not None:
        eval_tokens = spec.eval_tokens or plan.config.eval_tokens
        train_tokens = plan.tokens - eval_tokens
        chunks = math.ceil(eval_tokens / per_chunk) + math.ceil(train_tokens / per_chunk)
    else:
        chunks = spec.chunks
    done = set(committed_chunks(plan.config.out, spec)) if plan.existing else set()
    pending = [chunk for chunk in range(chunks) if chunk not in done]
    mine = share.of_chunks(pending)
    return ShareLeft(len(mine), len(mine) * per_chunk, len(pending))


def harvest_share(
    plan: HarvestPlan, share: Share, progress: Progress = lambda _: None
) -> ShareResult:
    """Carry out a worker's part of a plan; the workers may run at once or one after the other.

    Worker 0 writes the token rows, the others wait for them. Whatever shares the workers were
    given, no two write the same chunk at the same time. Raises what `harvest` does, and
    StoreError where no token rows come.
    """
    plan.check_disk()
    if plan.text is not None and share.index > 0:
        plan = _with_rows_of_worker_0(plan, share, progress)
    todo = share_left(plan, share)
    if plan.text is None and not todo.chunks:  # no need of the model
        return ShareResult(tokens=0, seconds=0.0, left_of_share=0, left=todo.chunks_of_all)
    lm = load_model(plan)
    model = lm.identity.to_dict()
    if plan.text is not None:
        with store_with_rows(plan, model, progress):
            pass  # the others come in when it is no longer this one's alone
    with open_shared(plan, model) as writer:
        start, tokens = time.perf_counter(), 0
        for _ in range(2):  # again for chunks that another process had and died over
            tokens += fill_residuals(writer, lm, share.of_chunks(writer.pending()), progress)
        pending = writer.pending()
        return ShareResult(
            tokens=tokens,
            seconds=time.perf_counter() - start,
            left_of_share=len(share.of_chunks(pending)),
            left=len(pending),
        )


def open_shared(plan: HarvestPlan, model: Record) -> StoreWriter:
    """The plan's store, to fill in chunks beside other processes; what `open_existing` raises."""
    give_up = time.monotonic() + _LOCK_PATIENCE_S
    while True:
        try:
            return open_existing(plan, model, shared=True)
        except StoreLockedError:
            if time.monotonic() > give_up:
                raise
        time.sleep(min(0.05, _LOCK_PATIENCE_S))


def _with_rows_of_worker_0(plan: HarvestPlan, share: Share, progress: Progress) -> HarvestPlan:
    """Wait until the token rows are there, and plan anew from them."""
    out, first = as_place(plan.config.out), f"--worker 0/{share.of}"
    logger.info(
        "Waiting for worker 0 to write the token rows of %s. If it is not running, start it: "
        "the same command with %s",
        out,
        first,
    )
    begun = moved = time.monotonic()
    sign = _sign_of_life(out)
    while not _rows_are_there(plan.config):
        now = time.monotonic()
        if (latest := _sign_of_life(out)) != sign:
            sign, moved = latest, now
        if now - moved > _ROWS_PATIENCE_S:
            raise StoreError(
                f"{out}: worker 0 has written nothing for {_ROWS_PATIENCE_S / 60:.0f} minutes; "
                f"see what became of it, start it again with {first}, then this one"
            )
        progress(HarvestProgress(phase="waiting", done=int(now - begun), total=0))
        time.sleep(_POLL_S)
    return plan_harvest(plan.config)


def _rows_are_there(config: HarvestConfig) -> bool:
    try:
        spec = read_spec(config.out)
    except NotAStoreError:  # not made yet, or just being made anew
        return False
    return spec.rows > 0 and (spec.train_tokens >= config.tokens or spec.exhausted)


def _sign_of_life(out: Place) -> int:
    """Something that changes with each chunk of token rows."""
    return len(out.names("tokens/c"))
