"""Residuals to compare reconstructions on, and what an SAE makes of them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from routesae_cache.batches import first_tokens
from routesae_cache.checkpoint import RunConfig
from routesae_cache.losses import normalise_token
from routesae_cache.saes.sae import Sae
from stores.places import Where, as_place
from stores.reader import StoreReader
from stores.spec import Split

_INACTIVE, _NOISE = 0.97, 0.3  # of made-up residuals: share of latents, size beside the rest


class Activations(NamedTuple):
    """Residuals of the layers that an SAE reads."""

    x_NLD: Tensor
    """As the model has them."""
    origin: str


class Normalised(NamedTuple):
    """What the SAE sees of residuals, and what undoes it: x = normalised · unit + mean."""

    x: Tensor
    mean: Tensor
    unit: Tensor


def normalise(config: RunConfig, x: Tensor) -> Normalised:
    """Residuals (..., D) as the run's `--norm` has them."""
    if config.sae.norm == "token":
        return Normalised(*normalise_token(x))
    factor = math.sqrt(config.mean_square) if config.sae.norm == "scalar" else 1.0
    unit = torch.full_like(x[..., :1], factor)
    return Normalised(x / unit, torch.zeros_like(unit), unit)


def gather(config: RunConfig, sae: Sae, store: Where | None, tokens: int) -> Activations:
    """Tokens of a store, or made-up ones where there is no store.

    Args:
        store: None: the one that the run was trained on, if it is still there.

    Raises:
        ValueError: if the store holds another model's residuals or lacks a layer.
    """
    place = as_place(store or config.store)
    if store is None and not place.exists():
        return Activations(made_up(config, sae, tokens), "made-up residuals")
    reader = StoreReader(place)
    if (reader.spec.model, reader.spec.width) != (config.store_spec["model"], config.width):
        raise ValueError(
            f"{place} holds residuals of another model than {config.name} was trained on; "
            "name one of the same model with --store"
        )
    split: Split = "eval" if reader.spec.eval_rows else "train"
    x_NLD = first_tokens(reader, config.sae.layers, split, tokens, norm="none", seed=config.seed)
    return Activations(x_NLD, f"the {split} split of {place.name}")


@torch.no_grad()
def made_up(config: RunConfig, sae: Sae, tokens: int) -> Tensor:
    """Residuals (N, L, D) in which some latents are active: directions, the bias and noise."""
    generator = torch.Generator().manual_seed(config.seed)
    decoder_FD, bias_D = sae.coder.decoder, sae.coder.pre_bias
    assert bias_D is not None
    layers = []
    for _ in config.sae.layers:
        value_NF = torch.rand(tokens, len(decoder_FD), generator=generator)
        sum_ND = (value_NF - _INACTIVE).clamp_min(0) / (1 - _INACTIVE) @ decoder_FD + bias_D
        noise_ND = torch.randn(sum_ND.shape, generator=generator)
        layers.append(sum_ND + noise_ND * sum_ND.std() * _NOISE)
    x_NLD = torch.stack(layers, dim=1)
    return x_NLD * (math.sqrt(config.mean_square) / x_NLD.square().mean().sqrt())
