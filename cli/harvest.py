"""`routesae harvest`: text and a model -> a store."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from cli.console import duration, err, layer_list, out, size
from cli.harvesting import (
    harvest_bar,
    harvest_by_share,
    harvest_on_cluster,
    show_rate,
    show_share,
)
from cli.options import (
    Codec,
    CodecKind,
    Device,
    EndpointUrl,
    GpusPerWorker,
    KeyframeEvery,
    Ray,
    Revision,
    Seed,
    Step,
    TrustRemoteCode,
    Workers,
    build_codec,
    chosen_model,
    ray_config,
)

if TYPE_CHECKING:
    from routesae_cache.harvest_plan import HarvestPlan


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
    target: Annotated[
        str, typer.Option("--out", help="Store to make, extend or go on with: a path or a URL.")
    ],
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
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
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
    ray: Ray = None,
    workers: Workers = None,
    gpus_per_worker: GpusPerWorker = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the estimate, stop.")] = False,
    endpoint_url: EndpointUrl = None,
) -> None:
    """Run the model once and write its residuals, compressed, into a store.

    Interrupted at any instant and started again with the same command, it goes on where it was.
    Several machines that see one file system share the work: docs/SCALING.md.
    """
    resolved_codec = build_codec(codec, step, keyframe_every)
    if ray is not None and worker is not None:
        raise ValueError("--worker does without Ray; give either --worker or --ray")
    cluster = ray_config(ray, workers, gpus_per_worker, device)
    with err.status("Looking at the model, the text and the store"):
        from routesae_cache.harvest import harvest as run_harvest
        from routesae_cache.harvest_plan import HarvestConfig, plan_harvest
        from routesae_cache.workers import Share
        from stores.places import as_place

        share = None if worker is None else Share.parse(worker)
        plan = plan_harvest(
            HarvestConfig(
                model=chosen_model(model, revision, trust_remote_code),
                dataset=dataset,
                out=as_place(target),  # with the endpoint, for workers elsewhere
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
                attention=attention,
                device=cluster.device if cluster else device,
                batch_rows=batch_rows,
                chunk_rows=chunk_rows,
            ),
            here=cluster is None,
        )
    _show(plan)
    if share is not None:
        show_share(plan, share)
    plan.check_disk()
    if dry_run:
        return
    if plan.complete:
        out.print(f"{target} is complete: {plan.tokens:,} tokens. Nothing to do.")
        return
    if share is not None:
        harvest_by_share(plan, share)
        return
    if cluster is not None:
        harvest_on_cluster(plan, cluster)
        return
    with harvest_bar(plan) as shown:
        result = run_harvest(plan, shown)
    show_rate(result.tokens, result.seconds, target)
    out.print(f"See what is in it: routesae store info {target}")


def _show(plan: HarvestPlan) -> None:
    spec = plan.spec
    out.print(
        f"{spec.model['name']} ({spec.model['dtype']}, {plan.device}) on "
        f"{spec.text['dataset']}: layers {layer_list(spec.layers)} of {spec.n_blocks}, "
        f"width {spec.width}, rows of {spec.context}, codec {spec.codec}"
    )
    if plan.tokens_left:
        free = "" if plan.bytes_free is None else f" ({size(plan.bytes_free)} free)"
        time_left = "" if plan.seconds_left is None else f", about {duration(plan.seconds_left)}"
        out.print(
            f"To do: {plan.tokens_left:,} of {plan.tokens:,} tokens, about "
            f"{size(plan.bytes_left)}{free}{time_left}"
        )
