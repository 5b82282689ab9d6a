"""`routesae train`: a store -> trained SAEs."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.console import bar, duration, err, out
from cli.options import Device, Seed, StoreArgument, pick_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    from routesae_cache.train import RunState


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
    target: Annotated[Path, typer.Option("--out", help="Folder for the runs.")],
    latents: Annotated[
        int | None, typer.Option(help="Size of the dictionary  [default: 8 times the width]")
    ] = None,
    k: Annotated[int | None, typer.Option(help="TopK family: active latents a token.")] = None,
    sparsity_weight: Annotated[
        float | None, typer.Option(help="L1 weight (ReLU, Gated) or L0 weight (JumpReLU).")
    ] = None,
    layer: Annotated[
        str | None, typer.Option(help="Single-layer SAEs: layer, or auto (3n/4)  [default: auto]")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Other SAEs: 7-22, 4+8+12, or all  [default: all]")
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
        NormKind | None, typer.Option(help="Normalisation of residuals  [default: token]")
    ] = None,
    init_bias: Annotated[
        str | None, typer.Option(help="Where b_pre starts: zero, mean, or (geometric) median.")
    ] = None,
    auxk: Annotated[int | None, typer.Option(help="Dead latents revived a token; 0: none.")] = None,
    preset: Annotated[
        PresetKind, typer.Option(help="Options not given: ours, or the RouteSAE paper's.")
    ] = PresetKind.default,
    epochs: Annotated[int, typer.Option(help="Passes over the train split.")] = 1,
    tokens: Annotated[int | None, typer.Option(help="Stop after so many  [default: all]")] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens a step  [default: 32768, fewer for under 1000 such steps]"),
    ] = None,
    lr: Annotated[float, typer.Option(help="Learning rate at its height.")] = 5e-4,
    seed: Seed = 42,
    device: Device = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with interrupted runs, skip ended ones.")
    ] = False,
) -> None:
    """Train sparse autoencoders from a store; several at once share one pass over it."""
    with err.status("Opening the store"):
        from routesae_cache.layers import default_layer
        from routesae_cache.saes.registry import parse_saes
        from routesae_cache.train import TrainConfig
        from routesae_cache.train import train as run_training
        from stores.reader import StoreReader

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
        given = {name: value for name, value in options.items() if value is not None}
        specs = parse_saes(sae, options=given, preset=preset.value, train_options={"seed": int})
        config = TrainConfig(
            out=target,
            epochs=epochs,
            tokens=tokens,
            batch_tokens=batch_tokens,
            lr=lr,
            seed=seed,
            device=pick_device(device),
            resume=resume,
        )
        reader = StoreReader(store)
        auto_layer = default_layer(reader.spec.n_blocks)
        saes = [
            (
                spec.config(
                    store_layers=reader.spec.layers,
                    auto_layer=auto_layer,
                    width=reader.spec.width,
                ),
                spec.train.get("seed", seed),
            )
            for spec in specs
        ]
    start = time.perf_counter()
    with bar(f"Training {len(saes)} SAE{'s' if len(saes) > 1 else ''}") as update:
        result = run_training(
            reader,
            saes,
            config,
            lambda p: update(
                completed=p.step,
                total=p.total_steps,
                note=f"{_first(p.runs)} {p.tokens / (time.perf_counter() - start):,.0f} tokens/s",
            ),
        )
    for state, folder in zip(result.runs, result.folders, strict=True):
        out.print(f"{state.status:>8}  {folder}")
    if result.tokens:
        rate = result.tokens / result.seconds
        out.print(f"{result.tokens:,} tokens in {duration(result.seconds)} ({rate:,.0f} tokens/s)")
    out.print(f"Measure: routesae evaluate {store} {' '.join(map(str, result.folders))}")
    if any(state.status == "failed" for state in result.runs):
        raise typer.Exit(1)


def _first(runs: Sequence[RunState]) -> str:
    return f"NMSE {runs[0].nmse:.4f}" if len(runs) == 1 else ""
