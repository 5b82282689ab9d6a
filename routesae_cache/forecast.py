"""What an experiment will take on this machine, before anything is downloaded or computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from routesae_cache.devices import resolve_device
from routesae_cache.estimate import forward_seconds, multiply_adds_per_second
from routesae_cache.layers import default_layer, parse_layers
from routesae_cache.lm import block_parameters, model_shape
from routesae_cache.packing import step_latents
from routesae_cache.presets import MODELS
from routesae_cache.saes.config import SaeConfig
from routesae_cache.saes.registry import SaeSpec
from routesae_cache.sources import resolve_model
from stores.codecs import ResidualCodec


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Estimates for an experiment that has not begun."""

    store_bytes: int
    harvest_seconds: float
    train_seconds: float
    saes: int


def forecast(
    *,
    model: str,
    tokens: int,
    eval_tokens: int,
    layers: str,
    context: int,
    codec: ResidualCodec,
    dtype: str,
    device: str,
    saes: Sequence[SaeSpec],
    epochs: int,
) -> Forecast:
    """Estimate disk and time; a preset's sizes are known, another model's configuration is read.

    Args:
        saes: as asked for; trained `epochs` times on `tokens`.

    Raises:
        ValueError: for a model or layers that cannot be, or SAEs that do not fit them.
    """
    device = resolve_device(device)
    blocks, width, parameters = _sizes(model)
    kept = parse_layers(layers, blocks)
    values = len(kept) * width
    bits = codec.estimated_bits(len(kept), width)
    per_token = forward_seconds(
        blocks=max(kept),
        block_parameters=parameters,
        context=context,
        width=width,
        device=device,
        dtype=dtype,
    )
    configs = [
        spec.config(store_layers=kept, auto_layer=default_layer(blocks), width=width)
        for spec in saes
    ]
    return Forecast(
        store_bytes=int((tokens + eval_tokens) * values * bits / 8),
        harvest_seconds=(tokens + eval_tokens) * per_token,
        train_seconds=tokens * epochs * training_seconds(configs, width=width, device=device),
        saes=len(configs),
    )


def training_seconds(saes: Sequence[SaeConfig], *, width: int, device: str) -> float:
    """Seconds a token of one pass that trains all of these SAEs."""
    products = sum(step_latents(sae) for sae in saes) * width
    return products / multiply_adds_per_second(device, "float32")


def _sizes(model: str) -> tuple[int, int, int]:
    """Blocks, width, and weights of a block."""
    if model in MODELS:
        preset = MODELS[model]
        return preset.n_layers, preset.width, preset.block_parameters
    source = resolve_model(model)
    shape = model_shape(source)
    return shape.n_layers, shape.width, block_parameters(source)
