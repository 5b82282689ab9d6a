"""What a harvest shows while it runs, and the ways to run it by several processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.table import Table

from cli.console import bar, duration, out, size

if TYPE_CHECKING:
    from routesae_cache.harvest import HarvestProgress, WorkerProgress
    from routesae_cache.harvest_plan import HarvestPlan
    from routesae_cache.ray_cluster import RayConfig
    from routesae_cache.ray_harvest import WorkerResult
    from routesae_cache.workers import Share


def show_share(plan: HarvestPlan, share: Share) -> None:
    """What one worker of several has to do."""
    from routesae_cache.workers import share_left

    left = share_left(plan, share)
    about = "" if plan.existing else "about "
    assert plan.seconds_left is not None  # it is computed here
    seconds = plan.seconds_left * left.tokens / max(plan.tokens_left, 1)
    out.print(
        f"Worker {share}: {about}{left.chunks:,} of {left.chunks_of_all:,} chunks, "
        f"{left.tokens:,} tokens, about {duration(seconds)}"
    )


def harvest_by_share(plan: HarvestPlan, share: Share) -> None:
    """Do it, and say what is left."""
    from routesae_cache.workers import harvest_share

    with harvest_bar(plan) as shown:
        result = harvest_share(plan, share, shown)
    show_rate(result.tokens, result.seconds, plan.config.out)
    if result.left_of_share:
        out.print(
            f"{result.left_of_share:,} chunks of worker {share} are being written by another "
            "process; should it fail, run this command again"
        )
    if result.left:
        out.print(f"Worker {share} is done, {result.left:,} chunks are left to others")
    else:
        out.print(f"The store is complete: routesae store info {plan.config.out}")


def show_rate(tokens: int, seconds: float, target: object) -> None:
    """What a harvest did."""
    rate = tokens / seconds if seconds else 0
    out.print(
        f"Harvested {tokens:,} tokens in {duration(seconds)} ({rate:,.0f} tokens/s) into {target}"
    )


def harvest_on_cluster(plan: HarvestPlan, config: RayConfig) -> None:
    """Harvest with Ray, and show what each worker did."""
    from routesae_cache.ray_harvest import harvest_on_ray

    with harvest_bar(plan) as shown:
        result = harvest_on_ray(plan, config, shown)
    show_rate(result.tokens, result.seconds, plan.config.out)
    out.print(_worker_table(result.workers))
    out.print(f"See what is in it: routesae store info {plan.config.out}")


def _worker_table(workers: tuple[WorkerResult, ...]) -> Table:
    table = Table("worker", "host", box=None)
    for name in ("chunks", "tokens", "tokens/s", "deaths"):
        table.add_column(name, justify="right")
    for worker in workers:
        rate = worker.tokens / worker.seconds if worker.seconds else 0
        numbers = (worker.chunks, worker.tokens, round(rate), worker.deaths)
        table.add_row(str(worker.index), worker.host, *(f"{number:,}" for number in numbers))
    return table


_WAITING = {"waiting": "waiting for token rows", "loading": "workers load the model"}


class HarvestBar:
    """Turns a harvest's progress into one line."""

    def __init__(
        self, update: Callable[..., None], get_time: Callable[[], float] = time.perf_counter
    ) -> None:
        self._update, self._get_time = update, get_time
        self._phase, self._start, self._done = "", 0.0, 0
        self.bytes_written = 0

    def __call__(self, state: HarvestProgress) -> None:
        """Show how far it is."""
        if state.phase in _WAITING:
            self._update(note=f"{_WAITING[state.phase]}, {duration(state.done)}")
            return
        if state.phase != self._phase:
            self._phase, self._start, self._done = state.phase, self._get_time(), state.done
            self._update(begin=0)  # token rows come a hundred times as fast as residuals
        self.bytes_written = state.bytes_written
        notes = []
        if state.done > self._done:  # the first of them took a time that is not known
            rate = (state.done - self._done) / max(self._get_time() - self._start, 1e-9)
            notes.append(f"{rate:,.0f} tokens/s")
        if state.workers:
            notes.append(_workers(state.workers))
        elif state.bytes_written:
            bits = 8 * state.bytes_written / max(state.values_written, 1)
            notes.append(f"{size(state.bytes_written)}, {16 / bits:.1f}x under bf16")
        self._update(completed=state.done, total=state.total, note=", ".join(notes))


@contextmanager
def harvest_bar(plan: HarvestPlan) -> Iterator[HarvestBar]:
    """The line, and what is said of a disk that gets full."""
    from routesae_cache.whole_files import named_full_disk

    with bar("Tokens") as update:
        shown = HarvestBar(update)
        with named_full_disk(
            plan.config.out, lambda: max(0, plan.bytes_left - shown.bytes_written)
        ):
            yield shown


def _workers(workers: tuple[WorkerProgress, ...]) -> str:
    """The rate of each worker, or the range where they are many, and who is slow."""
    rates = [round(worker.tokens_per_second) for worker in workers if worker.host is not None]
    shown = " ".join(f"{rate:,}" for rate in rates)
    if len(rates) > 4:
        shown = f"{min(rates):,}-{max(rates):,}"
    slow = "".join(f", {worker.index} slow" for worker in workers if worker.straggles)
    return f"{len(rates)}/{len(workers)} workers: {shown}{slow}"
