"""What the activations of one SAE add up to, over a whole split or some of its chunks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from routesae_cache.contexts.mining import (
    NO_LAYER,
    Activations,
    Floats,
    Ints,
    StrongestFew,
    Tally,
    float32_at_most,
    strongest_layer_of_each,
)
from routesae_cache.saes.config import SaeConfig
from routesae_cache.saes.output import DenseLatents, FlatLatents, Latents, Reading, RowLatents


class Findings:
    """Counts and the strongest few activations of an SAE.

    Args:
        threshold: the main one.
        thresholds: all of them, ascending.
        per_token: as `StrongestFew` has it, and so `max_token_types`.
    """

    def __init__(
        self,
        sae: SaeConfig,
        threshold: float,
        thresholds: Sequence[float],
        *,
        per_token: int,
        max_token_types: int,
    ) -> None:
        self._layers = sae.layers
        self.has_layers = _reads_single_layers(sae)
        self._lowest = float(float32_at_most(thresholds[0]))
        self._main = float32_at_most(threshold)
        self.tally = Tally(sae.latents, sae.layers, threshold, thresholds)
        self.few = StrongestFew(
            sae.latents, thresholds, per_token=per_token, max_token_types=max_token_types
        )
        self.strongest = -math.inf
        """The largest activation there was."""

    def add(self, reading: Reading, token_N: Ints, type_N: Ints) -> Activations:
        """Add a batch of later tokens; returns its activations above the main threshold."""
        above = _above(reading.latents, self._lowest)
        self.strongest = max(self.strongest, above.strongest)
        vectors = above.rows // len(token_N)
        index_P = above.row_P // vectors
        layer_P = np.full(len(index_P), NO_LAYER, np.int16)
        if self.has_layers:
            assert reading.layer_M is not None
            layer_M = np.array(self._layers, np.int16)[reading.layer_M.cpu().numpy()]
            layer_P = layer_M[above.row_P]
        found = Activations(
            token_N[index_P], above.latent_P, above.value_P, layer_P, type_N[index_P]
        )
        self.tally.add(found)
        self.few.add(strongest_layer_of_each(found) if vectors > 1 else found)
        return found.take(found.value_P > self._main)

    def merge(self, later: Findings, types: Ints) -> None:
        """Add what was found in later tokens.

        Args:
            types: as `StrongestFew.merge` has them.
        """
        self.strongest = max(self.strongest, later.strongest)
        self.tally.merge(later.tally)
        self.few.merge(later.few, types)


class _Above(NamedTuple):
    """The active pairs above a threshold."""

    row_P: Ints
    latent_P: Ints
    value_P: Floats
    rows: int
    """Coded vectors that were looked at."""
    strongest: float
    """The largest value of all."""


def _above(latents: Latents, level: float) -> _Above:
    """What `pairs` gives, above a threshold: the many others are left where they are."""
    match latents:
        case RowLatents(index_MK, value_MK):
            row_P, slot_P = torch.nonzero(value_MK > level, as_tuple=True)
            values, rows = value_MK, len(value_MK)
            index_P, value_P = index_MK[row_P, slot_P], value_MK[row_P, slot_P]
        case DenseLatents(value_MF):
            row_P, index_P = torch.nonzero(value_MF > level, as_tuple=True)
            values, rows, value_P = value_MF, len(value_MF), value_MF[row_P, index_P]
        case FlatLatents(row_P, index_P, values, rows):
            keep_P = values > level
            row_P, index_P, value_P = row_P[keep_P], index_P[keep_P], values[keep_P]
    return _Above(
        row_P.cpu().numpy(),
        index_P.cpu().numpy(),
        value_P.cpu().numpy(),
        rows,
        float(values.max()) if values.numel() else -math.inf,
    )


def _reads_single_layers(sae: SaeConfig) -> bool:
    """Whether each of its latents' values comes from one layer."""
    return sae.selector != "all" and sae.hard
