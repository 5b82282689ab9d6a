"""How long computing will take here."""

from __future__ import annotations

import time

import torch

_FORWARD_EFFICIENCY = 0.45  # of a plain matrix product's rate, measured on the default model


def forward_seconds(
    *, blocks: int, block_parameters: int, context: int, width: int, device: str, dtype: str
) -> float:
    """Seconds a token of a forward pass cut after so many blocks.

    Multiply-adds of the blocks, at the rate of a matrix product measured just now.
    """
    multiply_adds = blocks * (block_parameters + 2 * context * width)
    return multiply_adds / (multiply_adds_per_second(device, dtype) * _FORWARD_EFFICIENCY)


def multiply_adds_per_second(device: str, dtype: str) -> float:
    """Rate of a matrix product, measured for a tenth of a second."""
    a = torch.ones(1024, 1024, dtype=getattr(torch, dtype), device=device)
    (a @ a).sum().item()
    start, products = time.perf_counter(), 0
    while time.perf_counter() - start < 0.1:
        (a @ a).sum().item()
        products += 1
    return products * 1024**3 / (time.perf_counter() - start)
