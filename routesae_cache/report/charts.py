"""Vega-Lite charts in one look: every axis can be zoomed, every run shown or hidden."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from stores.spec import Record

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
HEIGHT = 300
WIDTH = 560

# Told apart without colour vision too; the shapes and dashes say the same once more.
COLOURS = {
    "light": (
        *("#0b6fb8", "#d1570a", "#0a8a66", "#b5559a", "#8a6d00", "#3a3f4b", "#7a5cc7", "#c2344d"),
        *("#4a90a4", "#7d7d7d"),
    ),
    "dark": (
        *("#6cb6ff", "#ff9e57", "#4fd1a5", "#e58fcb", "#e3c550", "#c9d1d9", "#b49cff", "#ff8296"),
        *("#8fd3e8", "#a5a5a5"),
    ),
}
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
DASHES = ((1, 0), (6, 3), (2, 3), (8, 3, 2, 3))
_INKS = {
    "light": {"ink": "#1d2433", "muted": "#5b6475", "grid": "#e6e8ee", "paper": "#ffffff"},
    "dark": {"ink": "#e8eaf0", "muted": "#a2abbd", "grid": "#2b3242", "paper": "#161b26"},
}
_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif'


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A quantitative axis."""

    field: str
    title: str
    scale: Literal["linear", "log"] = "linear"
    format: str | None = None
    """By the rules of d3-format; None for what suits the values."""
    whole: bool = False
    """Ticks at whole numbers alone."""
    zero: bool = False
    """Begins at 0."""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """One chart and its data."""

    key: str
    """Of its files and its place in the page."""
    title: str
    caption: str
    """What it shows, in a sentence or two."""
    spec: Record
    """Vega-Lite, without its data, its size and its theme."""
    values: list[Record]
    """A row for each mark, with `run`, the id of the SAE it belongs to, where there is one."""

    def standalone(self) -> Record:
        """The whole chart, for a picture of it."""
        return self.spec | {
            "title": self.title,
            "width": WIDTH,
            "data": {"values": self.values},
            "config": theme("light"),
        }


@dataclass(frozen=True, kw_only=True)
class Look:
    """How each run is drawn, the same in every chart."""

    architectures: tuple[str, ...]
    """In the order of their colours and shapes."""
    dash: dict[str, int]
    """Run -> which dash, to tell runs of one architecture apart."""
    runs: dict[str, str]
    """Run -> architecture."""

    @classmethod
    def of(cls, runs: dict[str, str], order: Sequence[str]) -> Look:
        """The look of runs, given with their architectures; those in `order` come first."""
        seen: dict[str, int] = {}
        dash = {}
        for run, architecture in runs.items():
            dash[run] = seen.get(architecture, 0) % len(DASHES)
            seen[architecture] = seen.get(architecture, 0) + 1
        known = [architecture for architecture in order if architecture in seen]
        others = [architecture for architecture in seen if architecture not in order]
        return cls(architectures=(*known, *others), dash=dash, runs=runs)

    def mark(self, run: str) -> Record:
        """The fields that every row of a chart has."""
        return {"run": run, "architecture": self.runs[run], "dash": self.dash[run]}

    def legend(self) -> list[Record]:
        """Each run's architecture, colour, shape and dash, by number."""
        return [
            {
                "run": run,
                "architecture": architecture,
                "colour": self.architectures.index(architecture) % len(COLOURS["light"]),
                "shape": SHAPES[self.architectures.index(architecture) % len(SHAPES)],
                "dash": DASHES[self.dash[run]],
            }
            for run, architecture in self.runs.items()
        ]


def theme(name: Literal["light", "dark"]) -> Record:
    """The configuration of every chart."""
    ink = _INKS[name]
    return {
        "font": _FONT,
        "background": ink["paper"],
        "view": {"stroke": None},
        "axis": {
            "domain": False,
            "ticks": False,
            "gridColor": ink["grid"],
            "labelColor": ink["muted"],
            "titleColor": ink["muted"],
            "labelFontSize": 12,
            "titleFontSize": 12,
            "titleFontWeight": "normal",
            "labelPadding": 6,
            "titlePadding": 10,
            "labelOverlap": True,
        },
        "axisY": {"tickCount": 5},
        "axisX": {"grid": False, "tickCount": 7},
        "title": {"color": ink["ink"], "fontSize": 15, "anchor": "start", "offset": 14},
        "legend": {
            "labelColor": ink["ink"],
            "titleColor": ink["muted"],
            "orient": "bottom",
            "labelFontSize": 12,
            "labelLimit": 320,
        },
        "range": {"category": COLOURS[name], "symbol": SHAPES},
        "mark": {"color": COLOURS[name][0]},
    }


def against(
    look: Look, x: Axis, y: Axis, values: Sequence[Record], tooltip: list[Record]
) -> Record:
    """A point for each run, those of one architecture joined in the order of x; `se` is drawn."""
    error = {"y": {"field": "low"}, "y2": {"field": "high"}}
    return _chart(
        x,
        y,
        values,
        [
            {
                "mark": {"type": "line", "opacity": 0.45, "strokeWidth": 1.5, "clip": True},
                "encoding": {"color": _colour(look)},
            },
            {
                "mark": {"type": "rule", "strokeWidth": 1.5, "clip": True},
                "transform": [
                    {"filter": "isValid(datum.se)"},
                    {"calculate": f"datum['{y.field}'] - datum.se", "as": "low"},
                    {"calculate": f"datum['{y.field}'] + datum.se", "as": "high"},
                ],
                "encoding": {"color": _colour(look), **error},
            },
            _points(look, tooltip, size=110),
        ],
    )


