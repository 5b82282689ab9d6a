"""`routesae report`: what the stages left in a folder -> one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.console import bar, err, out, size, styled
from cli.options import (
    Device,
    EndpointUrl,
    Revision,
    TrustRemoteCode,
    chosen_model,
    pick_device,
)


def report(
    runs: Annotated[
        Path, typer.Argument(help="A folder; everything below it is found.", metavar="RUNS_DIR")
    ],
    out_path: Annotated[Path, typer.Option("--out", help="The page.")] = Path("report.html"),
    assets: Annotated[
        Path | None,
        typer.Option(help="Also write every plot as PNG and SVG and every table as CSV there."),
    ] = None,
    latents: Annotated[
        int, typer.Option(help="The most latents to browse, over all SAEs; it bounds the page.")
    ] = 8000,
    model: Annotated[
        str | None,
        typer.Option(help="Where the store's model is.  \\[default: the name the store has]"),
    ] = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    store: Annotated[
        str | None,
        typer.Option(help="The store, a path or a URL.  \\[default: where the runs say it is]"),
    ] = None,
    device: Device = "auto",
    endpoint_url: EndpointUrl = None,
) -> None:
    """Make one self-contained page of all results: table, plots, latents, routing on text."""
    with err.status("Looking for runs and results"):
        from routesae_cache.report.build import ReportConfig, build_report

        config = ReportConfig(
            root=runs,
            out=out_path,
            assets=assets,
            latents=latents,
            model=chosen_model(model, revision, trust_remote_code),
            store=store,
            device=pick_device(device),
        )
    with bar("Report") as update:
        made = build_report(
            config, lambda what, done, total: update(completed=done, total=total, note=what)
        )
    for title, sentence in made.missing:
        err.print(styled("yellow", "Left out:", f" {title}. {sentence}"), soft_wrap=True)
    parts = f"{made.runs} SAEs, {made.latents:,} latents to browse, {size(made.bytes)}"
    out.print(f"Report: {made.out} ({parts})", soft_wrap=True)
    if made.assets:
        out.print(f"Plots and tables: {len(made.assets)} files in {assets}", soft_wrap=True)
