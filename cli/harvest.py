"""`routesae harvest`: text and a model -> a store."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.console import bar, duration, err, layer_list, out, size
from cli.options import Codec, CodecKind, Device, KeyframeEvery, Seed, Step, build_codec

if TYPE_CHECKING:
    from routesae_cache.harvest import HarvestProgress
    from routesae_cache.harvest_plan import HarvestPlan
    from routesae_cache.workers import Share


class PackingKind(StrEnum):
    """How documents become rows."""

    joined = "joined"
    document = "document"


class DtypeKind(StrEnum):
    """Of the model's forward pass."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


def harvest(
    target: Annotated[Path, typer.Option("--out", help="Store to make, extend or go on with.")],
    model: Annotated[
        str, typer.Option(help="Preset, hub id, local folder or .gguf file.")
    ] = "smollm2-135m",
    dataset: Annotated[
        str, typer.Option(help="Preset, hub id, or local file, folder or glob.")
    ] = "news",
    tokens: Annotated[int, typer.Option(help="Tokens to train on; more extends a store.")] = 200000,
    eval_tokens: Annotated[int, typer.Option(help="Tokens held out for evaluation.")] = 40000,
    layers: Annotated[str, typer.Option(help="auto (n/4 to 3n/4), all, 7-22, or 4,8,12.")] = "auto",
    context: Annotated[int, typer.Option(help="Tokens in a row.")] = 512,
    codec: Codec = CodecKind.delta,
    step: Step = None,
    keyframe_every: KeyframeEvery = None,
    packing: Annotated[
        PackingKind, typer.Option(help="joined: rows are full; document: documents stay apart.")
    ] = PackingKind.joined,
    text_field: Annotated[
        str | None, typer.Option(help="Column with the text  \\[default: the preset's, else text]")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a hub data set.")] = "train",
    seed: Seed = 42,
    dtype: Annotated[
        DtypeKind, typer.Option(help="Of the model's forward pass.")
    ] = DtypeKind.bfloat16,
    revision: Annotated[str | None, typer.Option(help="Commit of a hub model.")] = None,
    attention: Annotated[
        str | None, typer.Option(help="Attention implementation of transformers: sdpa, eager, …")
    ] = None,
    device: Device = "auto",
    batch_rows: Annotated[
        int | None, typer.Option(help="Rows in one forward pass  \\[default: 4, on a GPU 32]")
    ] = None,
    chunk_rows: Annotated[
        int | None, typer.Option(help="Rows committed together  \\[default: a few MB a layer]")
    ] = None,
    worker: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Fill in every N-th chunk, from the I-th (from 0) on."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the estimate, stop.")] = False,
) -> None:
    """Run the model once and write its residuals, compressed, into a store.

    Interrupted at any instant and started again with the same command, it goes on where it was.
    Several machines that see one file system share the work: docs/SCALING.md.
    """
    resolved_codec = build_codec(codec, step, keyframe_every)
    with err.status("Looking at the model, the text and the store"):
        from routesae_cache.harvest import harvest as run_harvest
        from routesae_cache.harvest_plan import HarvestConfig, plan_harvest
        from routesae_cache.workers import Share

        share = None if worker is None else Share.parse(worker)
        plan = plan_harvest(
            HarvestConfig(
                model=model,
                dataset=dataset,
                out=target,
                tokens=tokens,
                eval_tokens=eval_tokens,
                layers=layers,
                context=context,
                codec=resolved_codec,
                packing=packing.value,
                text_field=text_field,
                split=split,
                seed=seed,
                dtype=dtype.value,
                revision=revision,
                attention=attention,
                device=device,
                batch_rows=batch_rows,
                chunk_rows=chunk_rows,
            )
        )
    _show(plan)
    if share is not None:
        _show_share(plan, share)
    plan.check_disk()
    if dry_run:
        return
    if plan.complete:
        out.print(f"{target} is complete: {plan.tokens:,} tokens. Nothing to do.")
        return
    if share is not None:
        _harvest_share(plan, share)
        return
    with bar("Tokens") as update:
        result = run_harvest(plan, _Bar(update))
    _show_rate(result.tokens, result.seconds, target)
    out.print(f"See what is in it: routesae store info {target}")


def _show(plan: HarvestPlan) -> None:
    spec = plan.spec
    out.print(
        f"{spec.model['name']} ({spec.model['dtype']}, {plan.device}) on "
        f"{spec.text['dataset']}: layers {layer_list(spec.layers)} of {spec.n_blocks}, "
        f"width {spec.width}, rows of {spec.context}, codec {spec.codec}"
    )
    if plan.tokens_left:
        out.print(
            f"To do: {plan.tokens_left:,} of {plan.tokens:,} tokens, about "
            f"{size(plan.bytes_left)} ({size(plan.bytes_free)} free), about "
            f"{duration(plan.seconds_left)}"
        )


def _show_share(plan: HarvestPlan, share: Share) -> None:
    from routesae_cache.workers import share_left

    left = share_left(plan, share)
    about = "" if plan.existing else "about "
    seconds = plan.seconds_left * left.tokens / max(plan.tokens_left, 1)
    out.print(
        f"Worker {share}: {about}{left.chunks:,} of {left.chunks_of_all:,} chunks, "
        f"{left.tokens:,} tokens, about {duration(seconds)}"
    )


def _harvest_share(plan: HarvestPlan, share: Share) -> None:
    from routesae_cache.workers import harvest_share

    with bar("Tokens") as update:
        result = harvest_share(plan, share, _Bar(update))
    _show_rate(result.tokens, result.seconds, plan.config.out)
    if result.left_of_share:
        out.print(
            f"{result.left_of_share:,} chunks of worker {share} are being written by another "
            "process; should it fail, run this command again"
        )
    if result.left:
        out.print(f"Worker {share} is done, {result.left:,} chunks are left to others")
    else:
        out.print(f"The store is complete: routesae store info {plan.config.out}")


def _show_rate(tokens: int, seconds: float, target: Path) -> None:
    rate = tokens / seconds if seconds else 0
    out.print(
        f"Harvested {tokens:,} tokens in {duration(seconds)} ({rate:,.0f} tokens/s) into {target}"
    )


class _Bar:
    """Turns a harvest's progress into one line."""

    def __init__(self, update: object) -> None:
        self._update, self._phase, self._start = update, "", 0.0

    def __call__(self, state: HarvestProgress) -> None:
        if state.phase == "waiting":
            self._update(note=f"waiting for token rows, {duration(state.done)}")  # type: ignore[operator]
            return
        if state.phase != self._phase:
            self._phase, self._start = state.phase, time.perf_counter()
        rate = state.done / max(time.perf_counter() - self._start, 1e-9)
        note = f"{rate:,.0f} tokens/s"
        if state.bytes_written:
            bits = 8 * state.bytes_written / max(state.values_written, 1)
            note += f", {size(state.bytes_written)}, {16 / bits:.1f}x under bf16"
        self._update(completed=state.done, total=state.total, note=note)  # type: ignore[operator]
