"""The strongest few activations of each latent and token type, in memory that does not grow.

A latent is interpretable at a threshold if at most `max_token_types` types of token activate it
above that, in at least `min_contexts` contexts. So a latent is given up at a threshold as soon as
it has more types there, and what only that threshold asked for is forgotten. Types only become
more and thresholds are given up from the lowest, so what is left does not depend on how the
activations were cut into batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

NO_TYPE = -1  # of a token that makes no context
NO_LAYER = -1
_LEAST_WAITING = 1 << 16  # activations, before they are sorted in
_TYPE_BITS = 32


class Activations(NamedTuple):
    """P active (token, latent) pairs."""

    token_P: Ints
    """Row of the store times its context, plus the position: ascending with the text."""
    latent_P: Ints
    value_P: Floats
    layer_P: NDArray[np.int16]
    """The layer it was read from; NO_LAYER where there is no single one."""
    type_P: Ints
    """The token's type; NO_TYPE where it makes no context."""

    def key_P(self) -> Ints:
        """One number for each latent and type."""
        return (self.latent_P << _TYPE_BITS) | self.type_P

    def take(self, which: NDArray[np.bool_] | Ints | slice) -> Activations:
        """Some of the pairs, by mask, index or range."""
        return Activations(
            self.token_P[which],
            self.latent_P[which],
            self.value_P[which],
            self.layer_P[which],
            self.type_P[which],
        )


NOTHING = Activations(
    np.empty(0, np.int64),
    np.empty(0, np.int64),
    np.empty(0, np.float32),
    np.empty(0, np.int16),
    np.empty(0, np.int64),
)


def joined(parts: Sequence[Activations]) -> Activations:
    """Several of them as one."""
    return Activations(*map(np.concatenate, zip(*parts, strict=True)))


def float32_at_most(threshold: float) -> np.float32:
    """The largest float32 that is not above a number: float32 values are above both or neither."""
    nearest = np.float32(threshold)
    return nearest if float(nearest) <= threshold else np.nextafter(nearest, np.float32(-np.inf))


def strongest_layer_of_each(found: Activations) -> Activations:
    """One pair of each token and latent, the strongest; among equals the first."""
    by_pair = np.lexsort((-found.value_P, found.latent_P, found.token_P))
    token_P, latent_P = found.token_P[by_pair], found.latent_P[by_pair]
    return found.take(np.sort(by_pair[_begins(token_P) | _begins(latent_P)]))


class StrongestFew:
    """The strongest `per_token` activations of each latent and type of token above a threshold.

    Of equal activations the earlier token counts as the stronger. A latent is dropped at a
    threshold above which more than `max_token_types` types activate it. At most
    `latents · max_token_types · per_token` activations are held, and as many wait to be sorted in.

    Args:
        latents: how many there are.
        thresholds: those asked about later.
    """

    def __init__(
        self, latents: int, thresholds: Sequence[float], *, per_token: int, max_token_types: int
    ) -> None:
        self._levels = np.array(sorted(map(float32_at_most, thresholds)), np.float32)
        self._per_token, self._max_types = per_token, max_token_types
        self._floor_F = np.full(latents, self._levels[0])  # what is not above it is of no use
        self._kept = NOTHING
        self._waiting: list[Activations] = []
        self._n_waiting = 0

    def add(self, found: Activations) -> None:
        """Add activations of later tokens than all before; those without a type are left out.

        Args:
            found: ordered by token; at most one of each token and latent.
        """
        useful = (found.type_P != NO_TYPE) & (found.value_P > self._floor_F[found.latent_P])
        if not (n_useful := int(np.count_nonzero(useful))):
            return
        self._waiting.append(found.take(useful))
        self._n_waiting += n_useful
        if self._n_waiting >= max(_LEAST_WAITING, len(self._kept.token_P)):
            self._sort_in()

    def merge(self, later: StrongestFew, types: Ints) -> None:
        """Add all that another one was given, of later tokens than all before.

        Args:
            types: the number here of each of its types.
        """
        self._sort_in()
        self._floor_F = np.maximum(self._floor_F, later._floor_F)
        self._kept = self._kept.take(self._kept.value_P > self._floor_F[self._kept.latent_P])
        # not ordered by token, but those that may be equal, of one latent and type, are
        found = joined([later._kept, *later._waiting])
        self.add(found._replace(type_P=types[found.type_P]))

    def contexts_F(self, threshold: float) -> Ints:
        """How many activations of each latent are kept above one of the thresholds.

        It is 0 for latents that were dropped at it.
        """
        return np.bincount(self._above(threshold).latent_P, minlength=len(self._floor_F))

    def strongest(self, threshold: float, latents: Ints) -> Activations:
        """What is kept of some latents above one of the thresholds.

        Ordered by latent; within it types are together, and each type's strongest comes first.
        """
        kept = self._above(threshold)
        return kept.take(np.isin(kept.latent_P, latents))

    def __len__(self) -> int:
        """Activations held."""
        return len(self._kept.token_P) + self._n_waiting

    def _above(self, threshold: float) -> Activations:
        self._sort_in()
        level = float32_at_most(threshold)
        assert level in self._levels
        alive_P = self._floor_F[self._kept.latent_P] <= level
        return self._kept.take(alive_P & (self._kept.value_P > level))

    def _sort_in(self) -> None:
        if not self._n_waiting:
            return
        found = joined([self._kept, *self._waiting])
        self._waiting, self._n_waiting = [], 0
        # stable, and equal ones of a latent and type come in the order of their tokens
        found = found.take(np.lexsort((-found.value_P, found.key_P())))
        begins_P = _begins(found.key_P())
        self._raise_floors(found.latent_P[begins_P], found.value_P[begins_P])
        strong_P = _rank(begins_P) < self._per_token
        self._kept = found.take(strong_P & (found.value_P > self._floor_F[found.latent_P]))

    def _raise_floors(self, latent_Y: Ints, strongest_Y: Floats) -> None:
        """Give up thresholds of latents with too many of the Y types.

        A latent has no more types than it may have above the strongest activation of its type
        number `max_token_types + 1`, counted from the one with the strongest.
        """
        order = np.lexsort((-strongest_Y, latent_Y))
        latent_Y, strongest_Y = latent_Y[order], strongest_Y[order]
        over_Y = _rank(_begins(latent_Y)) == self._max_types
        levels = np.append(self._levels, np.float32(np.inf))
        at_least = np.searchsorted(self._levels, strongest_Y[over_Y])
        self._floor_F[latent_Y[over_Y]] = levels[at_least]


