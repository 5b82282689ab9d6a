"""Many questions at once: as many as may be in flight, none past the budget, each reply kept."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from routesae_cache.interpretation.chat import (
    MOST_REPLY_TOKENS,
    Chat,
    ChatError,
    Reply,
    RequestFailedError,
)
from routesae_cache.interpretation.prices import Usage, cost_usd
from routesae_cache.interpretation.prompts import Question, ReplyFormat
from routesae_cache.interpretation.replies import Outcome, ReplyLog

T = TypeVar("T")

_GIVE_UP_AFTER = 5  # requests in a row that failed after all their retries
_GRACE_S = 5.0  # for what is in flight when there is no use in asking on
_TICK_S = 0.2

LEFT = Outcome(status="left", trouble="not asked")


@dataclass
class Budget:
    """USD that may be spent, requests in flight included by their estimate."""

    model: str
    limit: float | None
    """None: no limit, and nothing is waited for."""
    spent: float = 0.0

    def __post_init__(self) -> None:
        self.exhausted = False
        self._in_flight = 0
        self._reserved = 0.0
        self._changed = asyncio.Condition()

    async def reserve(self, question: Question) -> bool:
        """Whether the question may be asked; waits for replies where that decides it."""
        amount = self._most(question)
        async with self._changed:
            await self._changed.wait_for(lambda: self._fits(amount) or self._in_flight == 0)
            if self.exhausted or not self._fits(amount):
                self.exhausted = True
                return False
            self._in_flight += 1
            self._reserved += amount
            return True

    async def settle(self, question: Question, reply: Reply | None) -> None:
        """Put the cost in the estimate's place; the estimate stays where there is no cost."""
        amount = self._most(question)
        usage = reply.usage if reply else None
        actual = amount if usage is None else cost_usd(self.model, usage) or 0.0
        async with self._changed:
            self._in_flight -= 1
            self._reserved -= amount
            self.spent += actual
            self._changed.notify_all()

    def _fits(self, amount: float) -> bool:
        return self.limit is None or self.spent + self._reserved + amount <= self.limit

    def _most(self, question: Question) -> float:
        return cost_usd(self.model, Usage(question.prompt_tokens, MOST_REPLY_TOKENS)) or 0.0


class Asker:
    """Puts questions to a chat model and keeps the replies."""

    def __init__(
        self,
        chat: Chat,
        log: ReplyLog,
        budget: Budget,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self._chat, self._log, self.budget, self._stopped = chat, log, budget, stopped
        self._failures_in_a_row = 0
        self._given_up = False
        self.done = 0
        """Questions that were put and are through, whatever came of them."""
        self.trouble = 0
        """Those without an answer."""

    @property
    def stopping(self) -> bool:
        """Whether nothing more is asked."""
        return self._given_up or self.budget.exhausted or self._stopped()

    async def outcome(self, question: Question) -> Outcome:
        """What came of a question, put as often as it takes.

        ChatError where there is no use in asking anything else.
        """
        outcome = self._log.settled(question)
        if outcome is not None:
            return outcome
        while outcome is None:
            if self.stopping or not await self.budget.reserve(question):
                return LEFT
            outcome = await self._put(question) or self._log.settled(question)
            if outcome is LEFT:
                return LEFT
        self.done += 1
        self.trouble += outcome.status != "parsed"
        return outcome

    async def _put(self, question: Question) -> Outcome | None:
        """One request; its reply goes to the log, a failure or none at all is returned."""
        # what did not parse as JSON may come from a server that only pretends to know schemas
        reply_format: ReplyFormat = "text" if self._log.to(question) else "json"
        reply = None
        try:
            reply = await self._reply(question, reply_format)
            if reply is None:
                return LEFT
            self._log.add(question, reply)
        except RequestFailedError as error:
            self._count_failure(error)
            return Outcome(status="failed", trouble=str(error))
        except ChatError:
            self._given_up = True
            raise
        finally:
            await self.budget.settle(question, reply)
        self._failures_in_a_row = 0
        return None

    async def _reply(self, question: Question, reply_format: ReplyFormat) -> Reply | None:
        """The reply; None where asking was stopped and it does not come soon after that."""
        asked = asyncio.ensure_future(self._chat.ask(question, reply_format))
        patience_s = _GRACE_S
        try:
            while not asked.done() and patience_s > 0:
                await asyncio.wait([asked], timeout=_TICK_S)
                patience_s -= _TICK_S if self._stopped() else 0
            return asked.result() if asked.done() else None
        finally:
            asked.cancel()

    def _count_failure(self, error: RequestFailedError) -> None:
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= _GIVE_UP_AFTER:
            self._given_up = True
            raise ChatError(
                f"{self._failures_in_a_row} requests in a row failed, the last one with: {error}"
            ) from None


async def side_by_side(
    items: Iterable[T],
    work: Callable[[T], Awaitable[None]],
    *,
    concurrency: int,
    tick: Callable[[], None],
) -> None:
    """Run `work` on every item, so many at a time; `tick` is called several times a second.

    A ChatError ends it at once, apart from a moment for replies that are on their way.
    """
    shared = iter(items)

    async def worker() -> None:
        for item in shared:
            await work(item)

    tasks = pending = {asyncio.create_task(worker()) for _ in range(concurrency)}
    try:
        while pending:
            done, pending = await asyncio.wait(
                pending, timeout=_TICK_S, return_when=asyncio.FIRST_EXCEPTION
            )
            tick()
            for task in done:
                task.result()
    except ChatError:
        if pending:
            await asyncio.wait(pending, timeout=_GRACE_S)
        raise
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
