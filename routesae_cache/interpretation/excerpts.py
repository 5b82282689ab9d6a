"""What a chat model is shown of each latent: its contexts, and for detection those of others."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from routesae_cache.json_files import read_json

Kind = TypeVar("Kind")
_FEWEST_HELD_OUT = 2  # of fewer, a balanced accuracy says nothing


class Context(NamedTuple):
    """One place where a latent is active."""

    token: str
    """The activating token, lower-cased and stripped."""
    text: str
    """The text around it, with the token itself marked."""
    activation: float
    row: int
    position: int
    """Of the activating token in its row."""
    first: int
    """First position that the text shows."""
    last: int
    """Last position that the text shows."""


@dataclass(frozen=True, kw_only=True)
class Excerpts:
    """The contexts of one latent, by what they are for."""

    latent: int
    shown: tuple[Context, ...]
    """What the explanation is made from."""
    tested: tuple[Context, ...] = ()
    """What it is tested on: contexts that were held out, and as many of other latents, in a random
    order. Empty where there are too few, or where nothing is tested."""
    own: frozenset[int] = frozenset()
    """Which of `tested` are the latent's, counted from 1."""


@dataclass(frozen=True, kw_only=True)
class ExcerptFile:
    """What is taken from a contexts file."""

    name: str
    """Of the run."""
    interpretable: int
    """Latents in the file."""
    latents: tuple[Excerpts, ...]
    """The sample, in the order it was drawn: what is asked first is a smaller sample."""


def read_excerpts(path: Path, *, sample: int, seed: int, hold_out: bool) -> ExcerptFile:
    """Draw latents from a contexts file, and with `hold_out` divide their contexts.

    The draw depends on the file's latents and the seed alone, and a larger sample contains a
    smaller one. With `hold_out`, about half of a latent's contexts are held out; contexts of one
    row stay together, so that none is tested on a text that the explanation was made from.

    Raises:
        ValueError: for a file of another kind, or without an interpretable latent.
    """
    record = _read(path)
    contexts = record.get("latent_context_map")
    if contexts == {}:
        raise ValueError(
            f"{path} has no interpretable latent to ask about; run `routesae contexts` with a "
            "lower --threshold or fewer --min-contexts"
        )
    try:
        return _drawn(record, sample, seed, hold_out)
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{path}: expected contexts, as `routesae contexts` writes them; what is in it has "
            f"another form ({type(error).__name__}: {error})"
        ) from error


def _drawn(record: Any, sample: int, seed: int, hold_out: bool) -> ExcerptFile:
    contexts: Mapping[str, Any] = record["latent_context_map"]
    latents = sorted(contexts, key=int)
    drawn = random.Random(seed).sample(latents, len(latents))[:sample]
    return ExcerptFile(
        name=str(record["name"]),
        interpretable=len(latents),
        latents=tuple(
            _divided(latent, latents, contexts, seed)
            if hold_out
            else Excerpts(latent=int(latent), shown=_contexts(contexts[latent]))
            for latent in drawn
        ),
    )


def _read(path: Path) -> Any:
    record = read_json(path)
    kind = record.get("kind") if isinstance(record, dict) else None
    if kind != "contexts":
        found = f"kind {kind!r}" if kind else "none"
        raise ValueError(f"{path}: expected contexts, as `routesae contexts` writes them ({found})")
    return record


def _contexts(by_token: Mapping[str, Sequence[Mapping[str, Any]]]) -> tuple[Context, ...]:
    return tuple(
        Context(
            token=token,
            text=_typed(found, "context", str),
            activation=float(found["activation"]),
            row=_typed(found, "row", int),
            position=_typed(found, "position", int),
            first=_typed(found, "first", int),
            last=_typed(found, "last", int),
        )
        for token, places in by_token.items()
        for found in places
    )


def _typed(place: Mapping[str, Any], key: str, kind: type[Kind]) -> Kind:
    value = place[key]
    if type(value) is not kind:
        raise TypeError(f"{key}: expected {kind.__name__}, found {value!r}")
    return value


def _divided(
    latent: str, latents: Sequence[str], contexts: Mapping[str, Any], seed: int
) -> Excerpts:
    own = _contexts(contexts[latent])
    draw = random.Random(f"{seed} {latent}")
    held_out = _half(own, draw)
    # a few more than needed: this latent is among them, and others that are on where it is
    some = draw.sample(latents, min(len(latents), 4 * len(held_out) + 8))
    candidates = [draw.choice(_contexts(contexts[other])) for other in some]
    others = _elsewhere(candidates, own)[: len(held_out)]
    held_out = held_out[: len(others)]
    if len(held_out) < _FEWEST_HELD_OUT:
        return Excerpts(latent=int(latent), shown=own)
    rows = {context.row for context in held_out}
    shown = tuple(context for context in own if context.row not in rows)
    tested = draw.sample((*held_out, *others), 2 * len(held_out))
    numbers = frozenset(i for i, context in enumerate(tested, start=1) if context in held_out)
    return Excerpts(latent=int(latent), shown=shown, tested=tuple(tested), own=numbers)


def _half(own: Sequence[Context], draw: random.Random) -> tuple[Context, ...]:
    """Whole rows, together at most half of the contexts."""
    by_row: dict[int, list[Context]] = {}
    for context in own:
        by_row.setdefault(context.row, []).append(context)
    half: list[Context] = []
    for row in draw.sample(sorted(by_row), len(by_row)):
        if len(half) + len(by_row[row]) <= len(own) // 2:
            half += by_row[row]
    return tuple(half)


def _elsewhere(candidates: Iterable[Context], own: Iterable[Context]) -> tuple[Context, ...]:
    """Candidates, each place once, whose text shows no place of `own`."""
    places: dict[int, list[int]] = {}
    for context in own:
        places.setdefault(context.row, []).append(context.position)
    free = {
        (context.row, context.position): context
        for context in candidates
        if not any(context.first <= p <= context.last for p in places.get(context.row, ()))
    }
    return tuple(free.values())
