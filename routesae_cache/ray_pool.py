"""Work on a Ray cluster: processes that each make a worker once, and are handed tasks."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple

from routesae_cache.ray_actor import Actor, Loaded, Message, Result, State, Task, Worker
from routesae_cache.ray_cluster import RayConfig, cluster, threads_of_each

logger = logging.getLogger(__name__)
_POLL_S = 0.5
_STRAGGLES = 3  # times the usual time for a task
_STRAGGLES_S = 5.0  # at least
_LONG_LIFE_S = 600.0  # who dies after that did not die of what it was given


class Done(NamedTuple, Generic[Task, Result]):
    """A task that was finished."""

    task: Task
    result: Result
    worker: int
    """Index of who did it."""


@dataclass(kw_only=True, eq=False)
class Place(Generic[Task]):
    """The driver's side of a worker, and of those that died before it in its place."""

    index: int
    actor: Any
    host: str | None = None
    """None until the worker is made."""
    pid: int | None = None
    in_hand: list[Task] = field(default_factory=list)
    """The first is what it is at."""
    since: float = 0.0
    made: float = 0.0
    """When the worker was."""
    polled: float = 0.0
    """When it last answered; infinite until it does."""
    took: list[float] = field(default_factory=list)
    """Seconds from one finished task to the next."""
    state: Any = None
    """What the worker last said of its task."""
    deaths: int = 0
    """Times that it died and another took its place."""
    straggles: bool = False

    @property
    def seconds(self) -> float:
        """At its task so far."""
        return time.monotonic() - self.since if self.in_hand else 0.0


