"""The page that goes with an export: how to load it, and what the format has no place for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from routesae_cache.checkpoint import RunConfig
from routesae_cache.interchange.formats import Format
from routesae_cache.interchange.verify import TOLERANCE, Difference
from routesae_cache.saes.sae import Sae


def limits(config: RunConfig, sae: Sae) -> list[str]:
    """What cannot be expressed, a sentence or two each; empty where nothing is lost."""
    options, found = config.sae, []
    if options.selector in ("route", "random"):
        found.append(
            f"**Which layer.** Here each token is read from one of {len(options.layers)} layers "
            f"(selector `{options.selector}`). The format has no place for that choice: each "
            "directory holds the same coder and codes every token of its layer."
        )
    if has_gate(config):
        found.append(
            "**The router's factor.** Here the coder reads p·x, p the router's probability of the "
            "layer it chose, and the reconstruction is divided by p. The exported SAE reads x, "
            "as if p were 1."
        )
    if options.norm == "token":
        found.append(
            "**Epsilon.** Here a residual is divided by its standard deviation + 1e-6 and the "
            "reconstruction multiplied by the same; SAELens divides by the standard deviation + "
            "1e-5 and multiplies by the standard deviation alone. It shows where the standard "
            "deviation is small."
        )
    if options.coder == "topk":
        found.append(
            "**Latents below 0.** Here the k largest pre-activations are kept as they are; the "
            "library sets those below 0 to 0."
        )
    if options.coder == "jumprelu":
        negative = int((sae.coder.state_dict()["threshold"] < 0).sum())
        found.append(
            "**Thresholds below 0.** Here such a latent is active at pre-activations between its "
            "threshold and 0; the library sets them to 0. "
            f"{negative} of {options.latents} thresholds are below 0."
        )
    if options.encode_dtype != "float32":
        found.append(
            f"**Selection in {options.encode_dtype}.** Here the active latents are chosen from a "
            f"{options.encode_dtype} product; the library chooses from float32."
        )
    return found


def has_gate(config: RunConfig) -> bool:
    """Whether the coder reads the residual times the router's probability."""
    options = config.sae
    return options.selector == "route" and options.hard and options.route_estimator == "factor"


def readme(
    config: RunConfig,
    target: Format,
    folders: Sequence[tuple[int, str]],
    lost: Sequence[str],
    measured: Sequence[Difference],
    origin: str,
) -> str:
    """The page as Markdown.

    Args:
        folders: each layer and the directory it is in, relative to the page.
        lost: from `limits`.
        measured: empty where it was not verified.
    """
    options = config.sae
    trained_on = f"{config.store_spec['model']['name']}, {config.store_spec['text']['dataset']}"
    rows = [
        f"| {_both_ways(layer)} | `{target.hook(layer)}` | `{name}` |" for layer, name in folders
    ]
    usage = target.usage.format(folder=folders[0][1])
    parts = [
        f"# {config.name} for {target.title}",
        f"A sparse autoencoder trained with routesae-cache: `{options.name}`, {options.latents} "
        f"latents of width {config.width}, on residuals of {trained_on}.",
        f"```python\n{usage}\n```",
        "| layer | hook | directory |\n|---|---|---|\n" + "\n".join(rows),
        _normalisation(config),
        "Training left out padding and the first token of every row. " + target.model_note,
        "## What differs from the run\n\n"
        + ("\n".join(f"- {item}" for item in lost) or "Nothing but rounding."),
    ]
    if measured:
        parts.append(_measurements(measured, origin))
    return "\n\n".join(parts) + "\n"


def _normalisation(config: RunConfig) -> str:
    if config.sae.norm == "token":
        return (
            "The SAE normalises each token itself (`normalize_activations: layer_norm`) and undoes "
            "it after decoding: give it residuals as the model has them."
        )
    if config.sae.norm == "scalar":
        return (
            f"The one factor of the data set, 1/sqrt({config.mean_square:g}), is folded into the "
            "weights; latents have the values they have in the run. Give it residuals as the model "
            "has them."
        )
    return "It was trained on residuals as the model has them."


def _measurements(measured: Sequence[Difference], origin: str) -> str:
    header = (
        "| layer | untouched | largest difference | as read | largest difference "
        "| NormMSE of the run | exported | mean p |\n|---|---|---|---|---|---|---|---|"
    )
    rows = [
        f"| {_both_ways(d.layer)} | {d.exact_count} of {d.compared} | {number(d.exact)} "
        f"| {d.read.count} | {number(d.read.largest)} | {number(d.read.nmse_run, '.4f')} "
        f"| {number(d.read.nmse_export, '.4f')} | {number(d.read.gate, '.3f')} |"
        for d in measured
    ]
    return "\n\n".join(
        [
            "## Measured",
            f"On {origin}, loaded back with the library itself. Differences between "
            "reconstructions are the largest over channels and tokens, in standard deviations of "
            "the residual. *Untouched*: residuals without any of the above (those that the "
            "epsilons are scaled out of), and without a choice of latents that hangs on rounding; "
            f"at most {TOLERANCE:g} is asked for. *As read*: what the SAE itself reads from the "
            "layer, everything above included.",
            "\n".join([header, *rows]),
        ]
    )


def _both_ways(layer: int) -> str:
    return f"{layer} (after block {layer - 1})" if layer else "0 (embedding)"


def number(value: float | None, form: str = ".1e") -> str:
    """A figure, or a dash where there is none."""
    return "–" if value is None else format(value, form)


def folders_of(config: RunConfig) -> list[tuple[int, Path]]:
    """Each exported layer and its directory below the export's own."""
    layers = config.sae.layers
    if config.sae.selector == "fixed":
        return [(layers[0], Path())]
    return [(layer, Path(f"layer_{layer}")) for layer in layers]
