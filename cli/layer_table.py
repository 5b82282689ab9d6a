"""How a share is spread over layers, for one run or many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from cli.console import layer_list, layer_name, out

Shares = Sequence[tuple[str, Mapping[int, float]]]
"""For each run its name and the share of each layer."""

_SIDE_BY_SIDE, _LEAST_BAR, _LONGEST_BAR = 3, 6, 20
_LAYER_COLUMN, _CELL = 30, 10  # characters of the table that are not bars
_HEIGHTS = " ▁▂▃▄▅▆▇█"


def layer_table(title: str, shares: Shares) -> Table:
    """A column a run with every number where a few fit side by side, otherwise a row a run."""
    bar = min((out.width - _LAYER_COLUMN) // len(shares) - _CELL, _LONGEST_BAR)
    table = Table(title=title, title_justify="left")
    if len(shares) <= _SIDE_BY_SIDE and bar >= _LEAST_BAR:
        _by_layer(table, shares, bar)
    else:
        _by_run(table, shares)
    return table


def _by_layer(table: Table, shares: Shares, bar: int) -> None:
    table.add_column("layer")
    for name, _ in shares:
        table.add_column(name, overflow="fold")
    widest = max(max(share.values()) for _, share in shares)
    for layer in sorted({layer for _, share in shares for layer in share}):
        cells = (
            f"{share[layer]:6.1%} {'█' * round(bar * share[layer] / widest)}"
            if layer in share
            else ""
            for _, share in shares
        )
        table.add_row(layer_name(layer), *cells)


def _by_run(table: Table, shares: Shares) -> None:
    table.add_column("run", overflow="fold")
    for name in ("layers", "first to last", "most", "share"):
        table.add_column(name, no_wrap=True)
    for name, share in shares:
        layers = sorted(share)
        most = max(layers, key=lambda layer: share[layer])
        heights = (round((len(_HEIGHTS) - 1) * share[layer] / share[most]) for layer in layers)
        profile = "".join(_HEIGHTS[height] for height in heights)
        table.add_row(
            name, layer_list(tuple(layers)), profile, f"layer {most}", f"{share[most]:.1%}"
        )
