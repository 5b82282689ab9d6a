"""How SAEs are shared out to workers so that all end together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

from routesae_cache.saes.config import SaeConfig
from routesae_cache.saes.cost import step_latents

_READ_LATENTS = 140.0  # measured: reading and decoding a layer, in the unit of `step_latents`


def pack(
    saes: Sequence[SaeConfig], groups: int, layers_to_read: Callable[[frozenset[int]], int]
) -> list[tuple[int, ...]]:
    """Share out SAEs so that the costliest group costs little: indexes, in at most `groups` groups.

    SAEs of the same layers come together where that saves more reading than it costs in balance.

    Args:
        layers_to_read: how many layers of the store have to be read for some.
    """
    costs = [step_latents(sae) for sae in saes]

    def cost(group: Sequence[int]) -> float:
        layers = frozenset(layer for index in group for layer in saes[index].layers)
        reading = _READ_LATENTS * layers_to_read(layers) if layers else 0.0
        return sum(costs[index] for index in group) + reading

    found: list[list[int]] = [[] for _ in range(min(groups, len(saes)))]
    for index in sorted(range(len(saes)), key=lambda index: -costs[index]):
        min(found, key=lambda group: cost([*group, index])).append(index)
    while _improve(found, cost):
        pass
    return sorted(tuple(sorted(group)) for group in found)


def _improve(groups: list[list[int]], cost: Callable[[Sequence[int]], float]) -> bool:
    """Move an SAE from the costliest group to another, or swap two, where that saves most."""
    worst = max(groups, key=cost)
    before = cost(worst)
    best = (before, before)
    change: tuple[list[int], list[int], list[int]] | None = None
    for other in groups:
        if other is worst:
            continue
        for mine, theirs in product(worst, [None, *other]):
            here = [index for index in worst if index != mine]
            here += [] if theirs is None else [theirs]
            there = [index for index in other if index != theirs] + [mine]
            pair = cost(here), cost(there)
            after = (max(pair), min(pair))
            if here and after < best and after < (before, cost(other)):
                best, change = after, (other, here, there)
    if change is None:
        return False
    other, worst[:], other[:] = change
    return True
