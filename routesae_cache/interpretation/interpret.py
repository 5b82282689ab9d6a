"""Latents explained and scored by a chat model, from their contexts (RouteSAE, interpretation)."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from routesae_cache.interpretation.asking import Asker, Budget, side_by_side
from routesae_cache.interpretation.chat import Chat, ChatConfig, ChatError, find_key
from routesae_cache.interpretation.excerpts import ExcerptFile, Excerpts, read_excerpts
from routesae_cache.interpretation.prices import PRICES, PRICES_FROM, Usage, cost_usd
from routesae_cache.interpretation.prompts import (
    EXPECTED_REPLY_TOKENS,
    Explanation,
    Matches,
    Question,
    ask_for_explanation,
    ask_for_matches,
)
from routesae_cache.interpretation.replies import Outcome, ReplyLog
from routesae_cache.interpretation.results import Detection, Interpretation, LatentResult
from routesae_cache.json_files import write_json

_SOME_EXPLANATION = "word " * EXPECTED_REPLY_TOKENS  # for estimates


@dataclass(frozen=True, kw_only=True)
class InterpretConfig:
    """How many latents to ask about, and how."""

    chat: ChatConfig
    sample: int = 100
    """Latents; all where there are fewer."""
    seed: int = 42
    concurrency: int = 8
    """Requests in flight."""
    max_cost: float | None = None
    """USD, replies of earlier runs included; nothing is asked that might pass it."""
    score: Literal["detection"] | None = None
    """`detection`: hold out half of the contexts and let the model tell them from others."""

    def __post_init__(self) -> None:
        for name in ("sample", "concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}: expected at least 1, found {getattr(self, name)}")
        if self.max_cost is None:
            return
        if not 0 < self.max_cost < math.inf:
            raise ValueError(f"--max-cost: expected USD above 0, found {self.max_cost}")
        if self.chat.model not in PRICES:
            raise ValueError(
                f"--max-cost needs a price, and none is known for {self.chat.model!r}; there are "
                f"prices ({PRICES_FROM}) for {', '.join(PRICES)}. Leave --max-cost out and bound "
                "the cost by --sample"
            )


@dataclass(frozen=True, kw_only=True)
class InterpretPlan:
    """What a run would ask."""

    interpretable: int
    """Latents in the contexts file."""
    latents: int
    """Latents of the sample."""
    requests: int
    """To be sent, if every reply parses."""
    answered: int
    """Questions that have their replies already."""
    prompt_tokens: int
    """Of the requests, estimated."""
    completion_tokens: int
    """Of their replies, estimated."""
    cost_usd: float | None
    """Of the requests, estimated; None for a model without a known price."""
    spent: Usage
    """Of the replies that are there."""
    example: Question
    """The first one to be sent, or the first one at all."""


@dataclass(frozen=True, kw_only=True)
class InterpretProgress:
    """How far a run is."""

    done: int
    """Questions of this run that are through, whatever came of them."""
    total: int
    """Questions of this run."""
    trouble: int
    """Those without an answer: refused, not parsed, or no reply at all."""
    spent_usd: float | None
    """Earlier replies included; None for a model without a known price."""
    stopping: bool
    """Whether it was asked to stop, and only waits for replies under way."""


def result_path(contexts: Path) -> Path:
    """Where the interpretation of a contexts file is written."""
    return contexts.with_name(f"{contexts.stem}.interpretation.json")


def replies_path(contexts: Path) -> Path:
    """Where the replies are kept, a JSON line each."""
    return contexts.with_name(f"{contexts.stem}.replies.jsonl")


def plan(contexts: Path, config: InterpretConfig) -> InterpretPlan:
    """What `interpret` would ask now; sends and writes nothing, and needs no key.

    ValueError for what is no contexts file or has no latents, and for a damaged replies file.
    """
    log = ReplyLog(replies_path(contexts), config.chat.model)
    return _plan(_excerpts(contexts, config), log, config)


def interpret(
    contexts: Path,
    config: InterpretConfig,
    progress: Callable[[InterpretProgress], None] = lambda state: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Interpretation:
    """Ask about a sample of a contexts file's latents; writes the result beside the file.

    Replies are kept as they arrive, and only what has none is asked for. Once `stopped()` is true,
    replies under way are waited for and nothing more is asked.

    Raises:
        ChatError: without a key, or where there is no use in asking on; replies are kept.
        ValueError: for what is no contexts file, has no latents, or a damaged replies file.
    """
    find_key(config.chat)
    file = _excerpts(contexts, config)
    with ReplyLog(replies_path(contexts), config.chat.model) as log:
        before = _plan(file, log, config)
        try:
            latents = asyncio.run(_ask_all(file, log, before, config, progress, stopped))
        except ChatError as error:
            raise ChatError(
                f"{error}. Replies that came are in {log.path}; the same command asks for the rest"
            ) from None
        usage, complete = _usage(log, file)
    result = Interpretation(
        contexts=contexts,
        name=file.name,
        interpretable=file.interpretable,
        model=config.chat.model,
        seed=config.seed,
        latents=tuple(sorted(latents, key=lambda result: result.latent)),
        usage=usage,
        usage_complete=complete,
        interrupted=stopped(),
    )
    write_json(result_path(contexts), result.to_dict())
    return result


def _excerpts(contexts: Path, config: InterpretConfig) -> ExcerptFile:
    hold_out = config.score == "detection"
    return read_excerpts(contexts, sample=config.sample, seed=config.seed, hold_out=hold_out)


def _questions(log: ReplyLog, excerpts: Excerpts) -> Iterator[tuple[Question, Outcome | None]]:
    """A latent's questions, as far as they are known, with what the replies amount to."""
    question = ask_for_explanation(excerpts.latent, excerpts.shown)
    outcome = log.settled(question)
    yield question, outcome
    if outcome is not None and isinstance(outcome.answer, Explanation) and excerpts.tested:
        question = ask_for_matches(excerpts.latent, outcome.answer.text, excerpts.tested)
        yield question, log.settled(question)


