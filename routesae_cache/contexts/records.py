"""What a contexts file says of an SAE and its latents, as JSON has it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from routesae_cache.contexts.activation_files import histograms
from routesae_cache.contexts.mining import NO_LAYER, Activations, Ints, StrongestFew, Tally
from routesae_cache.contexts.text import StoreText
from routesae_cache.json_files import CHECKSUM
from routesae_cache.whole_files import whole_file

_BINS = 20
Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class AtThreshold:
    """Counts at one threshold."""

    threshold: float
    interpretable: int
    """Latents with enough contexts and not too many types of token."""
    latents_activated: int
    """Latents with an activation above it."""
    activations: int


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Counts of one SAE over the split."""

    activations: int
    latents_activated: int
    interpretable: int
    layer_share: dict[int, float] | None
    """Layer -> share of the activations read from it; None where there is no single layer."""
    by_threshold: tuple[AtThreshold, ...]
    """Ascending, the main one among them."""


def summarise(tally: Tally, few: StrongestFew, *, min_contexts: int, layers: bool) -> Summary:
    """Counts at every threshold.

    Args:
        layers: whether activations have one.
    """
    by_threshold = tuple(
        AtThreshold(
            threshold=threshold,
            interpretable=int(np.count_nonzero(few.contexts_F(threshold) >= min_contexts)),
            latents_activated=tally.latents_activated(threshold),
            activations=activations,
        )
        for threshold, activations in tally.activations.items()
    )
    main = next(counts for counts in by_threshold if counts.threshold == tally.threshold)
    shares = tally.layers_FL.sum(0) / max(main.activations, 1)
    return Summary(
        activations=main.activations,
        latents_activated=main.latents_activated,
        interpretable=main.interpretable,
        layer_share=dict(zip(tally.layers, shares.tolist(), strict=True)) if layers else None,
        by_threshold=by_threshold,
    )


def latent_records(
    tally: Tally, latents: Ints, activations: Path, *, layers: bool
) -> Iterator[tuple[int, Record]]:
    """Latents, ascending, and their counts above the main threshold.

    Args:
        activations: the file they are in.
        layers: whether activations have one.
    """
    found = histograms(
        activations, latents, threshold=tally.threshold, max_F=tally.max_F, bins=_BINS
    )
    for latent, edges, counts, total in zip(latents.tolist(), *found, strict=True):
        yield (
            latent,
            {
                "activations": int(tally.count_F[latent]),
                "max": _shortest(tally.max_F[latent]),
                "mean": float(total / tally.count_F[latent]),
                "layers": _nonzero(tally.layers, tally.layers_FL[latent]) if layers else None,
                "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
            },
        )


def context_records(
    kept: Activations, text: StoreText, *, context: int, max_tokens: int
) -> Iterator[tuple[int, dict[str, list[Record]]]]:
    """Latents, ascending, and for each type of token its contexts, the strongest first.

    Types with equally strong ones are in the order of their names.

    Args:
        kept: as `StrongestFew.strongest` orders them.
        context: positions in a row of the store.
    """
    shown = text.contexts(kept.token_P, max_tokens)
    columns = zip(*(column.tolist() for column in kept), kept.value_P, shown, strict=True)
    for latent, of_latent in groupby(columns, key=lambda column: column[1]):
        types: dict[str, list[Record]] = {}
        for token, _, _, layer, type_number, value, (words, first, last) in of_latent:
            row, position = divmod(token, context)
            entry = {
                "context": words,
                "activation": _shortest(value),
                "row": row,
                "position": position,
                "layer": None if layer == NO_LAYER else layer,
                "first": first,
                "last": last,
            }
            types.setdefault(text.type_names[type_number], []).append(entry)
        strongest_first = sorted(
            types.items(), key=lambda item: (-item[1][0]["activation"], item[0])
        )
        yield latent, dict(strongest_first)


def write_record(path: Path, head: Record, maps: Mapping[str, Iterable[tuple[int, Any]]]) -> None:
    """Write a JSON object whole, a line for each key of `head` and for each item of a map.

    `json` would take ten times as long to indent it all, and `maps` need not be in memory.
    """
    with whole_file(path) as partial, partial.open("wb") as file:
        crc = 0

        def write(text: str) -> None:
            nonlocal crc
            file.write(text.encode())
            crc = google_crc32c.extend(crc, text.replace("\n", "").encode())

        write("{\n" + ", \n".join(f"{_json(key)}: {_json(head[key])}" for key in head))
        for name, items in maps.items():
            write(f", \n{_json(name)}: {{")
            for index, (key, value) in enumerate(items):
                write(f"{', ' if index else ''}\n{_json(str(key))}: {_json(value)}")
            write("\n}")
        # as `read_json` compares it: of the object on one line, without its checksum
        crc = google_crc32c.extend(crc, b"}")
        file.write(f", \n{_json(CHECKSUM)}: {crc}\n}}\n".encode())


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _shortest(value: np.float32) -> float:
    """The number with the fewest digits that is this float32."""
    return float(str(value))


def _nonzero(layers: tuple[int, ...], counts_L: Ints) -> dict[int, int]:
    return {layer: n for layer, n in zip(layers, counts_L.tolist(), strict=True) if n}
