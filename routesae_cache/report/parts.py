"""What the page is told, as JSON has it, part by part."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from routesae_cache.report.activity import Activity, Passage, Routing
from routesae_cache.report.browser import short
from routesae_cache.report.charts import Look, Plot
from routesae_cache.report.table import Missing, Table
from routesae_cache.report.text import Segments, Stretch
from routesae_cache.saes.config import SaeConfig
from stores.reader import StoreReader
from stores.spec import Record
from stores.stats import stored_bytes


def overview_part(
    folder: str,
    reader: StoreReader | None,
    table: Table,
    look: Look,
    missing: Sequence[Missing],
) -> Record:
    """The page's head, the table, and what is missing."""
    columns = {field: getattr(table, field) for field in ("columns", "rows", "best")}
    return {
        "table": columns,
        "csv": table.csv(),
        "legend": look.legend(),
        "missing": [list(one) for one in missing],
        "store": store_facts(reader) if reader else None,
        "runs": len(table.rows),
        "folder": folder,
    }


def store_facts(reader: StoreReader) -> Record:
    """Where the residuals are from, and what they take on disk."""
    spec = reader.spec
    rows = [spec.chunk_range(chunk) for chunk in reader.committed]
    n_tokens = sum(part.stop - part.start for part in rows) * spec.context
    size = stored_bytes(reader.path)
    codec = spec.codec.to_dict()
    kind = codec.pop("kind")
    return {
        "model": spec.model["name"],
        "text": spec.text["dataset"],
        "layers": list(spec.layers),
        "blocks": spec.n_blocks,
        "width": spec.width,
        "train_tokens": spec.train_tokens,
        "eval_tokens": spec.eval_tokens,
        "codec": kind + "".join(f", {key} {value}" for key, value in codec.items() if value),
        "bytes": size,
        "bits": 8 * size / max(1, n_tokens * spec.values_per_token),
    }


def plot_part(plot: Plot) -> Record:
    """One chart."""
    return {field.name: getattr(plot, field.name) for field in dataclasses.fields(plot)}


def routing_part(
    activity: Activity,
    passages: Sequence[Passage],
    segments: Segments | None,
    saes: Mapping[str, SaeConfig],
) -> Record | None:
    """Passages, and what each router made of them; None where the text cannot be shown."""
    if segments is None or not activity.routing:
        return None
    places = [segments.place(Stretch(*passage[:3])) for passage in passages]
    return {
        "passages": [
            {
                "title": passage.title,
                "row": passage.row,
                "segment": segment,
                "start": start,
                "length": passage.last - passage.first + 1,
            }
            for passage, (segment, start) in zip(passages, places, strict=True)
        ],
        "runs": [
            {
                "run": run,
                "layers": list(saes[run].layers),
                "soft": not saes[run].hard,
                "passages": [_routing(one) for one in read],
            }
            for run, read in activity.routing.items()
        ],
    }


def _routing(routing: Routing) -> Record:
    return {
        "layer": routing.layer_T,
        # per mille, token by token
        "router": [round(1000 * float(p)) for p in routing.router_TL.reshape(-1)],
        "latents": [
            [value for latent, activation in token for value in (latent, short(activation))]
            for token in routing.latents_T
        ],
    }
