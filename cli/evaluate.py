"""`routesae evaluate`: a store and runs -> metrics."""

from __future__ import annotations

import dataclasses
import json
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.console import bar, err, layer_name, out, styled
from cli.evaluation_tables import evaluation_tables
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
    from collections.abc import Sequence

    from routesae_cache.evaluate import EvaluateConfig
    from routesae_cache.metrics import Spliced
    from routesae_cache.ray_cluster import RayConfig
    from routesae_cache.sources import ModelSource
    from routesae_cache.splicing.evaluate import SplicedConfig
    from routesae_cache.trained import TrainedSae
    from stores.reader import StoreReader


class SplitKind(StrEnum):
    """Parts of a store."""

    eval = "eval"
    train = "train"


class AblationKind(StrEnum):
    """What stands in the residual's place where nothing is reconstructed."""

    zero = "zero"
    mean = "mean"
    none = "none"


class ScaleKind(StrEnum):
    """What a router's factor does to a spliced reconstruction."""

    exact = "exact"
    authors = "authors"


def evaluate(
    store: StoreArgument,
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.", metavar="RUN…")],
    split: Annotated[SplitKind, typer.Option(help="Tokens to evaluate on.")] = SplitKind.eval,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the results there, too.")
    ] = None,
    infer_k: Annotated[
        int | None, typer.Option(help="Keep the k largest latents instead of the SAE's own rule.")
    ] = None,
    theta: Annotated[
        float | None, typer.Option(help="Keep latents above this instead of the SAE's own rule.")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(help="Tokens at a time.")] = 2048,
    routing_tokens: Annotated[
        int, typer.Option(help="Tokens on which routing is compared with the best layer; 0: none.")
    ] = 8192,
    spliced: Annotated[
        bool,
        typer.Option("--spliced", help="Run the model, too, with reconstructions in place."),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(help="--spliced: where the store's model is now  \\[default: its name there]"),
    ] = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    rows: Annotated[
        int | None, typer.Option(help="--spliced: rows of the split to read  \\[default: all]")
    ] = None,
    ablation: Annotated[
        AblationKind | None,
        typer.Option(help="--spliced: what `recovered` compares with  \\[default: zero]"),
    ] = None,
    splice_scale: Annotated[
        ScaleKind | None,
        typer.Option(
            help="--spliced: code p·x and divide by p, or x as RouteSAE's authors  "
            "\\[default: exact]"
        ),
    ] = None,
    at_layer: Annotated[
        int | None,
        typer.Option(help="--spliced: the one layer of a crosscoder (or MLSAE) to splice."),
    ] = None,
    skip_refused: Annotated[
        bool,
        typer.Option(
            "--skip-refused", help="--spliced: leave out the SAEs that have no single layer."
        ),
    ] = False,
    device: Device = "auto",
    endpoint_url: EndpointUrl = None,
    ray: Ray = None,
    workers: Workers = None,
    gpus_per_worker: GpusPerWorker = None,
) -> None:
    """Measure reconstruction on held-out tokens from the store; with --spliced in the model.

    --ray shares out what --spliced measures, which takes nearly all of the time.
    """
    cluster = ray_config(ray, workers, gpus_per_worker, device)
    with err.status("Opening the store and the runs"):
        from routesae_cache.evaluate import (
            EvaluateConfig,
            evaluate_saes,
            evaluation_record,
            load_saes,
        )
        from routesae_cache.json_files import write_json
        from routesae_cache.trained import ReadingRule
        from stores.reader import StoreReader

        if json_path is not None and json_path.is_dir():
            raise ValueError(f"expected a file to write with --json, found the folder {json_path}")
        config = EvaluateConfig(
            split=split.value,
            batch_tokens=batch_tokens,
            rule=ReadingRule(infer_k=infer_k, theta=theta),
            routing_tokens=routing_tokens,
            device=pick_device(device),
        )
        asked = {"model": model, "rows": rows, "ablation": ablation, "revision": revision}
        asked |= {"trust-remote-code": trust_remote_code or None}
        asked |= {"splice_scale": splice_scale, "at_layer": at_layer}
        asked |= {"skip_refused": skip_refused or None, "ray": ray}
        splicing = _splice_config(spliced, config, asked)
        reader = StoreReader(store)
        chosen = _spliceable(runs, splicing, skip_refused) if splicing else []
        saes = load_saes(reader.spec, runs, config)
    picked = [sae for sae in saes if sae.run in chosen]
    found: list[Spliced] = []
    if splicing and picked:
        source = chosen_model(model, revision, trust_remote_code)
        found = _splice(reader, picked, splicing, source, config.device, cluster)
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
    with bar("Evaluating") as update:
        results = evaluate_saes(
            reader, saes, config, lambda done, total: update(completed=done, total=total)
        )
    by_run = {sae.run: one for sae, one in zip(picked, found, strict=True)}
    results = [dataclasses.replace(result, spliced=by_run.get(result.run)) for result in results]
    for table in evaluation_tables(results, reader.spec.model["name"]):
        out.print(table)
    for result in results:
        if (layer := result.collapsed_onto) is not None:
            err.print(
                styled(
                    "yellow",
                    "Warning:",
                    f" {result.config.name} routes nearly every token to {layer_name(layer)}: "
                    "the router has collapsed",
                )
            )
    if json_path is not None:
        record = evaluation_record(store, config.split, results)
        write_json(json_path, json.loads(json.dumps(record)))
        out.print(f"Results as JSON: {json_path}")


