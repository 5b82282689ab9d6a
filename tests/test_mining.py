"""Mining against plain dictionaries, on random activations with many ties."""

from __future__ import annotations

from collections import defaultdict
from itertools import chain, pairwise
from typing import Any, NamedTuple

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from routesae_cache.contexts import mining
from routesae_cache.contexts.mining import (
    NO_LAYER,
    NO_TYPE,
    Activations,
    StrongestFew,
    Tally,
    float32_at_most,
    strongest_layer_of_each,
)

LATENTS, TYPES, LAYERS = 4, 7, (2, 3, 5)
THRESHOLDS = (1.0, 2.0, 3.0)


class Pair(NamedTuple):
    """One activation."""

    token: int
    latent: int
    value: float
    layer: int
    type: int


def activations(pairs: list[Pair]) -> Activations:
    columns = [[pair[i] for pair in pairs] for i in range(5)]
    dtypes = (np.int64, np.int64, np.float32, np.int16, np.int64)
    return Activations(*(np.array(c, d) for c, d in zip(columns, dtypes, strict=True)))


def pairs_of(found: Activations) -> list[Pair]:
    return [Pair(*row) for row in zip(*(column.tolist() for column in found), strict=True)]


@st.composite
def passes(draw: Any) -> list[list[Pair]]:
    """Batches of activations in the order of their tokens; few different values, so many tie."""
    tokens = draw(st.integers(0, 60))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    density = draw(st.sampled_from([0.1, 0.5, 0.9]))
    types = rng.integers(NO_TYPE, TYPES, tokens).tolist()
    found = [
        [
            Pair(token, latent, float(rng.integers(1, 9)) / 2, LAYERS[latent % 3], types[token])
            for latent in range(LATENTS)
            if rng.random() < density
        ]
        for token in range(tokens)
    ]
    cuts = sorted(rng.integers(0, tokens + 1, draw(st.integers(0, 9))).tolist())
    edges = [0, *cuts, tokens]
    return [list(chain(*found[a:b])) for a, b in pairwise(edges)]


def brute_force(
    batches: list[list[Pair]], threshold: float, *, per_token: int, max_types: int
) -> dict[int, dict[int, list[Pair]]]:
    """Latent -> type -> its strongest, for latents with no more types than allowed."""
    found: dict[int, dict[int, list[Pair]]] = defaultdict(lambda: defaultdict(list))
    for pair in chain(*batches):
        if pair.value > threshold and pair.type != NO_TYPE:
            found[pair.latent][pair.type].append(pair)
    return {
        latent: {
            number: sorted(pairs, key=lambda pair: (-pair.value, pair.token))[:per_token]
            for number, pairs in types.items()
        }
        for latent, types in found.items()
        if len(types) <= max_types
    }


@settings(max_examples=150)
@given(passes(), st.integers(1, 3), st.integers(1, 6), st.sampled_from([1, 7, 1000]))
def test_against_dictionaries(
    batches: list[list[Pair]], per_token: int, max_types: int, waiting: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mining, "_LEAST_WAITING", waiting)
        few = StrongestFew(LATENTS, THRESHOLDS, per_token=per_token, max_token_types=max_types)
        for batch in batches:
            few.add(activations(batch))
    for threshold in THRESHOLDS:
        expected = brute_force(batches, threshold, per_token=per_token, max_types=max_types)
        kept: dict[int, dict[int, list[Pair]]] = defaultdict(lambda: defaultdict(list))
        for pair in pairs_of(few.strongest(threshold, np.arange(LATENTS))):
            kept[pair.latent][pair.type].append(pair)
        assert kept == expected
        assert list(kept) == sorted(kept)
        counts = [sum(map(len, expected.get(latent, {}).values())) for latent in range(LATENTS)]
        assert few.contexts_F(threshold).tolist() == counts


def test_only_asked_latents() -> None:
    few = StrongestFew(3, [0.0], per_token=1, max_token_types=9)
    few.add(activations([Pair(0, latent, 1.0, 2, 0) for latent in range(3)]))
    assert few.strongest(0.0, np.array([0, 2])).latent_P.tolist() == [0, 2]


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mining, "_LEAST_WAITING", 64)
    latents, per_token, max_types, batch = 3, 2, 4, 500
    few = StrongestFew(latents, [1.0, 2.0], per_token=per_token, max_token_types=max_types)
    rng, most = np.random.default_rng(0), 0
    for number in range(100):
        token_P = np.arange(batch) + number * batch
        latent_P = rng.integers(0, latents, batch)
        # the first latent is dropped at 1, the second at both, the third has two types
        type_P = rng.integers(0, [3000, 3000, 2], (batch, 3))[np.arange(batch), latent_P]
        value_P = np.array([1.5, 2.5, 2.5], np.float32)[latent_P]
        layer_P = np.zeros(batch, np.int16)
        few.add(Activations(token_P, latent_P, value_P, layer_P, type_P))
        most = max(most, len(few))
        assert len(few._waiting) < 100  # nor does a list of empty batches grow
    kept = latents * max_types * per_token
    assert most <= kept + batch + 64
    assert few.contexts_F(1.0).tolist() == [0, 0, 4]
    assert len(few) == 4


