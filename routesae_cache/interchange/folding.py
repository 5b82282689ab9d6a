"""A coder with a constant factor on its input folded into its weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from routesae_cache.checkpoint import RunConfig
from routesae_cache.saes.sae import Sae

_SHARED = ("encoder", "decoder", "pre_bias")


@dataclass(frozen=True, kw_only=True)
class FoldedCoder:
    """z from `encoder_FD (x − bias_D)` and what belongs to each latent; x̂ = `decoder_FD`ᵀ z +
    `bias_D`. The latents z are the coder's own, unscaled."""

    encoder_FD: Tensor
    decoder_FD: Tensor
    bias_D: Tensor
    latent: dict[str, Tensor]
    """What each latent has, (F,), by this project's names: biases, thresholds, …"""


@torch.no_grad()
def fold(sae: Sae, scale: float) -> FoldedCoder:
    """The coder that reads x as `sae.coder` reads scale · x, its reconstruction divided by scale.

    W_e (s x − b) = s W_e (x − b/s) and (W_d z + b)/s = (W_d/s) z + b/s, so nothing is lost.
    """
    state: dict[str, Tensor] = {n: t.detach().cpu() for n, t in sae.coder.state_dict().items()}
    latents = state["encoder"].shape[0]
    assert state["encoder"].shape[1] == sae.width
    return FoldedCoder(
        encoder_FD=state["encoder"] * scale,
        decoder_FD=state["decoder"] / scale,
        bias_D=state["pre_bias"] / scale,
        latent={
            name: tensor.expand(latents).clone()
            for name, tensor in state.items()
            if name not in _SHARED and tensor.is_floating_point()
        },
    )


def input_scale(config: RunConfig) -> float:
    """The constant factor between the residual, or what `--norm token` makes of it, and the coder's
    input; the router's factor p is none and counts as 1."""
    return 1 / math.sqrt(config.mean_square) if config.sae.norm == "scalar" else 1.0
