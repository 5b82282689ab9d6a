"""What `routesae plan` shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from cli.console import duration, size, styled

if TYPE_CHECKING:
    from routesae_cache.plan import Plan, StagePlan
    from routesae_cache.rates import Figure
    from stores.codecs import ResidualCodec


def plan_table(plan: Plan, gpu: str) -> Table:
    """Every part of both stages, the one that limits each marked; bytes and money."""
    table = _table(
        f"A store of {size(plan.store_bytes)}, {plan.bits:.2f} bits a value; ◀ limits a stage",
        ("", "at", ">time", ">tokens/s", ">bytes", ">USD", ""),
    )
    for name, stage in (("Harvest", plan.harvest), ("Training", plan.training)):
        table.add_row(
            styled("bold", name),
            f"{stage.workers} × {gpu}",
            styled("bold", duration(stage.seconds)),
            f"{stage.tokens_per_second:,.0f}",
            size(stage.n_bytes),
            _dollars(stage.dollars),
            "",
        )
        for part in (*stage.before, *stage.parts):
            first = styled("", "first" if part in stage.before else "")
            mark = styled("yellow", "◀") if part == stage.bottleneck else first
            table.add_row(f"  {part.what}", part.place, duration(part.seconds), "", "", "", mark)
        table.add_section()
    for cost, dollars in (
        (styled("", "Storage"), plan.storage_dollars),
        (styled("", "Egress"), plan.egress_dollars),
        (styled("bold", "Everything"), plan.dollars),
    ):
        table.add_row(cost, "", "", "", "", _dollars(dollars), "")
    return table


def codec_table(plans: Sequence[tuple[ResidualCodec, Plan]]) -> Table:
    """What each codec buys."""
    table = _table("The same in every codec", ("codec", ">store", *_STAGES, ">USD"))
    for codec, plan in plans:
        parameters = [f"{v:g}" for k, v in codec.to_dict().items() if k != "kind" and v]
        stages = (*_stage(plan.harvest), *_stage(plan.training))
        table.add_row(
            " ".join([codec.kind, *parameters]),
            size(plan.store_bytes),
            *stages,
            _dollars(plan.dollars),
        )
    return table


def worker_table(plans: Sequence[tuple[int, Plan]]) -> Table:
    """What more workers buy, and what they wait for."""
    table = _table(
        "With so many workers, in the harvest and in the training",
        (">workers", ">tokens/s", *_STAGES, ">USD"),
    )
    for number, plan in plans:
        speed = f"{plan.harvest.tokens_per_second:,.0f}"
        stages = (*_stage(plan.harvest), *_stage(plan.training))
        table.add_row(str(number), speed, *stages, _dollars(plan.dollars))
    return table


def figure_table(figures: Sequence[Figure]) -> Table:
    """Every rate and price that a plan was computed from."""
    table = _table(
        "Computed from these; --set NAME=NUMBER or --rates FILE.toml puts others in their place",
        ("name", ">value", "basis", "what it is"),
    )
    table.columns[0].no_wrap = True  # --set takes it whole
    for figure in figures:
        basis = styled("yellow" if figure.basis == "assumed" else "", figure.basis)
        what = ", ".join(filter(None, (figure.unit, figure.note)))
        table.add_row(figure.name, f"{figure.value:.4g}", basis, what)
    return table


_STAGES = (">harvest", "limit", ">training", "limit")


def _stage(stage: StagePlan) -> tuple[str, str]:
    return duration(stage.seconds), stage.bottleneck.what


def _dollars(amount: float) -> str:
    return f"{amount:,.0f}"


def _table(title: str, columns: Sequence[str]) -> Table:
    """A name that begins with > is that of a column of numbers."""
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name.lstrip(">"), justify="right" if name[:1] == ">" else "left")
    return table
