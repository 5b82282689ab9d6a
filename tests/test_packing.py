"""SAEs shared out over workers."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given, settings

from routesae_cache.packing import pack
from routesae_cache.saes.cost import step_latents
from tests.pipeline_helpers import topk


def count(layers: frozenset[int]) -> int:
    return len(layers)


def test_cost_counts_what_the_coder_sees() -> None:
    assert step_latents(topk((3,), latents=100)) == 100
    assert step_latents(topk((1, 2, 3), latents=100)) == 100  # routed: one vector a token
    assert step_latents(topk((1, 2, 3), latents=100, selector="every")) == 300


def test_costs_are_balanced() -> None:
    saes = [topk((3,), latents=n * 1000) for n in (8, 7, 6, 5, 4)]
    assert pack(saes, 2, count) == [(0, 1), (2, 3, 4)]
    assert pack(saes, 1, count) == [(0, 1, 2, 3, 4)]
    assert pack(saes, 9, count) == [(0,), (1,), (2,), (3,), (4,)]


def test_those_of_one_layer_come_together() -> None:
    saes = [topk((layer,), latents=1000) for layer in (1, 2, 3, 3, 2, 1)]
    assert pack(saes, 3, count) == [(0, 5), (1, 4), (2, 3)]


def test_layers_that_have_to_be_read_first_count() -> None:
    """In the delta codec the last of sixteen layers takes all of them: two such stay together."""
    saes = [topk((layer,), latents=1000) for layer in (16, 2, 16, 2)]
    assert pack(saes, 2, lambda layers: max(layers)) == [(0, 2), (1, 3)]
    # while reading all that again is dearer than sharing the training out evenly
    saes = [topk((layer,), latents=500) for layer in (16, 16, 2)]
    assert pack(saes, 2, lambda layers: max(layers)) == [(0, 1), (2,)]


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 4)), min_size=1, max_size=12),
    st.integers(1, 5),
)
@settings(max_examples=60)
def test_each_has_one_place_and_no_group_is_far_above_the_mean(
    saes: list[tuple[int, int]], groups: int
) -> None:
    given_saes = [topk((layer,), latents=1000 * size) for size, layer in saes]
    found = pack(given_saes, groups, count)
    assert sorted(index for group in found for index in group) == list(range(len(saes)))
    assert all(found)
    assert len(found) == min(groups, len(saes))
    costs = [sum(saes[index][0] for index in group) for group in found]
    best = max(sum(costs) / len(found), max(size for size, _ in saes))
    assert max(costs) <= 2 * best
