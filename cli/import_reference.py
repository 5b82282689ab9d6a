"""`routesae import-reference`: a checkpoint of the RouteSAE authors' code -> a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cli.console import err, layer_list, layer_name, out
from cli.options import EndpointUrl


def import_reference(
    file: Annotated[
        Path, typer.Argument(help="A state dict of the authors' code.", metavar="FILE.pt")
    ],
    sae: Annotated[str, typer.Option(help="What it is: topk, routesae, …; or topk:k=64,layer=12.")],
    store: Annotated[str, typer.Option(help="Residuals of the model it was trained on.")],
    target: Annotated[Path, typer.Option("--out", help="Folder to make: the run.")],
    k: Annotated[int | None, typer.Option(help="TopK: active latents a token.")] = None,
    layer: Annotated[
        str | None,
        typer.Option(help="Single-layer SAEs: layer, or auto (3n/4).", show_default="auto"),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Other SAEs: 7-22, 4+8+12, or all.", show_default="all")
    ] = None,
    aggregate: Annotated[
        str | None, typer.Option(help="Route: the router saw sum or mean.", show_default="sum")
    ] = None,
    soft: Annotated[
        bool, typer.Option("--soft", help="Route: it was trained on the mixture of all layers.")
    ] = False,
    endpoint_url: EndpointUrl = None,
) -> None:
    """Make a run of a checkpoint that the RouteSAE authors' code has saved."""
    with err.status("Importing"):
        from routesae_cache.interchange.reference import ImportConfig
        from routesae_cache.interchange.reference import import_reference as run_import

        options: dict[str, Any] = {
            "k": k,
            "layer": layer,
            "layers": layers,
            "aggregate": aggregate,
            "hard": False if soft else None,
        }
        given = {name: value for name, value in options.items() if value is not None}
        run = run_import(ImportConfig(file=file, sae=sae, store=store, out=target, options=given))
    read = run.sae.layers
    where = layer_name(read[0]) if len(read) == 1 else f"layers {layer_list(read)}"
    out.print(f"{run.sae.name}, {run.sae.latents} latents, {where}")
    out.print(f"The run is {target}. Measure: routesae evaluate {store} {target}")