class Pool(Generic[Task, Result]):
    """Workers in processes of their own, what each is at, and the tasks that wait.

    A worker that dies is replaced, and its tasks are the next to be handed out.

    Args:
        make: makes a worker; called in each process.
        describe: a task, in the words of a message.
        ahead: tasks a worker has at once, while more wait than there are workers.
    """

    def __init__(
        self,
        ray: Any,
        config: RayConfig,
        make: Callable[[], Worker[Task, Result]],
        *,
        describe: Callable[[Task], str],
        ahead: int = 1,
    ) -> None:
        self._ray, self._config, self._make = ray, config, make
        self._describe, self._ahead = describe, ahead
        self._threads = threads_of_each(ray, config)
        self._running: dict[Any, tuple[Place[Task], Task | None]] = {}
        self._fruitless = 0
        self._stopping = False
        self._hello: Any = None
        self._said: set[tuple[str, str]] = set()
        self.waiting: deque[Task] = deque()
        """Tasks not handed out; more may be added while `results` goes on."""
        self.places = [Place[Task](index=index, actor=None) for index in range(config.workers)]
        for place in self.places:
            self._hire(place)

    def wait_for_one(self, tick: Callable[[], None]) -> Any:
        """What the first worker that is made says of itself; ValueError if others differ later."""
        while not any(place.host for place in self.places):
            tick()
            self._settle()
        return self._hello

    def results(self, tick: Callable[[], None]) -> Iterator[Done[Task, Result]]:
        """Have all waiting tasks done, in any order; `tick` is called about twice a second.

        Raises what a worker raised, and ValueError where workers only die.
        """
        while self.waiting or any(place.in_hand for place in self.places):
            self._hand_out()
            tick()
            yield from self._settle()
        self._note_stragglers()
        tick()

    def stop(self) -> None:
        """Hand out nothing more, and have the workers end what they are at."""
        if self._stopping:
            return
        self._stopping = True
        self.waiting.clear()
        for place in self.places:
            if place.in_hand:
                place.actor.stop.remote()

    def dismiss(self) -> None:
        """End the processes, after those that do nothing gave back what they hold."""
        idle = [place for place in self.places if place.host and not place.in_hand]
        leaving = [place.actor.close.remote() for place in idle]
        if leaving:
            self._ray.wait(leaving, num_returns=len(leaving), timeout=10)
        for place in self.places:
            self._ray.kill(place.actor)

    def _hire(self, place: Place[Task]) -> None:
        actor = self._ray.remote(Actor).options(
            num_cpus=1,
            num_gpus=self._config.gpus_per_worker,
            scheduling_strategy="SPREAD",
            max_concurrency=self._ahead + 2,  # beside its tasks it answers
        )
        place.actor = actor.remote(self._make, self._threads, Path.cwd())
        place.host, place.pid, place.in_hand, place.state = None, None, [], None
        self._running[place.actor.load.remote()] = place, None

    def _hand_out(self) -> None:
        ready = [place for place in self.places if place.host]
        for place in ready:
            if self.waiting and not place.in_hand:
                self._give(place)
        for place in ready:
            while len(self.waiting) > len(self.places) and len(place.in_hand) < self._ahead:
                self._give(place)

    def _give(self, place: Place[Task]) -> None:
        task = self.waiting.popleft()
        if not place.in_hand:
            place.since = time.monotonic()
        place.in_hand.append(task)
        self._running[place.actor.work.remote(task)] = place, task

    def _settle(self) -> list[Done[Task, Result]]:
        """Take in what is ready."""
        self._poll()
        self._note_stragglers()
        ready, _ = self._ray.wait(list(self._running), timeout=_POLL_S)
        finished = []
        for reference in ready:
            place, task = self._running.pop(reference)
            try:
                answer = self._ray.get(reference)
            except self._ray.exceptions.RayTaskError as error:
                if task is not None:
                    place.in_hand.remove(task)
                raise error.cause from error  # what the worker found wrong
            except self._ray.exceptions.RayError as error:
                self._replace(place, str(error))
                break
            self._repeat(answer.messages)
            if isinstance(answer, Loaded):
                self._take_on(place, answer)
            elif isinstance(answer, State):
                place.state, place.polled = answer.value, time.monotonic()
            else:
                assert task is not None
                finished.append(self._credit(place, task, answer.value))
        return finished

    def _poll(self) -> None:
        """Ask those at work how far they are."""
        for place in self.places:
            if place.in_hand and time.monotonic() - place.polled > _POLL_S:
                place.polled = math.inf
                self._running[place.actor.state.remote()] = place, None

    def _take_on(self, place: Place[Task], loaded: Loaded) -> None:
        if self._hello is None:
            self._hello = loaded.hello
        elif loaded.hello != self._hello:
            raise UnlikeWorkersError(self._hello, loaded.hello, loaded.host)
        place.host, place.pid, place.made = loaded.host, loaded.pid, time.monotonic()

    def _credit(self, place: Place[Task], task: Task, result: Result) -> Done[Task, Result]:
        self._fruitless = 0
        place.in_hand.remove(task)
        place.took.append(time.monotonic() - place.since)
        place.since = time.monotonic()
        return Done(task, result, place.index)

    def _replace(self, place: Place[Task], reason: str) -> None:
        """Another process for one that died; its tasks are the next to be handed out."""
        long_lived = bool(place.host) and time.monotonic() - place.made > _LONG_LIFE_S
        self._fruitless = 1 if long_lived else self._fruitless + 1
        what = reason.strip().splitlines()[0] if reason.strip() else "no reason given"
        if self._fruitless > 2 * len(self.places) + 1:
            raise WorkersDieError(
                f"workers died {self._fruitless} times in a row and nothing was finished: {what} "
                "Is there memory enough? Ray's logs are in /tmp/ray/session_latest/logs"
            )
        logger.warning(
            "worker %d%s died%s and is replaced: %s",
            place.index,
            f" on {place.host}" if place.host else "",
            f" at {self._names(place.in_hand)}, which another takes," if place.in_hand else "",
            what,
        )
        if not self._stopping:
            self.waiting.extendleft(reversed(place.in_hand))
        self._running = {r: found for r, found in self._running.items() if found[0] is not place}
        self._ray.kill(place.actor)  # where it was only out of reach
        place.deaths += 1
        place.polled = 0.0
        self._hire(place)

    def _note_stragglers(self) -> None:
        took = [seconds for place in self.places for seconds in place.took]
        usual = statistics.median(took) if len(took) > 2 else math.inf
        for place in self.places:
            slow = place.seconds > max(_STRAGGLES * usual, _STRAGGLES_S)
            if slow and not place.straggles:
                logger.warning(
                    "worker %d on %s is slow: %.0f s at %s so far, %.0f s is usual",
                    *(place.index, place.host, place.seconds),
                    *(self._describe(place.in_hand[0]), usual),
                )
            place.straggles = slow

    def _names(self, tasks: Iterable[Task]) -> str:
        return " and ".join(map(self._describe, tasks))

    def _repeat(self, messages: Iterable[Message]) -> None:
        """What the workers log, once where several say the same."""
        for name, level, text in messages:
            if (name, text) not in self._said:
                self._said.add((name, text))
                logging.getLogger(name).log(level, "%s", text)


class WorkersDieError(ValueError):
    """Workers die again and again, and nothing is finished."""


class UnlikeWorkersError(ValueError):
    """A worker does not say of itself what the first one does."""

    def __init__(self, first: Any, other: Any, host: str) -> None:
        super().__init__(f"the first worker has {first!r}, the one on {host} {other!r}")
        self.first, self.other, self.host = first, other, host


@contextmanager
def pool(
    config: RayConfig,
    make: Callable[[], Worker[Task, Result]],
    *,
    describe: Callable[[Task], str],
    ahead: int = 1,
) -> Iterator[Pool[Task, Result]]:
    """A pool on the cluster; the workers, and a local cluster, end with the block or the process.

    ValueError where there is no such cluster, or not the GPUs for a worker.
    """
    with cluster(config) as ray:
        found = Pool(ray, config, make, describe=describe, ahead=ahead)
        try:
            yield found
        finally:
            found.dismiss()
