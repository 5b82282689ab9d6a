"""`routesae evaluate`: a store and runs -> metrics."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from cli.console import bar, err, layer_name, out
from cli.options import Device, StoreArgument, pick_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    from routesae_cache.evaluate import Evaluation


class SplitKind(StrEnum):
    """Parts of a store."""

    eval = "eval"
    train = "train"


def evaluate(
    store: StoreArgument,
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.", metavar="RUN…")],
    split: Annotated[SplitKind, typer.Option(help="Tokens to evaluate on.")] = SplitKind.eval,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the results there, too.")
    ] = None,
    infer_k: Annotated[
        int | None, typer.Option(help="Keep the k largest latents instead of the SAE's own rule.")
    ] = None,
    theta: Annotated[
        float | None, typer.Option(help="Keep latents above this instead of the SAE's own rule.")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(help="Tokens at a time.")] = 2048,
    routing_tokens: Annotated[
        int, typer.Option(help="Tokens on which routing is compared with the best layer; 0: none.")
    ] = 8192,
    device: Device = "auto",
) -> None:
    """Measure reconstruction on held-out tokens, from the store alone."""
    with err.status("Opening the store and the runs"):
        from routesae_cache.checkpoint import write_json
        from routesae_cache.evaluate import EvaluateConfig
        from routesae_cache.evaluate import evaluate as run_evaluation
        from routesae_cache.trained import ReadingRule
        from stores.reader import StoreReader

        config = EvaluateConfig(
            split=split.value,
            batch_tokens=batch_tokens,
            rule=ReadingRule(infer_k=infer_k, theta=theta),
            routing_tokens=routing_tokens,
            device=pick_device(device),
        )
        reader = StoreReader(store)
        if json_path is not None:
            json_path.parent.mkdir(parents=True, exist_ok=True)
    with bar("Evaluating") as update:
        results = run_evaluation(
            reader, runs, config, lambda done, total: update(completed=done, total=total)
        )
    out.print(_reconstruction_table(results))
    routed = [result for result in results if result.reconstruction.router_share]
    if routed:
        out.print(_routing_table(routed))
    used = [result for result in results if result.reconstruction.layer_use]
    used = [result for result in used if len(result.reconstruction.layer_use or ()) > 1]
    if used:
        out.print(_layer_table(used))
    for result in results:
        if (layer := result.collapsed_onto) is not None:
            err.print(
                f"[yellow]Warning:[/] {result.config.name} routes nearly every token to "
                f"{layer_name(layer)}: the router has collapsed"
            )
    if json_path is not None:
        write_json(json_path, json.loads(json.dumps([r.to_dict() for r in results])))
        out.print(f"Results as JSON: {json_path}")


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
        table.add_column(name, justify="right")
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


def _layer_table(results: Sequence[Evaluation]) -> Table:
    table = Table(title="Share of tokens read from each layer", title_justify="left")
    table.add_column("layer")
    for result in results:
        table.add_column(result.config.name, overflow="fold")
    layers = sorted({layer for r in results for layer in r.reconstruction.layer_use or ()})
    widest = max(max((r.reconstruction.layer_use or {}).values()) for r in results)
    for layer in layers:
        cells = []
        for result in results:
            share = (result.reconstruction.layer_use or {}).get(layer)
            cells.append(
                "" if share is None else f"{share:6.1%} {'█' * round(20 * share / widest)}"
            )
        table.add_row(layer_name(layer), *cells)
    return table
