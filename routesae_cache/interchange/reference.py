"""Checkpoints of the RouteSAE authors' code (swei2001/RouteSAEs) -> finished runs.

They are state dicts: tensors by name and nothing else. What is not in them (k, the layers, how
the router aggregates) has to be said.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from routesae_cache.checkpoint import CONFIG, RunConfig, load_strictly, save_weights
from routesae_cache.interchange.folders import check_free, whole_directory
from routesae_cache.json_files import write_json
from routesae_cache.layers import default_layer
from routesae_cache.saes.config import PENALISED, CoderKind, SaeConfig, SelectorKind
from routesae_cache.saes.registry import build_sae, parse_saes, resolve_name
from stores.places import Where
from stores.reader import StoreReader
from stores.stats import split_stats

SEED, PAPER_LR, PAPER_BATCH_TOKENS = 42, 5e-4, 64 * 512
LATENT_KEYS: Mapping[CoderKind, tuple[str, ...]] = {
    "relu": ("latent_bias",),
    "gated": ("gate_bias", "mag_bias", "r_mag"),
    "topk": ("latent_bias",),
    "jumprelu": ("latent_bias", "threshold"),
}
"""What each latent has in the authors' coders; the names are this project's, too."""
# What torch raises for files that hold other things, or are damaged.
_UNREADABLE = (
    *(pickle.UnpicklingError, EOFError, OSError, struct.error, RuntimeError, ValueError),
    *(LookupError, TypeError, AttributeError, AssertionError),
)
Shapes = dict[str, tuple[int, ...]]


class ReferenceFileError(ValueError):
    """No state dict of the authors' code, or not that of the SAE it is said to be."""


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """A checkpoint and what it does not say."""

    file: Path
    sae: str
    """Name or specification, as `train` takes it; what it leaves open is as in the paper."""
    store: Where
    """Residuals of the model it was trained on: gives width and layers, and is recorded."""
    out: Path
    """The run's directory."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further options of the specification, such as k."""


def import_reference(config: ImportConfig) -> RunConfig:
    """Turn a checkpoint into a finished run, which `evaluate` and `export` accept.

    The run's training settings are the paper's; its steps are recorded as 0, its seeds as 42, and a
    sparsity weight that was not given as 0.

    Raises ReferenceFileError for what cannot be read, or lacks, adds or mis-shapes tensors, and
    ValueError for a specification that does not fit the store, or where `out` is there already.
    """
    check_free(config.out)
    name = config.sae.partition(":")[0].strip()
    selector, coder = resolve_name(name)
    if coder not in LATENT_KEYS:
        raise ReferenceFileError(
            f"the authors' code has the coders {', '.join(LATENT_KEYS)}, not {coder}"
        )
    tensors = read_state_dict(config.file)
    _check_names(config, tensors, _names(selector, coder, tensors))
    reader = StoreReader(config.store)
    latents = tensors[_prefix(selector) + LATENT_KEYS[coder][0]].numel()
    sae_config = _sae_config(config, reader, coder, latents)
    _check_shapes(config, tensors, _shapes(sae_config, reader.spec.width))
    positions = list(reader.spec.positions(sae_config.layers))
    there = reader.prefix("train")
    run = RunConfig(
        name=config.out.name,
        sae=sae_config,
        width=reader.spec.width,
        seed=SEED,
        order_seed=SEED,
        lr=PAPER_LR,
        batch_tokens=PAPER_BATCH_TOKENS,
        total_steps=0,
        epochs=1,
        store=str(config.store),
        store_spec=reader.spec.to_dict(),
        mean_square=float(split_stats(reader, "train", there).mean_square_L[positions].mean()),
        chunks=len(there),
    )
    sae = build_sae(sae_config, run.width, SEED)
    load_strictly(sae, sae.state_dict() | _converted(sae_config, tensors), config.file)
    with whole_directory(config.out) as partial:
        write_json(partial / CONFIG, run.to_dict())
        save_weights(partial, sae)
    return run


def read_state_dict(file: Path) -> dict[str, Tensor]:
    """The tensors of a `torch.save`d state dict, in float32; nothing in the file is executed.

    Raises ReferenceFileError for anything else.
    """
    with file.open("rb") as stream:
        try:
            found = torch.load(stream, map_location="cpu", weights_only=True)
        except _UNREADABLE as error:
            raise ReferenceFileError(
                f"{file}: expected a state dict saved with torch.save, tensors and nothing else; "
                "found something else, or a damaged one"
            ) from error
    if not isinstance(found, Mapping):
        raise ReferenceFileError(
            f"{file}: expected a state dict, tensors by name; found {type(found).__name__}"
        )
    if odd := [str(name) for name, value in found.items() if not _is_weight(value)]:
        raise ReferenceFileError(f"{file}: expected tensors of floats; others: {', '.join(odd)}")
    return {str(name): value.float() for name, value in found.items()}


