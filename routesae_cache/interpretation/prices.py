"""What tokens of a chat model cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Usage(NamedTuple):
    """Tokens that a server says it counted."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    """Of the prompt's, those billed as cached."""


class Price(NamedTuple):
    """USD for a million tokens."""

    prompt: float
    cached: float
    completion: float


PRICES_FROM = "May 2026"
PRICES: Mapping[str, Price] = {
    "gpt-4o": Price(2.50, 1.25, 10.00),
    "gpt-4o-mini": Price(0.15, 0.075, 0.60),
    "gpt-4.1": Price(2.00, 0.50, 8.00),
    "gpt-4.1-mini": Price(0.40, 0.10, 1.60),
    "gpt-4.1-nano": Price(0.10, 0.025, 0.40),
}
"""Model -> list prices as of `PRICES_FROM`, standard tier."""


def cost_usd(model: str, usage: Usage) -> float | None:
    """What these tokens cost; None for a model that is not in `PRICES`."""
    price = PRICES.get(model)
    if price is None:
        return None
    full = usage.prompt_tokens - usage.cached_tokens
    dollars = full * price.prompt + usage.cached_tokens * price.cached
    return (dollars + usage.completion_tokens * price.completion) / 1e6