def _splice(
    reader: StoreReader,
    saes: Sequence[TrainedSae],
    splicing: SplicedConfig,
    model: str | ModelSource | None,
    device: str,
    cluster: RayConfig | None,
) -> list[Spliced]:
    """Measure SAEs in the model, here or on a cluster."""
    from routesae_cache.splicing.evaluate import check_spliceable, evaluate_spliced

    passes = check_spliceable([sae.config for sae in saes], splicing)
    if cluster is not None:
        from routesae_cache.ray_splicing import splice_on_ray

        measure = partial(splice_on_ray, reader, model, saes, splicing, cluster=cluster)
    else:
        with err.status("Loading the model"):
            from routesae_cache.kernels import keep_freed_memory
            from routesae_cache.origin import origin_lm

            keep_freed_memory()
            lm = origin_lm(reader.spec, model=model, device=device)
        measure = partial(evaluate_spliced, reader, lm, saes, splicing)
    with bar(f"Splicing, {passes} passes a row") as update:
        return measure(lambda done, total: update(completed=done, total=total))


def _spliceable(runs: Sequence[Path], splicing: SplicedConfig, skip_refused: bool) -> list[Path]:
    """The runs to splice; one that cannot be is refused, or named and left out."""
    from routesae_cache.checkpoint import read_config
    from routesae_cache.splicing.evaluate import check_spliceable, refusal

    configs = {run: read_config(run) for run in runs}
    why = {
        run: refusal(config, splicing) if skip_refused else None for run, config in configs.items()
    }
    for reason in filter(None, why.values()):
        err.print(styled("yellow", "Not spliced:", f" {reason}"), soft_wrap=True)
    chosen = [run for run in runs if why[run] is None]
    if chosen:
        check_spliceable([configs[run] for run in chosen], splicing)
    return chosen


def _splice_config(
    wanted: bool, config: EvaluateConfig, asked: dict[str, Any]
) -> SplicedConfig | None:
    """What --spliced and its options mean together; ValueError for those without it."""
    from routesae_cache.splicing.evaluate import SplicedConfig

    given = {name: value for name, value in asked.items() if value is not None}
    if not wanted:
        if given:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ValueError(f"{names} belongs to --spliced; add that, or leave it out")
        return None
    ablation = given.get("ablation", AblationKind.zero)
    return SplicedConfig(
        split=config.split,
        rows=given.get("rows"),
        batch_tokens=config.batch_tokens,
        ablation=None if ablation is AblationKind.none else ablation.value,
        scale=given.get("splice_scale", ScaleKind.exact).value,
        at_layer=given.get("at_layer"),
    )
