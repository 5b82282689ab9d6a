"""`routesae export`: a run -> a directory that another library loads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from cli.console import bar, err, layer_name, out, styled
from cli.options import EndpointUrl

if TYPE_CHECKING:
    from routesae_cache.interchange.export import ExportResult


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.", metavar="RUN")],
    format_name: Annotated[
        str, typer.Option("--format", help="saelens or sparsify.", metavar="FORMAT")
    ],
    target: Annotated[Path, typer.Option("--out", help="Folder to make.")],
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Load it back with the other library and compare reconstructions."
        ),
    ] = False,
    store: Annotated[
        str | None,
        typer.Option(help="--verify: residuals to compare on.", show_default="the run's own store"),
    ] = None,
    tokens: Annotated[int, typer.Option(help="--verify: tokens to compare on.")] = 1024,
    model: Annotated[
        str | None,
        typer.Option(
            help="What the other library calls the model.", show_default="the name in the store"
        ),
    ] = None,
    endpoint_url: EndpointUrl = None,
) -> None:
    """Write an SAE for SAELens or sparsify, and say what does not survive."""
    with err.status("Loading the run"):
        from routesae_cache.interchange.export import ExportConfig, export_run

        config = ExportConfig(
            format=format_name,
            out=target,
            model=model,
            verify=verify,
            store=store,
            tokens=tokens,
        )
    with bar("Exporting") as update:
        result = export_run(run, config, lambda done, total: update(completed=done, total=total))
        update(completed=1, total=1)
    many = f" ({len(result.layers)} layers)" if len(result.layers) > 1 else ""
    out.print(f"{format_name}: {target}{many}")
    if result.limits:
        out.print(f"What differs from the run: {target / 'README.md'}")
    if not verify:
        return
    out.print(_table(result))
    if not result.ok:
        err.print(styled("bold red", "Error:", f" {_complaint(result)}"), soft_wrap=True)
        raise typer.Exit(1)


def _table(result: ExportResult) -> Table:
    from routesae_cache.interchange.readme import number

    title = f"Largest difference of reconstructions, on {result.origin}"
    table = Table(title=title, title_justify="left")
    table.add_column("layer", overflow="fold")
    for name in ("untouched", "difference", "as read", "difference", "NormMSE: run", "export"):
        table.add_column(name, justify="right")
    gated = any(d.read.gate is not None for d in result.differences)
    if gated:
        table.add_column("mean p", justify="right")
    for d in result.differences:
        cells = [
            layer_name(d.layer),
            f"{d.exact_count} of {d.compared}",
            number(d.exact),
            f"{d.read.count}",
            number(d.read.largest),
            number(d.read.nmse_run, ".4f"),
            number(d.read.nmse_export, ".4f"),
        ]
        table.add_row(*cells, *([number(d.read.gate, ".3f")] if gated else []))
    return table


def _complaint(result: ExportResult) -> str:
    from routesae_cache.interchange.verify import TOLERANCE

    bad = [d for d in result.differences if not d.ok]
    where = ", ".join(layer_name(d.layer) for d in bad)
    if all(d.predicted is None for d in bad):
        return f"nothing to compare at {where}: the choice of latents hangs on rounding everywhere"
    return f"differences above {TOLERANCE:g} at {where}"