def _begins(sorted_P: Ints) -> NDArray[np.bool_]:
    """Where a run of equal numbers begins."""
    begins_P = np.ones(len(sorted_P), np.bool_)
    np.not_equal(sorted_P[1:], sorted_P[:-1], out=begins_P[1:])
    return begins_P


def _rank(begins_P: NDArray[np.bool_]) -> Ints:
    """How far each is from where its run begins."""
    index_P = np.arange(len(begins_P))
    return index_P - np.maximum.accumulate(np.where(begins_P, index_P, 0))


class Tally:
    """Counts of the activations of one SAE, added up batch by batch.

    `activations`: how many there were above each threshold. `max_F`: each latent's strongest.
    Above the main threshold, for each latent `count_F` and, by layer, `layers_FL`.

    Args:
        latents: how many there are.
        layers: those a latent may be read from.
        threshold: the main one.
        thresholds: all of them, ascending.
    """

    def __init__(
        self, latents: int, layers: tuple[int, ...], threshold: float, thresholds: Sequence[float]
    ) -> None:
        self.threshold, self.layers = threshold, layers
        self._level = float32_at_most(threshold)
        self._column = np.full(max(layers) + 2, -1)  # of a layer; NO_LAYER is the last
        self._column[list(layers)] = np.arange(len(layers))
        self.activations = dict.fromkeys(thresholds, 0)
        self.max_F = np.zeros(latents, np.float32)
        self.layers_FL = np.zeros((latents, len(layers)), np.int64)
        self.count_F = np.zeros(latents, np.int64)

    def add(self, found: Activations) -> None:
        """Add activations above the lowest threshold."""
        for threshold in self.activations:
            above_P = found.value_P > float32_at_most(threshold)
            self.activations[threshold] += int(np.count_nonzero(above_P))
        np.maximum.at(self.max_F, found.latent_P, found.value_P)
        above = found.take(found.value_P > self._level)
        np.add.at(self.count_F, above.latent_P, 1)
        column_P = self._column[above.layer_P]
        known = column_P >= 0
        np.add.at(self.layers_FL, (above.latent_P[known], column_P[known]), 1)

    def merge(self, other: Tally) -> None:
        """Add the counts of another one, of the same SAE."""
        for threshold, count in other.activations.items():
            self.activations[threshold] += count
        np.maximum(self.max_F, other.max_F, out=self.max_F)
        self.count_F += other.count_F
        self.layers_FL += other.layers_FL

    def latents_activated(self, threshold: float) -> int:
        """Latents with an activation above it."""
        return int(np.count_nonzero(self.max_F > float32_at_most(threshold)))
