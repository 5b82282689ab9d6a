"""Plots of what is behind the results: trainings, how often latents are active, the store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from routesae_cache.report.charts import Axis, Plot, bars, lines, tip
from routesae_cache.report.discover import thinned
from routesae_cache.report.origins import NO_STORE
from routesae_cache.report.plot_data import Built, PlotData
from routesae_cache.report.table import Missing
from stores.layout import residual_array, residual_arrays
from stores.reader import StoreReader
from stores.spec import Record
from stores.stats import split_stats

_CURVE_POINTS = 200
_DECADES = (-6.0, 0.0)
_BINS_A_DECADE = 5
_SAE = tip("run", "SAE")


class _Curve(NamedTuple):
    key: str
    title: str
    axis: Axis
    caption: str


_CURVES = (
    _Curve(
        "nmse",
        "Training: NormMSE",
        Axis(field="nmse", title="NormMSE", scale="log"),
        "Of each logged batch.",
    ),
    _Curve(
        "l0",
        "Training: L0",
        Axis(field="l0", title="L0"),
        "Active latents a token, of each logged batch.",
    ),
    _Curve(
        "dead_share",
        "Training: dead latents",
        Axis(field="dead_share", title="share of latents", format=".0%", zero=True),
        "Latents that have not been active for the run's dead window.",
    ),
    _Curve(
        "router_entropy",
        "Training: the router's entropy",
        Axis(field="router_entropy", title="nats", zero=True),
        "Mean entropy of the router's distribution over layers. Near 0, every token has one "
        "certain layer.",
    ),
)


def training_plots(data: PlotData) -> Built:
    """What each run logged, over its tokens."""
    x = Axis(field="tokens", title="tokens", format="~s")
    for curve in _CURVES:
        values = [
            data.look.mark(run.id) | {"tokens": record["tokens"], curve.key: record[curve.key]}
            for run in data.runs
            for record in thinned([r for r in run.metrics if curve.key in r], _CURVE_POINTS)
        ]
        if len({value[curve.key] for value in values}) < 2:  # nothing to see, as L0 of a TopK
            continue
        tooltip = [
            _SAE,
            tip("tokens", "tokens", ",d"),
            tip(curve.key, curve.axis.title, ".4~g"),
        ]
        yield Plot(
            key=f"training_{curve.key}",
            title=curve.title,
            caption=curve.caption,
            spec=lines(data.look, x, curve.axis, values, tooltip, points=False),
            values=values,
        )


def density_plot(data: PlotData) -> Built:
    """How many latents are active how often."""
    title = "Activation density"
    edges = np.arange(_DECADES[0], _DECADES[1] + 1e-9, 1 / _BINS_A_DECADE)
    values, never = [], []
    for run, density in data.density.items():
        active_F = density.share_F[density.share_F > 0]
        counts, _ = np.histogram(np.log10(active_F), bins=edges)
        if idle := len(density.share_F) - len(active_F):
            never.append(f"{idle:,} of {run}")
        used = np.nonzero(counts)[0]
        for i in range(used[0], used[-1] + 1) if len(used) else ():
            centre = 10 ** float(edges[i] + 0.5 / _BINS_A_DECADE)
            values.append(data.look.mark(run) | {"density": centre, "latents": int(counts[i])})
    if not values:
        yield Missing(title, NO_STORE)
        return
    tokens = max(density.tokens for density in data.density.values())
    x = Axis(field="density", title="share of tokens it is active on", scale="log")
    y = Axis(field="latents", title="latents", format=",d", zero=True)
    yield Plot(
        key="density",
        title=title,
        caption=f"How many latents are active how often, on {tokens:,} held-out tokens. "
        f"Never active there: {_some(never)}.",
        spec=lines(
            data.look,
            x,
            y,
            values,
            [_SAE, tip("density", "active on", ".2~%"), tip("latents", "latents", ",d")],
            points=False,
            interpolate="step",
        ),
        values=values,
    )


def _some(parts: Sequence[str]) -> str:
    more = f", and some of {len(parts) - 3} more" if len(parts) > 3 else ""
    return (", ".join(parts[:3]) + more) or "none"


def store_plots(data: PlotData) -> Built:
    """What the store takes and loses, layer by layer."""
    if data.reader is None:
        yield Missing("The store: bits a value and distortion", NO_STORE)
        return
    x = Axis(field="layer", title="layer", whole=True, format="d")
    values = store_layers(data.reader)
    for field, title, axis, caption in (
        (
            "bits",
            "The store: bits a value",
            Axis(field="bits", title="bits a value", zero=True),
            "Size on disk of each layer's residuals, over the number of their values.",
        ),
        (
            "distortion",
            "The store: distortion",
            Axis(field="distortion", title="NMSE", format=".1~e", zero=True),
            "What the codec loses of each layer's residuals, after normalisation.",
        ),
    ):
        tooltip = [tip("layer", "layer"), tip(field, axis.title, ".3~g")]
        yield Plot(
            key=f"store_{field}",
            title=title,
            caption=caption,
            spec=bars(x, axis, values, tooltip),
            values=values,
        )


def store_layers(reader: StoreReader) -> list[Record]:
    """Bits a value and distortion of each layer, over the committed chunks."""
    spec = reader.spec
    sizes = dict.fromkeys(spec.layers, 0)
    for layer, layout in residual_arrays(spec):
        sizes[layer] += reader.path.total_size(f"{residual_array(layer, layout)}/c")
    rows = [spec.chunk_range(chunk) for chunk in reader.committed]
    n_values = sum(part.stop - part.start for part in rows) * spec.context * spec.width
    distortion_L = split_stats(reader).distortion_L
    return [
        {"layer": layer, "bits": 8 * sizes[layer] / n_values, "distortion": float(distortion)}
        for layer, distortion in zip(spec.layers, distortion_L, strict=True)
    ]
