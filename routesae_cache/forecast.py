"""What an experiment will take on this machine, before anything is downloaded or computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from routesae_cache.devices import resolve_device
from routesae_cache.estimate import forward_seconds, multiply_adds_per_second
from routesae_cache.layers import default_layer, parse_layers
from routesae_cache.lm import block_parameters, model_shape
from routesae_cache.presets import MODELS, ModelSizes
from routesae_cache.saes.cost import training_multiply_adds
from routesae_cache.saes.registry import SaeSpec
from routesae_cache.sources import ModelSource, resolve_model
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
    model: str | ModelSource,
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
    sizes = model_sizes(model)
    kept = parse_layers(layers, sizes.n_layers)
    values = len(kept) * sizes.width
    bits = codec.estimated_bits(len(kept), sizes.width)
    per_token = forward_seconds(
        sizes, blocks=max(kept), context=context, device=device, dtype=dtype
    )
    auto = default_layer(sizes.n_layers)
    configs = [spec.config(store_layers=kept, auto_layer=auto, width=sizes.width) for spec in saes]
    products = training_multiply_adds(configs, sizes.width) * tokens * epochs
    return Forecast(
        store_bytes=int((tokens + eval_tokens) * values * bits / 8),
        harvest_seconds=(tokens + eval_tokens) * per_token,
        train_seconds=products / multiply_adds_per_second(device, "float32"),
        saes=len(configs),
    )


def model_sizes(model: str | ModelSource) -> ModelSizes:
    """A preset's sizes; another model's from its configuration. ValueError where there is none."""
    if isinstance(model, str) and model in MODELS:
        return MODELS[model].sizes
    source = resolve_model(model)
    shape = model_shape(source)
    return ModelSizes(shape.n_layers, shape.width, block_parameters(source))
