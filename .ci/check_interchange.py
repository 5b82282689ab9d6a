"""Export small runs, and those named on the command line, and let the other libraries read them."""

from __future__ import annotations

import importlib.metadata
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.table import Table

from cli.console import out
from routesae_cache.checkpoint import read_config
from routesae_cache.interchange.export import ExportConfig, ExportResult, export_run
from routesae_cache.interchange.formats import FORMATS
from routesae_cache.interchange.readme import number
from routesae_cache.saes.config import SaeConfig
from tests.interchange_helpers import make_run, sae_config

CODERS = ("relu", "gated", "topk", "batchtopk", "jumprelu", "matryoshka")


def small_saes() -> Iterator[SaeConfig]:
    """Every coder with every normalisation, and with every selector that can be exported."""
    for coder in CODERS:
        for norm in ("token", "scalar", "none"):
            yield sae_config(coder, norm=norm)
        for selector in ("route", "random", "every"):
            yield sae_config(coder, selector)
        yield sae_config(coder, "route", route_estimator="straight-through")


def main(named: list[Path]) -> int:
    """0 where all that was compared agrees."""
    table = Table("format", "run", "layers", "untouched", "difference", "as read", "difference")
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        made = [make_run(folder / f"run{i}", sae) for i, sae in enumerate(small_saes())]
        for run in (*named, *made):
            config = read_config(run)
            label = f"{config.sae.name} {config.sae.norm}"
            for name, target in FORMATS.items():
                if target.refusal(config) is None:
                    options = ExportConfig(format=name, out=folder / name / run.name, verify=True)
                    result = export_run(run, options)
                    table.add_row(name, label, *row(result))
                    failed += [] if result.ok else [f"{name}: {label}"]
    out.print(table)
    versions = [f"{t.package} {importlib.metadata.version(t.package)}" for t in FORMATS.values()]
    out.print(", ".join(versions))
    for label in failed:
        out.print(f"[bold red]differs[/] {label}")
    return 1 if failed else 0


def row(result: ExportResult) -> list[str]:
    """One export, its layers together."""
    each = result.differences
    exact = max((d.exact for d in each if d.exact is not None), default=None)
    read = max((d.read.largest for d in each if d.read.largest is not None), default=None)
    return [
        str(len(each)),
        f"{sum(d.exact_count for d in each)} of {sum(d.compared for d in each)}",
        number(exact),
        str(sum(d.read.count for d in each)),
        number(read),
    ]


if __name__ == "__main__":
    sys.exit(main([Path(argument) for argument in sys.argv[1:]]))
