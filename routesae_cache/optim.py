"""The optimiser and its learning-rate schedule."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

LEARNING_RATE = 5e-4
BETAS = (0.9, 0.999)
WARMUP_SHARE = 0.05
DECAY_SHARE = 0.2


def build_optimizer(
    parameters: Iterable[nn.Parameter], lr: float = LEARNING_RATE
) -> torch.optim.Adam:
    """Adam as in the RouteSAE paper, in its fused form where the device has one.

    Args:
        parameters: of one device.
        lr: the rate that `lr_factor` scales.
    """
    listed = list(parameters)
    fused = all(p.device.type in ("cpu", "cuda") for p in listed)
    return torch.optim.Adam(listed, lr=lr, betas=BETAS, fused=fused)


def lr_factor(step: int, total_steps: int) -> float:
    """Share of the learning rate: linear up over the first 5% of the steps, 1, linear to 0 over the
    last 20%.

    Args:
        step: steps already taken: 0 for the first one, which already moves; `total_steps` gives 0.
        total_steps: of the whole run.
    """
    assert 0 <= step <= total_steps
    warmup = max(1, int(total_steps * WARMUP_SHARE))
    decay = max(1, int(total_steps * DECAY_SHARE))
    return min(1.0, (step + 1) / warmup, (total_steps - step) / decay)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr
