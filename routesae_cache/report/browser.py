"""The latent browser's data: of each run the latents to show, and everything about each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from routesae_cache.report.activity import Shading, Window
from routesae_cache.report.directions import Neighbour, TokenEffects
from routesae_cache.report.discover import FoundRun, read_texts
from routesae_cache.report.text import Segments, Stretch, Strings
from stores.spec import Record

CONTEXTS_SHOWN = 10
"""Of each latent."""
_MARK = ("<ACTIVATED>", "</ACTIVATED>")


@dataclass(frozen=True, kw_only=True)
class ShownContext:
    """One of a latent's contexts."""

    latent: int
    token: str
    text: str
    """As the contexts file has it, the token marked."""
    activation: float
    position: int
    layer: int | None
    stretch: Stretch
    """The positions that it shows."""

    @property
    def window(self) -> Window:
        """What is to be read again for it."""
        return Window(self.latent, *self.stretch)


class ShownLatent(NamedTuple):
    """What the browser shows of one latent's contexts."""

    tokens: list[str]
    """Every activating token, the strongest first."""
    contexts: list[ShownContext]
    """The strongest ones."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The latents of one run that the browser shows."""

    run: FoundRun
    latents: dict[int, ShownLatent]
    from_store: bool
    """The contexts are of the store that is at hand."""

    def contexts(self) -> list[ShownContext]:
        """Of all latents."""
        return [context for latent in self.latents.values() for context in latent.contexts]


def choose_latents(run: FoundRun, most: int, *, from_store: bool) -> Chosen:
    """At most so many interpretable latents: explained ones first, then the strongest."""
    assert run.contexts is not None
    texts = read_texts(run.contexts)
    explained = (run.interpretation or {}).get("latents", {})
    statistics: dict[str, Record] = run.contexts.record["latents"]
    order = sorted(
        statistics, key=lambda latent: (latent not in explained, -statistics[latent]["max"])
    )
    return Chosen(
        run=run,
        latents={
            latent: _shown(latent, texts.get(str(latent), {}))
            for latent in sorted(map(int, order[:most]))
        },
        from_store=from_store,
    )


def _shown(latent: int, by_token: dict[str, list[Record]]) -> ShownLatent:
    found = [
        ShownContext(
            latent=latent,
            token=token,
            text=one["context"],
            activation=one["activation"],
            position=one["position"],
            layer=one["layer"],
            stretch=Stretch(one["row"], one["first"], one["last"]),
        )
        for token, contexts in by_token.items()
        for one in contexts
    ]
    found.sort(key=lambda context: -context.activation)
    tokens = list(dict.fromkeys(context.token for context in found))
    return ShownLatent(tokens, found[:CONTEXTS_SHOWN])


@dataclass(frozen=True, kw_only=True)
class Details:
    """What was found out about the latents of one run beyond its contexts file."""

    shading: dict[Window, Shading]
    """Empty where the store is not at hand."""
    segments: Segments | None
    """None where the text cannot be decoded: contexts are then shown as the file has them."""
    effects: Sequence[TokenEffects] | None
    """Of each latent; None where the model is not at hand."""
    neighbours: Sequence[Sequence[Neighbour]] | None
    """Of each latent; None where the SAE was not read."""


def browser_data(
    chosen: Chosen,
    details: Details,
    strings: Strings,
    loose: list[list[int]],
    token_text: Callable[[int], str] | None,
) -> Record:
    """Everything that the page's browser needs about one run.

    Args:
        loose: segments of contexts that were not decoded from the store; some are added.
        token_text: of a token of the vocabulary.
    """
    run = chosen.run
    assert run.contexts is not None
    record = run.contexts.record
    explained = (run.interpretation or {}).get("latents", {})
    layers = [str(layer) for layer in run.config.sae.layers]
    latents = []
    for index, (latent, shown) in enumerate(chosen.latents.items()):
        statistics = record["latents"][str(latent)]
        one: Record = {
            "latent": latent,
            "count": statistics["activations"],
            "max": short(statistics["max"]),
            "mean": short(statistics["mean"]),
            "layers": _by_layer(statistics["layers"], layers),
            "histogram": {
                "edges": [short(edge) for edge in statistics["histogram"]["edges"]],
                "counts": statistics["histogram"]["counts"],
            },
            "tokens": [strings(token) for token in shown.tokens],
            "contexts": [_context(context, details, strings, loose) for context in shown.contexts],
        }
        if details.neighbours is not None:
            one["near"] = [[n.latent, round(n.cosine, 2)] for n in details.neighbours[index]]
        if details.effects is not None and token_text is not None:
            effects = details.effects[index]
            one["promoted"], one["suppressed"] = (
                [[strings(token_text(token)), round(value, 2)] for token, value in side]
                for side in effects
            )
        if (explanation := explained.get(str(latent))) is not None:
            one["explained"] = _explanation(explanation)
        latents.append(one)
    return {
        "run": run.id,
        "layers": run.config.sae.layers,
        "threshold": record["threshold"],
        "tokens": record["tokens"],
        "total": record["total_latents"],
        "model": (run.interpretation or {}).get("model"),
        "latents": latents,
    }


def _by_layer(counts: Record | None, layers: list[str]) -> list[int] | None:
    return None if counts is None else [counts.get(layer, 0) for layer in layers]


def _explanation(reply: Record) -> Record:
    detection = reply.get("detection") or {}
    return {
        "category": reply["category"],
        "subcategory": reply.get("subcategory"),
        "score": reply["score"],
        "text": reply["explanation"],
        "detection": detection.get("balanced_accuracy"),
    }


def _context(
    context: ShownContext, details: Details, strings: Strings, loose: list[list[int]]
) -> list[Any]:
    """[segment, where in it, tokens, which is marked, layer, activation, offsets, values]."""
    head: list[Any] = [context.layer, short(context.activation)]
    if details.segments is None:  # three pieces in the place of tokens, the middle one marked
        loose.append([strings(piece) for piece in _cut(context.text)])
        return [-len(loose), 0, 3, 1, *head, [1], [short(context.activation)]]
    segment, start = details.segments.place(context.stretch)
    marked = context.position - context.stretch.first
    shading = details.shading.get(context.window) or Shading([marked], [context.activation])
    length = context.stretch.last - context.stretch.first + 1
    values = [short(value) for value in shading.value_P]
    return [segment, start, length, marked, *head, shading.offset_P, values]


def _cut(text: str) -> tuple[str, str, str]:
    """Before the mark, the marked token, and after it; the corpus may hold such marks itself."""
    before, found, rest = text.partition(_MARK[0])
    if not found:
        return "", text, ""
    token, _, after = rest.partition(_MARK[1])
    return before, token, after


def short(value: float) -> float:
    """To three significant digits."""
    if value == 0 or not math.isfinite(value):
        return 0.0
    rounded = round(value, 2 - math.floor(math.log10(abs(value))))
    return int(rounded) if rounded == int(rounded) else rounded