@given(st.floats(0, 1e6), st.floats(0, 1e6, width=32))
def test_thresholds_between_float32_numbers(threshold: float, value: float) -> None:
    level = float32_at_most(threshold)
    assert level <= threshold
    for near in (np.float32(value), level, np.nextafter(level, np.float32(np.inf))):
        assert (near > level) == (float(near) > threshold)


def test_thresholds_apart_in_the_last_digit() -> None:
    value = np.float32(0.1)
    below, above = 0.1, float(np.nextafter(float(value), 1))
    few = StrongestFew(1, [below, above], per_token=1, max_token_types=1)
    few.add(activations([Pair(0, 0, float(value), 2, 0)]))
    assert few.contexts_F(below).tolist() == [1]
    assert few.contexts_F(above).tolist() == [0]


@given(st.integers(0, 10**6))
def test_one_layer_of_each_token_and_latent(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pairs = [
        Pair(token, latent, float(rng.integers(1, 4)), layer, token % 2)
        for token in range(5)
        for layer in LAYERS
        for latent in rng.permutation(3).tolist()
        if rng.random() < 0.6
    ]
    best: dict[tuple[int, int], Pair] = {}
    for pair in pairs:
        key = pair.token, pair.latent
        if key not in best or pair.value > best[key].value:
            best[key] = pair
    kept = pairs_of(strongest_layer_of_each(activations(pairs)))
    assert kept == sorted(best.values(), key=pairs.index)


@given(passes())
def test_tally(batches: list[list[Pair]]) -> None:
    tally = Tally(LATENTS, LAYERS, 2.0, THRESHOLDS)
    for batch in batches:
        tally.add(activations([pair for pair in batch if pair.value > THRESHOLDS[0]]))
    pairs = list(chain(*batches))
    for threshold in THRESHOLDS:
        above = [pair for pair in pairs if pair.value > threshold]
        assert tally.activations[threshold] == len(above)
        assert tally.latents_activated(threshold) == len({pair.latent for pair in above})
    for latent in range(LATENTS):
        values = [pair.value for pair in pairs if pair.latent == latent and pair.value > 2]
        assert tally.count_F[latent] == len(values)
        assert tally.max_F[latent] == max(values, default=tally.max_F[latent])
        by_layer = [len(values) if layer == LAYERS[latent % 3] else 0 for layer in LAYERS]
        assert tally.layers_FL[latent].tolist() == by_layer


@given(passes(), st.integers(1, 3), st.integers(1, 4), st.integers(0, 9))
def test_merged_parts_are_as_one_pass(
    batches: list[list[Pair]], per_token: int, max_types: int, cut: int
) -> None:
    """Also where a part numbers its types in another way."""
    renumbered = np.random.default_rng(cut).permutation(TYPES)

    def empty() -> tuple[StrongestFew, Tally]:
        few = StrongestFew(LATENTS, THRESHOLDS, per_token=per_token, max_token_types=max_types)
        return few, Tally(LATENTS, LAYERS, 2.0, THRESHOLDS)

    (whole, total), (merged, sums) = empty(), empty()
    for index in range(0, len(batches), cut + 1):
        part, counts = empty()
        for batch in batches[index : index + cut + 1]:
            found = activations(batch)
            whole.add(found)
            known_P = found.type_P != NO_TYPE
            types_P = np.where(known_P, renumbered[found.type_P], NO_TYPE)
            part.add(found._replace(type_P=types_P))
            above = found.take(found.value_P > THRESHOLDS[0])
            total.add(above)
            counts.add(above)
        merged.merge(part, np.argsort(renumbered))
        sums.merge(counts)
    every = np.arange(LATENTS)
    for threshold in THRESHOLDS:
        assert merged.contexts_F(threshold).tolist() == whole.contexts_F(threshold).tolist()
        expected = pairs_of(whole.strongest(threshold, every))
        assert pairs_of(merged.strongest(threshold, every)) == expected
    assert sums.activations == total.activations
    for name in ("max_F", "count_F", "layers_FL"):
        np.testing.assert_array_equal(getattr(sums, name), getattr(total, name))


def test_tally_without_layers() -> None:
    tally = Tally(2, LAYERS, 0.0, [0.0])
    tally.add(activations([Pair(0, 1, 1.0, NO_LAYER, 0)]))
    assert tally.count_F.tolist() == [0, 1]
    assert not tally.layers_FL.any()