def _is_weight(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _prefix(selector: SelectorKind) -> str:
    return "sae." if selector == "route" else ""


def _names(selector: SelectorKind, coder: CoderKind, tensors: Mapping[str, Tensor]) -> list[str]:
    """The names that a state dict has to have; a crosscoder has as many layers as encoders."""
    if selector == "all":
        layers = sum(name.startswith("encoder.") for name in tensors) or 1
        sides = [f"{side}.{i}.weight" for side in ("encoder", "decoder") for i in range(layers)]
        return [*sides, *LATENT_KEYS[coder]]
    inner = ["encoder.weight", "decoder.weight", "pre_bias", *LATENT_KEYS[coder]]
    router = ["router.weight"] if selector == "route" else []
    return [*router, *(_prefix(selector) + name for name in inner)]


def _check_names(config: ImportConfig, tensors: Mapping[str, Tensor], names: list[str]) -> None:
    faults = [f"{name} is missing" for name in names if name not in tensors]
    faults += [f"{name} is not known" for name in tensors if name not in names]
    if faults:
        raise ReferenceFileError(
            f"{config.file} is no {config.sae.partition(':')[0]} of the authors' code: "
            + "; ".join(faults)
        )


def _sae_config(
    config: ImportConfig, reader: StoreReader, coder: CoderKind, latents: int
) -> SaeConfig:
    options: dict[str, Any] = {"latents": latents, **config.options}
    if coder in PENALISED:
        options.setdefault("sparsity_weight", 0.0)
    specs = parse_saes([config.sae], options=options, preset="paper")
    if len(specs) != 1:
        raise ValueError(f"{config.sae!r} describes {len(specs)} SAEs; a file holds one")
    spec = reader.spec
    return specs[0].config(
        store_layers=spec.layers, auto_layer=default_layer(spec.n_blocks), width=spec.width
    )


def _shapes(sae: SaeConfig, width: int) -> Shapes:
    """Name -> shape that a state dict has to have."""
    latent: Shapes = dict.fromkeys(LATENT_KEYS[sae.coder], (sae.latents,))
    encoder, decoder = (sae.latents, width), (width, sae.latents)
    if sae.selector == "all":
        for i in range(len(sae.layers)):
            latent |= {f"encoder.{i}.weight": encoder, f"decoder.{i}.weight": decoder}
        return latent
    shapes = {"encoder.weight": encoder, "decoder.weight": decoder, "pre_bias": (width,), **latent}
    if sae.selector != "route":
        return shapes
    inner = {_prefix(sae.selector) + name: shape for name, shape in shapes.items()}
    return {"router.weight": (len(sae.layers), width), **inner}


def _check_shapes(config: ImportConfig, tensors: Mapping[str, Tensor], shapes: Shapes) -> None:
    faults = [
        f"{name}: expected {shapes.get(name, 'no such layer')}, found {tuple(tensor.shape)}"
        for name, tensor in tensors.items()
        if tuple(tensor.shape) != shapes.get(name)
    ]
    faults += [f"{name}: expected {shapes[name]}, found none" for name in shapes.keys() - tensors]
    if faults:
        raise ReferenceFileError(
            f"{config.file} does not fit {config.store} and {config.sae!r}: {'; '.join(faults)}. "
            "Width and layers come from the store (others of its layers: --layer, --layers)"
        )


def _converted(sae: SaeConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' tensors under this project's names and in its shapes."""
    if sae.selector == "all":
        layers = range(len(sae.layers))
        shared = {
            "encoder": torch.cat([tensors[f"encoder.{i}.weight"] for i in layers], dim=1),
            "decoder": torch.cat([tensors[f"decoder.{i}.weight"].T for i in layers], dim=1),
        }
    else:
        inner = _prefix(sae.selector)
        shared = {
            "encoder": tensors[f"{inner}encoder.weight"],
            "decoder": tensors[f"{inner}decoder.weight"].T.contiguous(),
            "pre_bias": tensors[f"{inner}pre_bias"],
        }
    latent = {name: tensors[_prefix(sae.selector) + name] for name in LATENT_KEYS[sae.coder]}
    converted = {f"coder.{name}": tensor for name, tensor in (shared | latent).items()}
    if sae.selector == "route":
        converted["selector.router"] = tensors["router.weight"]
    return converted
