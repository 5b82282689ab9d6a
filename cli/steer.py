"""`routesae steer`: a run and prompts -> the model's text, original and steered."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from cli.console import bar, err, out, visible
from cli.options import (
    Device,
    EndpointUrl,
    Revision,
    Seed,
    TrustRemoteCode,
    chosen_model,
    pick_device,
)

if TYPE_CHECKING:
    from routesae_cache.steering.changes import ChangeKind, LatentChange
    from routesae_cache.steering.dialogues import Prompt
    from routesae_cache.steering.steer import Steered


def steer(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.", metavar="RUN")],
    store: Annotated[str, typer.Option(help="The activation store it was trained from.")],
    latent: Annotated[list[int], typer.Option(help="Latent to change; repeat for several.")],
    set_to: Annotated[
        list[float] | None,
        typer.Option("--set", help="Value to set it to: one for each --latent, or one for all."),
    ] = None,
    add: Annotated[list[float] | None, typer.Option(help="What to add instead.")] = None,
    multiply: Annotated[list[float] | None, typer.Option(help="Factor instead.")] = None,
    at_layer: Annotated[
        int | None,
        typer.Option(help="MLSAE, crosscoder: change the model at this layer  \\[default: at all]"),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to go on with; repeat for several.")
    ] = None,
    dialogues: Annotated[
        Path | None,
        typer.Option(help='JSON lines: HH-RLHF records (chosen, rejected), or {"prompt": …}.'),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Records of --dialogues to read  \\[default: all]")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    seed: Seed = 42,
    raw: Annotated[
        bool, typer.Option("--raw", help="Leave the tokenizer's chat template out.")
    ] = False,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the results there, too.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Where the store's model is now  \\[default: its name there]")
    ] = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = "auto",
    endpoint_url: EndpointUrl = None,
) -> None:
    """Change latents of an SAE while the model generates, beside its text without that."""
    with err.status("Reading the options"):
        from routesae_cache.json_files import write_json
        from routesae_cache.steering.changes import ChangedLatents
        from routesae_cache.steering.steer import SteerConfig
        from routesae_cache.steering.steer import steer as run_steering
        from routesae_cache.trained import TrainedSae
        from stores.layout import read_spec

        if json_path is not None and json_path.is_dir():
            raise ValueError(f"expected a file to write with --json, found the folder {json_path}")
        changes = _changes(
            latent, {"set": set_to or [], "add": add or [], "multiply": multiply or []}
        )
        config = SteerConfig(
            max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, raw=raw
        )
        prompts = _prompts(prompt or [], dialogues, limit)
        where = pick_device(device)
        spec = read_spec(store)
        sae = TrainedSae(run, spec, device=where)
        changed = ChangedLatents(sae, changes, at_layer)
    with err.status("Loading the model"):
        from routesae_cache.origin import origin_lm, origin_tokenizer

        source = chosen_model(model, revision, trust_remote_code)
        tokenizer = origin_tokenizer(spec, model=source)
        lm = origin_lm(spec, model=source, device=where)
        if json_path is not None:
            json_path.parent.mkdir(parents=True, exist_ok=True)
    with bar("Generating") as update:
        results = run_steering(
            lm,
            tokenizer,
            changed,
            prompts,
            config,
            lambda done, total: update(completed=done, total=total),
        )
    what = "; ".join(f"latent {c.latent}: {c.kind} {c.value:g}" for c in changes)
    out.print(f"{sae.config.name} on {spec.model['name']}, {what}")
    for result in results:
        _print(result, changed.layers_changed)
    if json_path is not None:
        record = {
            "kind": "steering",
            "run": str(run),
            "name": sae.config.name,
            "store": str(store),
            "model": spec.model["name"],
            "changes": [dataclasses.asdict(change) for change in changes],
            "at_layer": at_layer,
            **dataclasses.asdict(config),
            "results": [result.to_dict() for result in results],
        }
        write_json(json_path, record, checked=False)
        out.print(f"Results as JSON: {json_path}")


def _changes(latents: list[int], values_of: dict[ChangeKind, list[float]]) -> list[LatentChange]:
    """Latents and values paired in the order in which they were given."""
    from routesae_cache.steering.changes import LatentChange

    given = {kind: values for kind, values in values_of.items() if values}
    if len(given) != 1:
        found = " and ".join(f"--{kind}" for kind in given) or "none of them"
        raise ValueError(f"expected one of --set, --add, --multiply, found {found}")
    ((kind, values),) = given.items()
    if len(values) == 1:
        values = values * len(latents)
    if len(values) != len(latents):
        raise ValueError(
            f"expected --{kind} once for each --latent, or once for all {len(latents)} of them, "
            f"found {len(values)} values"
        )
    pairs = zip(latents, values, strict=True)
    return [LatentChange(latent=latent, kind=kind, value=value) for latent, value in pairs]


def _prompts(typed: list[str], dialogues: Path | None, limit: int | None) -> list[Prompt]:
    from routesae_cache.steering.dialogues import make_prompt, read_prompts

    if not typed and dialogues is None:
        raise ValueError("nothing to do: give --prompt or --dialogues")
    if limit is not None and dialogues is None:
        raise ValueError("--limit is for --dialogues, which was not given")
    prompts = [make_prompt(text, f"--prompt {i}") for i, text in enumerate(typed, 1)]
    return prompts if dialogues is None else prompts + read_prompts(dialogues, limit)


def _print(result: Steered, layers: tuple[int, ...]) -> None:
    out.rule(Text(result.prompt.source), align="left")
    out.print(Text(visible(result.prompt.text.strip()), style="dim"))
    table = Table(expand=True)
    table.add_column("original", ratio=1)
    table.add_column("steered", ratio=1)
    table.add_row(
        _marked(result.original.text, result, "red"), _marked(result.steered.text, result, "green")
    )
    out.print(table)
    notes = [_where_they_differ(result.differ_at)]
    if result.steered.layers and len(layers) > 1:
        counts = Counter(result.steered.layers)
        shares = ", ".join(f"{layer} ({counts[layer]})" for layer in layers if layer in counts)
        notes.append(f"Layers that the steered tokens were read from: {shares}.")
    out.print(" ".join(notes))


def _where_they_differ(differ_at: int | None) -> str:
    if differ_at is None:
        return "The two are the same."
    if differ_at == 0:
        return "They differ from the first token on (▶)."
    return f"They differ after {differ_at} {'token' if differ_at == 1 else 'tokens'} (▶)."


def _marked(text: str, result: Steered, colour: str) -> Text:
    """What both texts have, then a mark, then the rest in colour."""
    if result.differ_at is None:
        return Text(visible(text))
    begin, rest = text[: len(result.same_text)], text[len(result.same_text) :]
    return Text.assemble(visible(begin), ("▶", "bold"), (visible(rest), colour))
