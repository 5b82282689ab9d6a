"""The table of all SAEs: its columns, each run's values, and the best of each column."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from routesae_cache.report.discover import FoundRun
from routesae_cache.saes.config import SaeConfig
from routesae_cache.saes.registry import short_name
from stores.spec import Record


class Missing(NamedTuple):
    """A part of the page that cannot be made, and what to do about it."""

    title: str
    sentence: str

    @classmethod
    def of(cls, title: str, command: str) -> Missing:
        """Of what a command makes."""
        return cls(title, f"`routesae {command}` makes this part.")


Value = str | float | int | None

ARCHITECTURES = {
    "routesae": "RouteSAE",
    "topk": "TopK",
    "vanilla": "Vanilla",
    "gated": "Gated",
    "jumprelu": "JumpReLU",
    "random": "Random",
    "mlsae": "MLSAE",
    "crosscoder": "Crosscoder",
    "batchtopk": "BatchTopK",
    "matryoshka": "Matryoshka",
}
"""How the named architectures are written, in the order of their colours; the others go by
selector+coder."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column; its values come from `of`, what they vary by from `error`."""

    key: str
    title: str
    hint: str
    """What it is, in a sentence."""
    of: Callable[[FoundRun], Value]
    better: Literal["low", "high"] | None = None
    form: str = "text"
    """How the page writes it: text, integer, share, seconds, or a number of decimals."""
    error: Callable[[FoundRun], float | None] = lambda run: None
    """Standard error."""
    made_by: str = "evaluate"
    """The command whose result it is."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """All SAEs, ready to be shown."""

    columns: list[Record]
    """Of those with a value: key, title, hint, form, better."""
    rows: list[Record]
    """A run's id, and for each column value and standard error."""
    best: dict[str, list[str]]
    """Column -> ids of the best runs, where there is something to compare."""
    missing: list[Missing]
    """The columns without a value."""

    def csv(self) -> str:
        """Full precision, a column of its own for standard errors."""
        keys = [column["key"] for column in self.columns]
        erring = [key for key in keys if any(row[key][1] is not None for row in self.rows)]
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(keys + [f"{key}_se" for key in erring])
        for row in self.rows:
            writer.writerow([row[key][0] for key in keys] + [row[key][1] for key in erring])
        return out.getvalue()


def architecture(sae: SaeConfig) -> str:
    """Its written name; soft routing is another one than hard routing."""
    name = short_name(sae.selector, sae.coder)
    written = ARCHITECTURES.get(name, name)
    return f"{written} (soft)" if sae.selector == "route" and not sae.hard else written


def layers_read(sae: SaeConfig) -> str:
    """`22`, or `7–22` where there are several."""
    first, last = sae.layers[0], sae.layers[-1]
    return str(first) if first == last else f"{first}–{last}"


def setting(sae: SaeConfig) -> str:
    """What sets the sparsity: k, or the weight of the sparsity term."""
    if sae.k is not None:
        return f"k = {sae.k}"
    symbol = "λ₀" if sae.coder == "jumprelu" else "λ₁"
    return f"{symbol} = {sae.sparsity_weight:g}"


def _measured(key: str) -> Callable[[FoundRun], Value]:
    return lambda run: (run.evaluation or {}).get(key)


def _spliced(key: str, part: str = "mean") -> Callable[[FoundRun], Any]:
    def of(run: FoundRun) -> Any:
        measure = ((run.spliced or {}).get("spliced") or {}).get(key)
        return measure[part] if measure else None

    return of


def _interpretable(run: FoundRun) -> Value:
    return run.contexts.record["total_latents"] if run.contexts else None


def _score(part: str) -> Callable[[FoundRun], Any]:
    def of(run: FoundRun) -> Any:
        average = ((run.interpretation or {}).get("averages") or {}).get("all")
        return average["score"][part] if average and average["score"] else None

    return of


def _trained(key: str) -> Callable[[FoundRun], Value]:
    return lambda run: run.metrics[-1].get(key) if run.metrics else None


