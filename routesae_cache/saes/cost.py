"""What a training step of SAEs computes."""

from __future__ import annotations

from collections.abc import Sequence

from routesae_cache.saes.config import CoderKind, SaeConfig

_STEP_COST: dict[CoderKind, float] = {
    "topk": 1.0,
    "batchtopk": 1.5,
    "matryoshka": 1.5,
    "relu": 3.0,
    "gated": 4.5,
    "jumprelu": 3.5,
}
"""A training step in units of its encoder's product in float32."""


def step_latents(sae: SaeConfig) -> float:
    """Cost of a token in training: of a product of a residual with so many latents."""
    vectors = len(sae.layers) if sae.selector in ("every", "all") else 1
    return _STEP_COST[sae.coder] * sae.latents * vectors


def training_multiply_adds(saes: Sequence[SaeConfig], width: int) -> float:
    """For each token of a pass that trains all of these SAEs, in terms of plain products."""
    return sum(map(step_latents, saes)) * width


def matrix_weights(saes: Sequence[SaeConfig], width: int) -> int:
    """Weights of the encoders and decoders; biases and routers are small beside them."""
    return sum(
        2 * sae.latents * width * (len(sae.layers) if sae.selector == "all" else 1) for sae in saes
    )
