"""What a model's forward pass takes."""

from __future__ import annotations

import time

import torch

from routesae_cache.presets import ModelSizes

FORWARD_EFFICIENCY = 0.45
"""Of a plain matrix product's rate on a CPU, measured on the default model."""


def forward_multiply_adds(sizes: ModelSizes, *, blocks: int, context: int) -> int:
    """For each token of a forward pass cut after so many blocks.

    One for every weight of a block, and 2 T D for the scores and the mixture of its attention,
    masked pairs included. The embedding is looked up, the head is not run.
    """
    return blocks * (sizes.block_parameters + 2 * context * sizes.width)


def forward_seconds(
    sizes: ModelSizes, *, blocks: int, context: int, device: str, dtype: str
) -> float:
    """Seconds a token of a forward pass cut after so many blocks.

    Multiply-adds of the blocks, at the rate of a matrix product measured just now.
    """
    multiply_adds = forward_multiply_adds(sizes, blocks=blocks, context=context)
    return multiply_adds / (multiply_adds_per_second(device, dtype) * FORWARD_EFFICIENCY)


def multiply_adds_per_second(device: str, dtype: str) -> float:
    """Rate of a matrix product, measured for a tenth of a second."""
    a = torch.ones(1024, 1024, dtype=getattr(torch, dtype), device=device)
    (a @ a).sum().item()
    start, products = time.perf_counter(), 0
    while time.perf_counter() - start < 0.1:
        (a @ a).sum().item()
        products += 1
    return products * 1024**3 / (time.perf_counter() - start)
