"""`routesae plan`: a harvest and a training on many machines, on paper."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.console import err, layer_list, out
from cli.options import (
    Codec,
    CodecKind,
    KeyframeEvery,
    Revision,
    Step,
    TrustRemoteCode,
    build_codec,
    chosen_model,
)

if TYPE_CHECKING:
    from routesae_cache.plan import Setting
    from routesae_cache.rates import Rates


def plan(
    model: Annotated[
        str, typer.Option(help="Preset, hub id, local folder or .gguf file.")
    ] = "llama-3.1-8b",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    tokens: Annotated[float, typer.Option(help="Tokens to train on, such as 1e9.")] = 1e9,
    eval_tokens: Annotated[float, typer.Option(help="Tokens held out for evaluation.")] = 0,
    layers: Annotated[str, typer.Option(help="auto (n/4 to 3n/4), all, 7-22, or 4,8,12.")] = "auto",
    context: Annotated[int, typer.Option(help="Tokens in a row.")] = 512,
    codec: Codec = CodecKind.delta,
    step: Step = None,
    keyframe_every: KeyframeEvery = None,
    workers: Annotated[int, typer.Option(help="That harvest, with a GPU each.")] = 1,
    train_workers: Annotated[int, typer.Option(help="That train, with a GPU each.")] = 1,
    gpu: Annotated[
        str, typer.Option(help="h200, h100, a100, l40s, or cpu for this machine.")
    ] = "h100",
    sae: Annotated[
        list[str] | None,
        typer.Option(help="As for train; several share a pass  \\[default: routesae:k=64]"),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the train split.")] = 1,
    batch_tokens: Annotated[int, typer.Option(help="Tokens a step, of all ranks.")] = 32768,
    model_tokens_per_second: Annotated[
        float | None, typer.Option(help="Of one worker's forward pass, where it was measured.")
    ] = None,
    rate: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=NUMBER", help="Another value for a rate or price."),
    ] = None,
    rates_file: Annotated[
        Path | None, typer.Option("--rates", help="TOML with such values.", metavar="FILE.toml")
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the plan there, too.")
    ] = None,
) -> None:
    """Model the time, bytes and money that a harvest and a training take on many machines.

    Nothing is computed or downloaded. The table at the end has every rate and price that went
    into it, and where it comes from. docs/SCALING.md explains the formulas.
    """
    resolved_codec = build_codec(codec, step, keyframe_every)
    if json_path is not None and json_path.is_dir():
        raise ValueError(f"expected a file to write with --json, found the folder {json_path}")
    with err.status("Planning"):
        from routesae_cache.forecast import model_sizes
        from routesae_cache.layers import default_layer, parse_layers
        from routesae_cache.plan import Setting
        from routesae_cache.rates import rates_for
        from routesae_cache.saes.registry import parse_saes

        given = _given(rates_file, rate or (), model_tokens_per_second)
        sizes = model_sizes(chosen_model(model, revision, trust_remote_code))
        kept = parse_layers(layers, sizes.n_layers)
        auto = default_layer(sizes.n_layers)
        specs = parse_saes(sae or ["routesae:k=64"], options={}, preset="default")
        setting = Setting(
            model=sizes,
            tokens=_whole("--tokens", tokens),
            eval_tokens=_whole("--eval-tokens", eval_tokens),
            layers=kept,
            context=context,
            codec=resolved_codec,
            workers=workers,
            ranks=train_workers,
            saes=tuple(
                spec.config(store_layers=kept, auto_layer=auto, width=sizes.width) for spec in specs
            ),
            epochs=epochs,
            batch_tokens=batch_tokens,
        )
        rates = rates_for(gpu, given)
    out.print(
        f"{model}: layers {layer_list(kept)} of {sizes.n_layers}, width {sizes.width}, rows of "
        f"{context}, {setting.codec}\n{setting.tokens + setting.eval_tokens:,} tokens; "
        f"{', '.join(config.name for config in setting.saes)}"
    )
    _show(setting, rates, json_path)


def _show(setting: Setting, rates: Rates, json_path: Path | None) -> None:
    from cli.plan_tables import codec_table, figure_table, plan_table, worker_table
    from routesae_cache import plan as on_paper
    from routesae_cache.json_files import write_json

    wholly = on_paper.plan(setting, rates)
    codecs = on_paper.with_codecs(setting, rates)
    numbers = sorted({1, 2, 4, setting.workers} | (set() if rates.on_cpu else {16, 64}))
    workers = on_paper.with_workers(setting, rates, numbers)
    for table in (
        plan_table(wholly, rates.gpu),
        codec_table(codecs),
        worker_table(workers),
        figure_table(rates.figures()),
    ):
        out.print()
        out.print(table)
    if json_path is not None:
        record = {
            "setting": setting.to_dict(),
            "rates": [figure._asdict() for figure in rates.figures()],
            "plan": wholly.to_dict(),
            "codecs": [{"codec": codec.to_dict(), **other.to_dict()} for codec, other in codecs],
            "workers": [{"workers": n, **other.to_dict()} for n, other in workers],
        }
        json_path.parent.mkdir(parents=True, exist_ok=True)
        write_json(json_path, record)


def _given(
    file: Path | None, pairs: list[str] | tuple[()], model_tokens_per_second: float | None
) -> dict[str, Any]:
    """The values that the user has for rates; those of the command line come before a file's."""
    from routesae_cache.sweep import load_toml

    given: dict[str, Any] = {} if file is None else load_toml(file)
    for pair in pairs:
        name, equals, number = pair.partition("=")
        try:
            given[name.strip()] = float(number)
        except ValueError:
            equals = ""
        if not equals:
            raise ValueError(f"--set {pair}: expected NAME=NUMBER, such as price_per_hour=2.5")
    if model_tokens_per_second is not None:
        given["model_tokens_per_second"] = model_tokens_per_second
    return given


def _whole(option: str, number: float) -> int:
    if not number.is_integer():
        raise ValueError(f"{option}: expected a whole number, found {number:g}")
    return int(number)