COLUMNS = (
    Column(
        key="name",
        title="SAE",
        hint="The run.",
        of=lambda run: run.id,
        made_by="train",
    ),
    Column(
        key="architecture",
        title="Architecture",
        hint="Selector and coder.",
        of=lambda run: architecture(run.config.sae),
        made_by="train",
    ),
    Column(
        key="layers",
        title="Layers",
        hint="The layers it reads.",
        of=lambda run: layers_read(run.config.sae),
        made_by="train",
    ),
    Column(
        key="latents",
        title="Latents",
        hint="Size of the dictionary.",
        of=lambda run: run.config.sae.latents,
        form="integer",
        made_by="train",
    ),
    Column(
        key="setting",
        title="k or weight",
        hint="What sets its sparsity.",
        of=lambda run: setting(run.config.sae),
        made_by="train",
    ),
    Column(
        key="l0",
        title="L0",
        hint="Active latents a token, on average.",
        of=_measured("l0"),
        form="1",
    ),
    Column(
        key="nmse",
        title="NormMSE",
        hint="Squared error over the residual's energy, after normalisation.",
        of=_measured("nmse"),
        better="low",
        form="4",
    ),
    Column(
        key="kl",
        title="KL",
        hint="Divergence of the next-token distributions with the reconstruction spliced in, "
        "nats a token.",
        of=_spliced("kl"),
        error=_spliced("kl", "se"),
        better="low",
        form="3",
        made_by="evaluate --spliced",
    ),
    Column(
        key="delta_ce",
        title="ΔCE",
        hint="Cross-entropy that splicing adds, nats a token.",
        of=_spliced("delta_ce"),
        error=_spliced("delta_ce", "se"),
        better="low",
        form="3",
        made_by="evaluate --spliced",
    ),
    Column(
        key="recovered",
        title="Recovered",
        hint="Share of the loss that ablation costs and the reconstruction brings back.",
        of=_spliced("recovered"),
        error=_spliced("recovered", "se"),
        better="high",
        form="share",
        made_by="evaluate --spliced",
    ),
    Column(
        key="interpretable",
        title="Interpretable",
        hint="Latents with enough contexts and few enough different tokens.",
        of=_interpretable,
        better="high",
        form="integer",
        made_by="contexts",
    ),
    Column(
        key="score",
        title="Score",
        hint="Mean interpretation score, 1 to 5.",
        of=_score("mean"),
        error=_score("se"),
        better="high",
        form="2",
        made_by="interpret",
    ),
    Column(
        key="dead",
        title="Dead",
        hint="Share of latents active on no evaluated token.",
        of=_measured("dead_share"),
        better="low",
        form="share",
    ),
    Column(
        key="tokens",
        title="Tokens",
        hint="Tokens it was trained on, repeats included.",
        of=_trained("tokens"),
        form="integer",
        made_by="train",
    ),
    Column(
        key="seconds",
        title="Time",
        hint="Wall time of the pass that trained it, together with the others in that pass.",
        of=_trained("seconds"),
        form="seconds",
        made_by="train",
    ),
)


def build_table(runs: Sequence[FoundRun]) -> Table:
    """Every run's row, without the columns that nobody has a value for."""
    rows = [
        {"id": run.id} | {column.key: [column.of(run), column.error(run)] for column in COLUMNS}
        for run in runs
    ]
    shown = [c for c in COLUMNS if any(row[c.key][0] is not None for row in rows)]
    absent = [column for column in COLUMNS if column not in shown]
    return Table(
        columns=[
            {name: getattr(column, name) for name in ("key", "title", "hint", "form", "better")}
            for column in shown
        ],
        rows=rows,
        best={column.key: _best(column, rows) for column in shown if column.better},
        missing=[Missing.of(f"the column {column.title}", column.made_by) for column in absent],
    )


def _best(column: Column, rows: list[Record]) -> list[str]:
    """The runs whose value, as it is written, is the best one; none where all are equal."""
    values = {row["id"]: row[column.key][0] for row in rows if row[column.key][0] is not None}
    written = {id: _rounded(column, value) for id, value in values.items()}
    if len(set(written.values())) < 2:
        return []
    best = (min if column.better == "low" else max)(written.values())
    return [id for id, value in written.items() if value == best]


def _rounded(column: Column, value: float) -> float:
    digits = {"share": 3, "integer": 0, "seconds": 0}.get(column.form)
    return round(value, int(column.form) if digits is None else digits)
