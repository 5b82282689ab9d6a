"""The plots of a report, each made where its data is there."""

from __future__ import annotations

import numpy as np

from routesae_cache.report.background_plots import density_plot, store_plots, training_plots
from routesae_cache.report.charts import Axis, Plot, against, lines, paired_lines, tip
from routesae_cache.report.discover import FoundRun
from routesae_cache.report.plot_data import Builder, Built, PlotData
from routesae_cache.report.table import COLUMNS, Missing, setting

_TRAINED = 0.1  # the part of a training, at its end, that routing is averaged over


_L0 = Axis(field="l0", title="L0 (active latents a token)")
_RUN = [tip("run", "SAE"), tip("setting", "set to")]


def build_plots(data: PlotData) -> tuple[list[Plot], list[Missing]]:
    """Every plot there is data for, and a sentence about each of the others."""
    made: list[Plot] = []
    missing: list[Missing] = []
    for build in _BUILDERS:
        for result in build(data):
            (made if isinstance(result, Plot) else missing).append(result)  # type: ignore[arg-type]
    return made, missing


def _against_l0(key: str, title: str, axis: Axis, caption: str, command: str) -> Builder:
    column = next(column for column in COLUMNS if column.key == key)

    def build(data: PlotData) -> Built:
        values = []
        for run in data.runs:
            l0 = (run.evaluation or {}).get("l0")
            if l0 is not None and (found := column.of(run)) is not None:
                row = {"l0": l0, axis.field: found, "se": column.error(run)}
                values.append(data.look.mark(run.id) | {"setting": setting(run.config.sae)} | row)
        if not values:
            yield Missing.of(title, command)
            return
        tooltip = [*_RUN, tip("l0", "L0", ".1f"), tip(axis.field, axis.title, axis.format)]
        yield Plot(
            key=f"{key}_l0",
            title=title,
            caption=caption,
            spec=against(data.look, _L0, axis, values, tooltip),
            values=values,
        )

    return build


def _thresholds(data: PlotData) -> Built:
    title = "Interpretable latents against threshold"
    values = [
        data.look.mark(run.id) | {"threshold": threshold, "interpretable": count}
        for run in data.runs
        for threshold, count in sorted(
            {
                at["threshold"]: at["interpretable"]
                for summary in run.summaries
                for at in summary["by_threshold"]
            }.items()
        )
    ]
    if not values:
        yield Missing.of(title, "contexts")
        return
    x = Axis(field="threshold", title="activation threshold")
    y = Axis(field="interpretable", title="interpretable latents", format=",d", zero=True)
    yield Plot(
        key="interpretable_threshold",
        title=title,
        caption="A latent counts where its activations above the threshold have enough contexts "
        "and not too many different tokens.",
        spec=lines(
            data.look,
            x,
            y,
            values,
            [_RUN[0], tip("threshold", "threshold", ".3~g"), tip("interpretable", "latents", ",d")],
        ),
        values=values,
    )


def _routing(data: PlotData) -> Built:
    values = []
    for run in data.runs:
        if run.config.sae.selector != "route":
            continue
        parts = {"training": _trained_share(run), "evaluation": _evaluated_share(run)}
        for part, shares in parts.items():
            for layer, share in zip(run.config.sae.layers, shares, strict=bool(shares)):
                row = {"layer": layer, "share": share, "part": part}
                values.append(data.look.mark(run.id) | row)
    title = "Where tokens are routed"
    if not values:
        yield Missing.of(title, "train --sae routesae")
        return
    x = Axis(field="layer", title="layer", whole=True, format="d")
    y = Axis(field="share", title="share of tokens", format=".0%", zero=True)
    yield Plot(
        key="routing",
        title=title,
        caption="Share of the tokens read from each layer: on held-out text (filled) and over the "
        "last tenth of training (hollow). Under soft routing, the router's mean probability.",
        spec=paired_lines(
            data.look,
            x,
            y,
            values,
            [
                _RUN[0],
                tip("part", "in"),
                tip("layer", "layer"),
                tip("share", "share of tokens", ".1%"),
            ],
        ),
        values=values,
    )


def _trained_share(run: FoundRun) -> list[float]:
    key = "layer_use" if run.config.sae.hard else "router_share"
    shares = [record[key] for record in run.metrics if key in record]
    last = shares[-max(1, round(len(shares) * _TRAINED)) :]
    return [float(share) for share in np.mean(last, axis=0)] if last else []


def _evaluated_share(run: FoundRun) -> list[float]:
    key = "layer_use" if run.config.sae.hard else "router_share"
    shares = (run.evaluation or {}).get(key) or {}
    return [shares[str(layer)] for layer in run.config.sae.layers] if shares else []


def _spliced_layers(data: PlotData) -> Built:
    values = []
    for run in data.runs:
        per_layer = ((run.spliced or {}).get("spliced") or {}).get("per_layer") or {}
        for layer, measured in sorted(per_layer.items(), key=lambda item: int(item[0])):
            row = {"layer": int(layer), "kl": measured["kl"]["mean"]}
            values.append(data.look.mark(run.id) | row)
    if not values:  # only SAEs that read every layer have it
        return
    x = Axis(field="layer", title="layer", whole=True, format="d")
    y = Axis(field="kl", title="KL (nats a token)", zero=True)
    tooltip = [_RUN[0], tip("layer", "layer"), tip("kl", "KL", ".3f")]
    yield Plot(
        key="kl_layer",
        title="KL by the layer that is spliced",
        caption="For SAEs that read every layer: the reconstruction spliced in at one layer alone.",
        spec=lines(data.look, x, y, values, tooltip),
        values=values,
    )


_BUILDERS: tuple[Builder, ...] = (
    _against_l0(
        "kl",
        "KL against L0",
        Axis(field="kl", title="KL (nats a token)", format=".3~g"),
        "How far the model's next-token distribution moves when the reconstruction takes the "
        "residual's place. Lower and further left is better.",
        "evaluate --spliced",
    ),
    _against_l0(
        "nmse",
        "NormMSE against L0",
        Axis(field="nmse", title="NormMSE", format=".4~g"),
        "What the reconstruction misses of the normalised residual.",
        "evaluate",
    ),
    _thresholds,
    _against_l0(
        "interpretable",
        "Interpretable latents against L0",
        Axis(field="interpretable", title="interpretable latents", format=",d", zero=True),
        "At the threshold of the contexts that the latent browser shows.",
        "contexts",
    ),
    _against_l0(
        "score",
        "Interpretation score against L0",
        Axis(field="score", title="mean score (1 to 5)", format=".2~f"),
        "How clearly a chat model found one pattern in a latent's contexts; 5 is the clearest.",
        "interpret",
    ),
    _routing,
    _spliced_layers,
    training_plots,
    density_plot,
    store_plots,
)
