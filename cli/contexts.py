"""`routesae contexts`: a store and runs -> the text that each latent is active in."""

from __future__ import annotations

import shutil
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from cli.console import bar, count, err, out, styled
from cli.evaluate import SplitKind
from cli.layer_table import layer_table
from cli.options import (
    Device,
    EndpointUrl,
    GpusPerWorker,
    Ray,
    Revision,
    StoreArgument,
    TrustRemoteCode,
    Workers,
    chosen_model,
    pick_device,
    ray_config,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from routesae_cache.contexts.contexts import Mined

AUTO = "auto"
_SIDE_BY_SIDE = 6  # thresholds that fit 80 characters beside a name


class FormatKind(StrEnum):
    """What other tools read."""

    delphi = "delphi"


def contexts(
    store: StoreArgument,
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.", metavar="RUN…")],
    target: Annotated[Path, typer.Option("--out", help="Folder for the results.")],
    split: Annotated[SplitKind, typer.Option(help="Tokens to look at.")] = SplitKind.eval,
    threshold: Annotated[
        str, typer.Option(help="Activations above it count; auto: 15·√(width/2048).")
    ] = AUTO,
    thresholds: Annotated[
        str | None,
        typer.Option(
            help="Count interpretable latents at these, too: 2,4,8  \\[default: 1/3 … 5/3 of it]"
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of a context at most.")] = 64,
    per_token: Annotated[
        int, typer.Option(help="Strongest contexts kept of each latent and token.")
    ] = 2,
    min_contexts: Annotated[
        int, typer.Option(help="Contexts that an interpretable latent has at least.")
    ] = 5,
    max_token_types: Annotated[
        int, typer.Option(help="Different tokens that activate an interpretable latent at most.")
    ] = 32,
    other_format: Annotated[
        FormatKind | None, typer.Option("--format", help="Write this latent cache, too.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Where the store's model is now  \\[default: its name there]")
    ] = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    batch_tokens: Annotated[int, typer.Option(help="Tokens at a time.")] = 2048,
    device: Device = "auto",
    endpoint_url: EndpointUrl = None,
    ray: Ray = None,
    workers: Workers = None,
    gpus_per_worker: GpusPerWorker = None,
) -> list[Path]:
    """Find the text that each latent is active in, from the store and its tokenizer alone."""
    cluster = ray_config(ray, workers, gpus_per_worker, device)
    with err.status("Opening the store"):
        from routesae_cache.contexts.contexts import ContextsConfig, mine_contexts
        from routesae_cache.whole_files import named_full_disk
        from stores.disk import existing
        from stores.reader import StoreReader

        config = ContextsConfig(
            out=target,
            split=split.value,
            threshold=None if threshold == AUTO else _number("--threshold", threshold),
            thresholds=None if thresholds is None else _numbers(thresholds),
            max_tokens=max_tokens,
            per_token=per_token,
            min_contexts=min_contexts,
            max_token_types=max_token_types,
            delphi=other_format is FormatKind.delphi,
            model=chosen_model(model, revision, trust_remote_code),
            batch_tokens=batch_tokens,
            device=cluster.device if cluster else pick_device(device),
        )
        reader = StoreReader(store)
        if cluster is not None:
            from routesae_cache.ray_contexts import mine_on_ray

            mine_contexts = partial(mine_on_ray, cluster=cluster)
    looked_at = 0.0

    def show(done: int, total: int) -> None:
        nonlocal looked_at
        looked_at = done / total
        update(completed=done, total=total)

    free = shutil.disk_usage(existing(target)).free
    with (  # what was free was enough for what was looked at
        bar("Mining") as update,
        named_full_disk(target, lambda: free / looked_at if looked_at else None),
    ):
        mined = mine_contexts(reader, runs, config, show)
    out.print(_counts_table(mined))
    for table in threshold_tables(mined):
        out.print(table)
    if several := [one for one in mined if _reads_several_layers(one)]:
        shares = [(one.name, one.summary.layer_share or {}) for one in several]
        out.print(layer_table("Share of activations read from each layer", shares))
    for one in mined:
        if not one.summary.interpretable:
            err.print(
                styled(
                    "yellow",
                    "No interpretable latent",
                    f" of {one.name} at {one.threshold:.4g}: {one.summary.activations:,} "
                    f"activations are above it, the largest is {one.strongest:.4g}; a lower "
                    "--threshold may find some",
                ),
                soft_wrap=True,
            )
    for one in mined:
        places = [one.contexts, one.activations, *([one.delphi] if one.delphi else [])]
        out.print(f"{one.name}: {', '.join(map(str, places))}", soft_wrap=True)
    return [one.contexts for one in mined]


def _number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        expected = "numbers with commas between" if option == "--thresholds" else "auto or a number"
        raise ValueError(f"{option}: expected {expected}, found {text!r}") from None


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(_number("--thresholds", part) for part in text.split(","))


def _counts_table(mined: Sequence[Mined]) -> Table:
    table = Table(title=f"Latents on {mined[0].tokens:,} tokens", title_justify="left")
    table.add_column("run", overflow="fold")
    for name in ("threshold", "interpretable", "activated", "activations", "per latent"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in mined:
        summary = one.summary
        each = summary.activations / max(summary.latents_activated, 1)
        table.add_row(
            one.name,
            f"{one.threshold:.4g}",
            f"{summary.interpretable:,}",
            f"{summary.latents_activated:,}",
            count(summary.activations),
            f"{each:.3g}",
        )
    return table


def threshold_tables(mined: Sequence[Mined]) -> Iterator[Table]:
    """A row a run, and as many thresholds side by side as leave room for its name."""
    thresholds = sorted({counts.threshold for one in mined for counts in one.summary.by_threshold})
    for first in range(0, len(thresholds), _SIDE_BY_SIDE):
        table = Table(title="Interpretable latents above a threshold of", title_justify="left")
        table.add_column("run", overflow="fold")
        shown = thresholds[first : first + _SIDE_BY_SIDE]
        for threshold in shown:
            table.add_column(f"{threshold:.4g}", justify="right", no_wrap=True)
        for one in mined:
            found = {counts.threshold: counts for counts in one.summary.by_threshold}
            table.add_row(one.name, *(f"{found[each].interpretable:,}" for each in shown))
        yield table


def _reads_several_layers(one: Mined) -> bool:
    return len(one.summary.layer_share or {}) > 1 and one.summary.activations > 0
