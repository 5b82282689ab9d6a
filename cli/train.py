"""`routesae train`: a store -> trained SAEs."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from cli.console import err
from cli.options import (
    CacheDir,
    CacheGb,
    Device,
    EndpointUrl,
    GpusPerWorker,
    Ray,
    Seed,
    StoreArgument,
    Workers,
    open_cached,
    pick_device,
    ray_config,
)
from cli.training import (
    Log,
    Nproc,
    Out,
    Replace,
    Resume,
    SoFar,
    WandbGroup,
    WandbMode,
    WandbName,
    WandbProject,
    log_config,
    run_pass,
)


class NormKind(StrEnum):
    """What is done to residuals before an SAE sees them."""

    token = "token"
    scalar = "scalar"
    none = "none"


class PresetKind(StrEnum):
    """Where options that are not given come from."""

    default = "default"
    paper = "paper"


def train(
    store: StoreArgument,
    sae: Annotated[
        list[str],
        typer.Option(
            help="routesae, topk, … or SELECTOR+CODER; topk:k=32,64,layer=22 for several."
        ),
    ],
    target: Out,
    latents: Annotated[
        int | None, typer.Option(help="Size of the dictionary  \\[default: 8 times the width]")
    ] = None,
    k: Annotated[int | None, typer.Option(help="TopK family: active latents a token.")] = None,
    sparsity_weight: Annotated[
        float | None, typer.Option(help="L1 weight (ReLU, Gated) or L0 weight (JumpReLU).")
    ] = None,
    layer: Annotated[
        str | None, typer.Option(help="Single-layer SAEs: layer, or auto (3n/4)  \\[default: auto]")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Other SAEs: 7-22, 4+8+12, or all  \\[default: all]")
    ] = None,
    soft: Annotated[
        bool, typer.Option("--soft", help="Route: read the mixture of all layers.")
    ] = False,
    aggregate: Annotated[
        str | None, typer.Option(help="Route: the router sees the sum or mean of the layers.")
    ] = None,
    route_estimator: Annotated[
        str | None, typer.Option(help="Route: factor (the paper's) or straight-through.")
    ] = None,
    norm: Annotated[
        NormKind | None, typer.Option(help="Normalisation of residuals  \\[default: token]")
    ] = None,
    init_bias: Annotated[
        str | None, typer.Option(help="Where b_pre starts: zero, mean, or (geometric) median.")
    ] = None,
    auxk: Annotated[int | None, typer.Option(help="Dead latents revived a token; 0: none.")] = None,
    preset: Annotated[
        PresetKind, typer.Option(help="Options not given: ours, or the RouteSAE paper's.")
    ] = PresetKind.default,
    epochs: Annotated[int, typer.Option(help="Passes over the train split.")] = 1,
    tokens: Annotated[int | None, typer.Option(help="Stop after so many  \\[default: all]")] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens a step  \\[default: 32768, fewer for under 1000 such steps]"),
    ] = None,
    lr: Annotated[float, typer.Option(help="Learning rate at its height.")] = 5e-4,
    seed: Seed = 42,
    device: Device = "auto",
    nproc: Nproc = 1,
    ray: Ray = None,
    workers: Workers = None,
    gpus_per_worker: GpusPerWorker = None,
    so_far: SoFar = False,
    resume: Resume = False,
    replace: Replace = False,
    log: Log = None,
    wandb_project: WandbProject = None,
    wandb_name: WandbName = None,
    wandb_group: WandbGroup = None,
    wandb_mode: WandbMode = None,
    endpoint_url: EndpointUrl = None,
    cache_dir: CacheDir = None,
    cache_gb: CacheGb = None,
) -> None:
    """Train sparse autoencoders from a store; several at once share one pass over it."""
    options: dict[str, Any] = {
        "latents": latents,
        "k": k,
        "sparsity_weight": sparsity_weight,
        "layer": layer,
        "layers": layers,
        "hard": False if soft else None,
        "aggregate": aggregate,
        "route_estimator": route_estimator,
        "norm": norm and norm.value,
        "init_bias": init_bias,
        "auxk": auxk,
    }
    cluster = ray_config(ray, workers, gpus_per_worker, device)
    with err.status("Reading the options"):
        from routesae_cache.saes.registry import parse_saes
        from routesae_cache.sweep import OWN_OPTIONS
        from routesae_cache.train_plan import TrainConfig

        given = {name: value for name, value in options.items() if value is not None}
        specs = parse_saes(sae, options=given, preset=preset.value, train_options=OWN_OPTIONS)
        config = TrainConfig(
            out=target,
            epochs=epochs,
            tokens=tokens,
            batch_tokens=batch_tokens,
            lr=lr,
            seed=seed,
            device=cluster.device if cluster else pick_device(device),
            so_far=so_far,
            resume=resume,
            replace_changed=replace,
            log=log_config(
                log,
                wandb_project=wandb_project,
                wandb_name=wandb_name,
                wandb_group=wandb_group,
                wandb_mode=wandb_mode,
            ),
        )
    run_pass(open_cached(store, cache_dir, cache_gb), specs, config, nproc, cluster)
