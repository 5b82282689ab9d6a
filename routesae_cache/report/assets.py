"""Every plot as PNG and SVG, and every table as CSV, in a folder beside the page."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import vl_convert

from routesae_cache.report.charts import Plot
from routesae_cache.report.table import Table
from routesae_cache.whole_files import whole_file
from stores.spec import Record

_PIXELS = 2  # a CSS pixel
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def write_assets(
    folder: Path, table: Table, plots: Sequence[Plot], browsers: Sequence[Record]
) -> list[Path]:
    """Write them; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, bytes] = {"saes.csv": table.csv().encode()}
    for plot in plots:
        picture = vl_convert.vegalite_to_svg(plot.standalone())
        files[f"{plot.key}.svg"] = picture.encode()
        files[f"{plot.key}.png"] = vl_convert.svg_to_png(picture, scale=_PIXELS)
        files[f"{plot.key}.csv"] = _csv([_without_dash(row) for row in plot.values]).encode()
    if browsers:
        files["latents.csv"] = _csv([row for one in browsers for row in _rows(one)]).encode()
    for name, content in files.items():
        with whole_file(folder / name, len(content)) as temporary:
            temporary.write_bytes(content)
    return [folder / name for name in files]


def _csv(rows: Sequence[Record]) -> str:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: harmless(value) for key, value in row.items()} for row in rows)
    return out.getvalue()


def _without_dash(row: Record) -> Record:
    """What a point stands for, without how it is drawn."""
    return {key: value for key, value in row.items() if key != "dash"}


def harmless(value: Any) -> Any:
    """A text that a spreadsheet would take for a formula, marked as text."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def _rows(browser: Record) -> list[Record]:
    return [
        {
            "run": browser["run"],
            **{key: latent[key] for key in ("latent", "count", "max", "mean")},
            **latent.get("explained", {}),
        }
        for latent in browser["latents"]
    ]
