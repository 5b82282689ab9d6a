"""The grid of architectures that the suites go over, and data for them."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from routesae_cache.optim import build_optimizer
from routesae_cache.saes import Sae, SaeConfig, build_sae

N, L, D, F, K = 24, 3, 10, 40, 4

SELECTORS: dict[str, dict[str, Any]] = {
    "fixed": {"selector": "fixed", "layers": (5,)},
    "route-factor": {"selector": "route"},
    "route-straight-through": {"selector": "route", "route_estimator": "straight-through"},
    "route-score": {"selector": "route", "route_estimator": "score"},
    "route-mean": {"selector": "route", "aggregate": "mean"},
    "route-soft": {"selector": "route", "hard": False},
    "random": {"selector": "random"},
    "every": {"selector": "every"},
}
CODERS: dict[str, dict[str, Any]] = {
    "relu": {"coder": "relu", "sparsity_weight": 0.3},
    "gated": {"coder": "gated", "sparsity_weight": 0.3},
    "gated-authors": {"coder": "gated", "sparsity_weight": 0.3, "gated_aux": "authors"},
    "topk": {"coder": "topk", "k": K},
    "batchtopk": {"coder": "batchtopk", "k": K},
    "jumprelu": {
        "coder": "jumprelu",
        "sparsity_weight": 0.01,
        "bandwidth": 0.4,
        "initial_threshold": 0.2,
    },
    "matryoshka": {"coder": "matryoshka", "k": K, "group_sizes": (6, 10, 24)},
}
CROSSCODERS: dict[str, dict[str, Any]] = {
    "crosscoder-relu": CODERS["relu"],
    "crosscoder-relu-norm": CODERS["relu"] | {"crosscoder_weighting": "decoder-norm"},
    "crosscoder-relu-unbiased": CODERS["relu"] | {"crosscoder_bias": False},
    "crosscoder-topk": CODERS["topk"],
    "crosscoder-batchtopk": CODERS["batchtopk"],
    "crosscoder-batchtopk-norm": CODERS["batchtopk"] | {"crosscoder_weighting": "decoder-norm"},
}
GRID: dict[str, dict[str, Any]] = {
    f"{s}+{c}": SELECTORS[s] | CODERS[c] for s in SELECTORS for c in CODERS
} | {name: {"selector": "all"} | options for name, options in CROSSCODERS.items()}


SAMPLED = re.compile("batch|matryoshka|random|score")
"""Architectures whose training differs from inference by design."""


def make_config(name: str, **changes: Any) -> SaeConfig:
    return SaeConfig(**({"layers": (2, 3, 5), "latents": F} | GRID[name] | changes))


def make_sae(name: str, seed: int = 0, **changes: Any) -> Sae:
    return build_sae(make_config(name, **changes), D, seed)


def sparse_data(config: SaeConfig, tokens: int, seed: int = 1) -> Tensor:
    """Tokens that are sparse mixtures of fixed directions, slightly different in every layer."""
    generator = torch.Generator().manual_seed(7)
    directions_AD = torch.randn(30, D, generator=generator)
    generator.manual_seed(seed)
    shape = (tokens, len(config.layers), 30)
    code_NLA = torch.rand(shape, generator=generator) * (
        torch.rand(tokens, 1, 30, generator=generator) < 0.1
    )
    noise_NLD = 0.3 * torch.randn(tokens, len(config.layers), D, generator=generator)
    return code_NLA @ directions_AD * 2 + noise_NLD


def randomise(sae: Sae) -> None:
    """Move every parameter off its special starting value, so that no gradient is trivially 0."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in sae.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(0.05 * noise)


def train(sae: Sae, steps: int) -> list[float]:
    optimizer = build_optimizer(sae.parameters(), lr=5e-3)
    losses = []
    for step in range(1, steps + 1):
        out = sae(sparse_data(sae.config, 64, seed=step))
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        sae.after_step(step)
        losses.append(out.loss.item())
    return losses
