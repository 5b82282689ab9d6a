"""The tables of `routesae evaluate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from cli.console import layer_name
from cli.layer_table import layer_table

if TYPE_CHECKING:
    from routesae_cache.evaluate import Evaluation
    from routesae_cache.metrics import Estimate, Spliced, SplicedMetrics

_PER_LAYER_TABLES = 3
_CHOOSE_A_LAYER = ("route", "random")


def evaluation_tables(results: Sequence[Evaluation], model: str) -> Iterator[Table | str]:
    """What to print of some runs' results; `model` is the name of the store's."""
    yield _reconstruction_table(results)
    if routed := [result for result in results if result.reconstruction.router_share]:
        yield _routing_table(routed)
    chosen = [r for r in results if r.config.sae.selector in _CHOOSE_A_LAYER]
    if shares := [(r.config.name, r.reconstruction.layer_use or {}) for r in chosen]:
        yield layer_table("Share of tokens read from each layer", shares)
    spliced = [(r, r.spliced) for r in results if r.spliced is not None]
    if spliced:
        yield _spliced_table(spliced, model)
        yield from _per_layer_tables(spliced)


def _reconstruction_table(results: Sequence[Evaluation]) -> Table:
    tokens = results[0].reconstruction.tokens
    table = Table(title=f"Reconstruction on {tokens:,} tokens", title_justify="left")
    table.add_column("run", overflow="fold")
    table.add_column("reads", overflow="fold")
    for name in ("latents", "NormMSE", "explained", "L0", "dead"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        metrics, sae = result.reconstruction, result.config.sae
        reads = layer_name(sae.layers[0]) if len(sae.layers) == 1 else f"{len(sae.layers)} layers"
        table.add_row(
            result.config.name,
            reads,
            f"{sae.latents}",
            f"{metrics.nmse:.4f}",
            f"{metrics.explained_variance:.1%}",
            f"{metrics.l0:.1f}",
            f"{metrics.dead_share:.1%}",
        )
    return table


def _routing_table(results: Sequence[Evaluation]) -> Table:
    from routesae_cache.evaluate import uniform_entropy

    table = Table(title="Routing: NormMSE by who picks the layer", title_justify="left")
    table.add_column("run", overflow="fold")
    for name in ("router", "random layer", "best layer", "entropy", "of uniform"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        entropy = result.reconstruction.router_entropy
        assert entropy is not None
        routing = result.routing
        by = (routing.router, routing.random, routing.oracle) if routing else (None,) * 3
        table.add_row(
            result.config.name,
            *("-" if value is None else f"{value:.4f}" for value in by),
            f"{entropy:.3f} nats",
            f"{entropy / uniform_entropy(len(result.config.sae.layers)):.0%}",
        )
    return table


def _spliced_table(results: Sequence[tuple[Evaluation, Spliced]], model: str) -> Table:
    _, first = results[0]
    title = (
        f"Spliced into {model} on {first.rows:,} rows, {first.tokens:,} tokens\n"
        f"its own cross-entropy is {first.ce:.3f} nats"
    )
    if first.ablation:
        title += f"; recovered against a {first.ablation} ablation"
    table = _metrics_table(title, "run", "at")
    for result, spliced in results:
        table.add_row(result.config.name, _place(result, spliced), *_cells(spliced))
    return table


def _per_layer_tables(results: Sequence[tuple[Evaluation, Spliced]]) -> Iterator[Table | str]:
    several = [(r.config.name, s.per_layer) for r, s in results if s.per_layer is not None]
    if len(several) > _PER_LAYER_TABLES:
        yield "Of each layer spliced alone the results are in the file that --json writes."
        return
    for name, per_layer in several:
        table = _metrics_table(f"{name}, each layer spliced alone", "layer")
        for layer, metrics in per_layer.items():
            table.add_row(layer_name(layer), *_cells(metrics))
        yield table


def _metrics_table(title: str, *labels: str) -> Table:
    table = Table(title=title, title_justify="left")
    for label in labels:
        table.add_column(label, overflow="fold")
    for name in ("KL, nats a token", "KL a row", "ΔCE, nats", "recovered"):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _place(result: Evaluation, spliced: Spliced) -> str:
    sae = result.config.sae
    if spliced.per_layer is not None:
        return f"{len(sae.layers)} layers, mean"
    if spliced.at_layer is not None:
        return f"layer {spliced.at_layer}"
    return f"layer {sae.layers[0]}" if len(sae.layers) == 1 else "each token's"


def _cells(metrics: SplicedMetrics) -> tuple[str, str, str, str]:
    return (
        _with_error(metrics.kl, ".4f"),
        _with_error(metrics.kl_per_row, ".1f"),
        _with_error(metrics.delta_ce, ".4f"),
        _with_error(metrics.recovered, ".1%") if metrics.recovered else "-",
    )


def _with_error(estimate: Estimate, form: str) -> str:
    mean = f"{estimate.mean:{form}}"
    return mean if estimate.se is None else f"{mean} ± {estimate.se:{form}}"