def _plan(file: ExcerptFile, log: ReplyLog, config: InterpretConfig) -> InterpretPlan:
    requests = answered = prompt_tokens = 0
    example = missing = None
    for excerpts in file.latents:
        for question, outcome in _questions(log, excerpts):
            example = example or question
            if outcome is not None:
                answered += 1
                continue
            missing = missing or question
            requests += 1
            prompt_tokens += question.prompt_tokens
            if question.kind == "explanation" and excerpts.tested:
                next_one = ask_for_matches(excerpts.latent, _SOME_EXPLANATION, excerpts.tested)
                requests += 1
                prompt_tokens += next_one.prompt_tokens
    assert example is not None  # there is a latent
    completion_tokens = requests * EXPECTED_REPLY_TOKENS
    spent, _ = _usage(log, file)
    return InterpretPlan(
        interpretable=file.interpretable,
        latents=len(file.latents),
        requests=requests,
        answered=answered,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        cost_usd=cost_usd(config.chat.model, Usage(prompt_tokens, completion_tokens)),
        spent=spent,
        example=missing or example,
    )


def _usage(log: ReplyLog, file: ExcerptFile) -> tuple[Usage, bool]:
    """Of all replies to the sample's questions, and whether each of them says."""
    replies = [
        reply
        for excerpts in file.latents
        for question, _ in _questions(log, excerpts)
        for reply in log.to(question)
    ]
    said = [reply.usage for reply in replies if reply.usage is not None]
    columns = zip(Usage(0, 0, 0), *said, strict=True)
    return Usage(*map(sum, columns)), len(said) == len(replies)


async def _ask_all(
    file: ExcerptFile,
    log: ReplyLog,
    before: InterpretPlan,
    config: InterpretConfig,
    progress: Callable[[InterpretProgress], None],
    stopped: Callable[[], bool],
) -> list[LatentResult]:
    model = config.chat.model
    budget = Budget(model, config.max_cost, cost_usd(model, before.spent) or 0.0)
    results: list[LatentResult] = []
    async with Chat(config.chat) as chat:
        asker = Asker(chat, log, budget, stopped)

        async def work(excerpts: Excerpts) -> None:
            results.append(await _ask(asker, excerpts, tested=config.score is not None))

        def tick() -> None:
            progress(
                InterpretProgress(
                    done=asker.done,
                    total=before.requests,
                    trouble=asker.trouble,
                    spent_usd=budget.spent if model in PRICES else None,
                    stopping=stopped(),
                )
            )

        await side_by_side(file.latents, work, concurrency=config.concurrency, tick=tick)
    return results


async def _ask(asker: Asker, excerpts: Excerpts, *, tested: bool) -> LatentResult:
    question = ask_for_explanation(excerpts.latent, excerpts.shown)
    outcome = await asker.outcome(question)
    result = partial(LatentResult, latent=excerpts.latent, explanation=outcome)
    if not tested:
        return result()
    if not isinstance(outcome.answer, Explanation):
        return result(undetected="no_explanation")
    if not excerpts.tested:
        return result(undetected="too_few_contexts")
    question = ask_for_matches(excerpts.latent, outcome.answer.text, excerpts.tested)
    found = await asker.outcome(question)
    if not isinstance(found.answer, Matches):
        assert found.status != "parsed"
        return result(undetected=found.status)
    score = Detection.of(found.answer.numbers, excerpts.own, len(excerpts.tested))
    return result(detection=score)