def lines(
    look: Look,
    x: Axis,
    y: Axis,
    values: Sequence[Record],
    tooltip: list[Record],
    *,
    points: bool = True,
    interpolate: str = "linear",
) -> Record:
    """A line for each run."""
    line = {"type": "line", "strokeWidth": 2, "clip": True, "interpolate": interpolate}
    shown = _points(look, tooltip, size=50) if points else _hidden_points(tooltip)
    return _chart(x, y, values, [{"mark": line, "encoding": _by_run(look)}, shown])


def paired_lines(
    look: Look, x: Axis, y: Axis, values: Sequence[Record], tooltip: list[Record]
) -> Record:
    """Two lines for each run: `part` is `evaluation` (full) or `training` (pale, hollow)."""
    layers: list[Record] = []
    for part, opacity, filled in (("training", 0.5, False), ("evaluation", 1.0, True)):
        keep = [{"filter": f"datum.part === '{part}'"}]
        line = {"type": "line", "strokeWidth": 1.0 + filled, "opacity": opacity, "clip": True}
        points = _points(look, tooltip, size=50)
        points["mark"] |= {"filled": filled, "opacity": opacity}
        layers.append({"transform": keep, "mark": line, "encoding": _by_run(look)})
        layers.append(points | {"transform": keep})
    return _chart(x, y, values, layers)


def bars(x: Axis, y: Axis, values: Sequence[Record], tooltip: list[Record]) -> Record:
    """A bar for each x, of a single series."""
    mark = {"type": "bar", "width": {"band": 0.7}, "cornerRadiusEnd": 2, "clip": True}
    spec = _chart(x, y, values, [{"mark": mark, "encoding": {"tooltip": tooltip}}])
    spec["params"][2]["value"] = 0.0  # bars stand on the axis
    spec["encoding"]["y"]["stack"] = None
    spec["encoding"]["x"] = {
        "field": x.field,
        "type": "ordinal",
        "axis": {"title": x.title, "labelAngle": 0},
    }
    return spec


def tip(field: str, title: str, format: str | None = None) -> Record:
    """One line of a tooltip."""
    kind = {"type": "quantitative", "format": format} if format else {"type": "nominal"}
    return {"field": field, "title": title, **kind}


def domain(values: Iterable[float], axis: Axis) -> tuple[float, float]:
    """The part of an axis that shows all values, with a little room around them."""
    found = [value for value in values if axis.scale == "linear" or value > 0]
    low, high = min(found), max(found)
    if axis.scale == "log":
        low, high = math.log(low), math.log(high)
    if axis.zero:
        low = min(low, 0.0)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = low - room / (2 if axis.zero else 1), high + room
    return (math.exp(low), math.exp(high)) if axis.scale == "log" else (low, high)


def _chart(x: Axis, y: Axis, values: Sequence[Record], layers: list[Record]) -> Record:
    limits = []
    for letter, axis in (("x", x), ("y", y)):
        spread = ((v[axis.field], v.get("se") or 0.0 if letter == "y" else 0.0) for v in values)
        ends = domain((value + sign * se for value, se in spread for sign in (-1, 1)), axis)
        limits += [{"name": f"{letter}{i}", "value": end} for i, end in enumerate(ends)]
    shown = list(dict.fromkeys(value["run"] for value in values if "run" in value))
    return {
        "$schema": SCHEMA,
        "height": HEIGHT,
        "params": [*limits, {"name": "shown", "value": shown}],
        "transform": [{"filter": "!isValid(datum.run) || indexof(shown, datum.run) >= 0"}],
        "encoding": {"x": _position(x, "x"), "y": _position(y, "y")},
        "layer": layers,
    }


def _position(axis: Axis, letter: str) -> Record:
    return {
        "field": axis.field,
        "type": "quantitative",
        "scale": ({} if axis.scale == "log" else {"zero": False})
        | {
            "type": axis.scale,
            "nice": False,
            "domain": [{"expr": f"{letter}0"}, {"expr": f"{letter}1"}],
        },
        "axis": {"title": axis.title}
        | ({"format": axis.format} if axis.format else {})
        | ({"tickMinStep": 1} if axis.whole else {}),
    }


def _colour(look: Look) -> Record:
    scale = {"domain": list(look.architectures)}
    return {"field": "architecture", "type": "nominal", "scale": scale, "title": None}


def _by_run(look: Look) -> Record:
    dashes = {"domain": list(range(len(DASHES))), "range": [list(dash) for dash in DASHES]}
    return {
        "color": _colour(look),
        "detail": {"field": "run"},
        "strokeDash": {"field": "dash", "type": "nominal", "scale": dashes, "legend": None},
    }


def _points(look: Look, tooltip: list[Record], *, size: int) -> Record:
    mark: dict[str, Any] = {"type": "point", "size": size, "filled": True, "opacity": 1}
    return {
        "mark": mark | {"clip": True},
        "encoding": {"color": _colour(look), "shape": _colour(look), "tooltip": tooltip},
    }


def _hidden_points(tooltip: list[Record]) -> Record:
    """What the pointer finds on a line without points."""
    mark = {"type": "point", "size": 160, "opacity": 0, "filled": True, "clip": True}
    return {"mark": mark, "encoding": {"tooltip": tooltip}}
