"""Losses, each as published, and the normalisation of residuals that comes before them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

STD_EPS = 1e-6
ENERGY_EPS = 1e-12
"""Keeps an all-zero target from dividing by zero."""


class Normalised(NamedTuple):
    """Residuals after the per-token normalisation, and what undoes it."""

    x: Tensor
    """(..., D), mean 0 and standard deviation 1 over D."""
    mean: Tensor
    """(..., 1)."""
    std: Tensor
    """(..., 1), with the epsilon already added."""


def normalise_token(x: Tensor) -> Normalised:
    """(x − mean_D x) / (std_D x + 1e-6) per token and layer, as in the RouteSAE authors' code.

    Args:
        x: (..., D), D at least 2. The standard deviation has D − 1 in its denominator.
    """
    std, mean = torch.std_mean(x, dim=-1, keepdim=True)
    std = std + STD_EPS
    return Normalised((x - mean) / std, mean, std)


def denormalise_token(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Undo `normalise_token`."""
    return x * std + mean


def normalise_scalar(x: Tensor, mean_square: float) -> Tensor:
    """Divide by one factor for the data set, so that the mean square of an element becomes 1.

    Args:
        mean_square: of the elements, over the data set, from the store's statistics.
    """
    return x / math.sqrt(mean_square)


def denormalise_scalar(x: Tensor, mean_square: float) -> Tensor:
    """Undo `normalise_scalar`."""
    return x * math.sqrt(mean_square)


def nmse(reconstruction_MD: Tensor, target_MD: Tensor) -> Tensor:
    """mean_D (x̂ − x)² / mean_D x² of each vector, differentiable in both.

    Sums over vectors are left to the caller: add, count, divide once.
    """
    return cast(Tensor, _Nmse.apply(reconstruction_MD, target_MD))  # type: ignore[no-untyped-call]


class _Nmse(torch.autograd.Function):
    """One pass over (M, D) in each direction, where autograd alone makes six."""

    @staticmethod
    def forward(ctx: Any, reconstruction_MD: Tensor, target_MD: Tensor) -> Tensor:
        error_MD = reconstruction_MD - target_MD
        energy_M = torch.linalg.vecdot(target_MD, target_MD).clamp_min(ENERGY_EPS)
        nmse_M: Tensor = torch.linalg.vecdot(error_MD, error_MD) / energy_M
        ctx.save_for_backward(error_MD, energy_M, nmse_M, target_MD)
        return nmse_M

    @staticmethod
    def backward(ctx: Any, grad_M: Tensor) -> tuple[Tensor, Tensor | None]:
        error_MD, energy_M, nmse_M, target_MD = ctx.saved_tensors
        scale_M = 2 * grad_M / energy_M
        grad_MD = error_MD * scale_M[:, None]
        if not ctx.needs_input_grad[1]:
            return grad_MD, None
        return grad_MD, -(grad_MD + target_MD * (scale_M * nmse_M)[:, None])


def score_term(nmse_M: Tensor, log_probability_M: Tensor, baseline: Tensor) -> Tensor:
    """A term of value 0 whose gradient is that of the expected NMSE in the sampling distribution.

    The score function with the batch's mean as baseline (Williams 1992, REINFORCE): choices that
    did better than the average become more likely.

    Args:
        log_probability_M: of the sampled choice that led to each NMSE, differentiable.
        baseline: the batch's mean NMSE.
    """
    advantage_M = (nmse_M - baseline).detach()
    surrogate = (advantage_M * log_probability_M).mean()
    return surrogate - surrogate.detach()


def mean_l1(value_MF: Tensor) -> Tensor:
    """mean |z| over vectors and latents, for z ≥ 0 (RouteSAE's Vanilla, Gated and Crosscoder)."""
    return value_MF.mean()


class _JumpReluAndL0(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pre_MF: Tensor, threshold_F: Tensor, bandwidth: float
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(pre_MF, threshold_F)
        ctx.bandwidth = bandwidth
        above_MF = (pre_MF > threshold_F).to(pre_MF.dtype)
        return pre_MF * above_MF, above_MF.sum() / pre_MF.shape[0]

    @staticmethod
    def backward(ctx: Any, grad_MF: Tensor, grad_l0: Tensor) -> tuple[Tensor, Tensor, None]:
        pre_MF, threshold_F = ctx.saved_tensors
        near_MF = ((pre_MF - threshold_F).abs_() < ctx.bandwidth / 2).to(pre_MF.dtype)
        count_F = near_MF.sum(0)
        value_F = near_MF.mul_(grad_MF).sum(0)
        grad_threshold_F = threshold_F * value_F + count_F * grad_l0 / pre_MF.shape[0]
        return grad_MF * (pre_MF > threshold_F), -grad_threshold_F / ctx.bandwidth, None


def jumprelu_and_l0(pre_MF: Tensor, threshold_F: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
    """u · 1[u > θ], and the mean over vectors of the number of pre-activations u above θ.

    In θ both have the pseudo-derivatives of Rajamanoharan et al. 2024 ("Jumping Ahead", eqs. 11 and
    12) with the rectangle kernel K: −(θ/ε) K((u − θ)/ε) and −(1/ε) K((u − θ)/ε). The L0 has no
    gradient in u. It is taken from the pre-activations, where the RouteSAE authors take it from
    latents already cut at θ.

    Args:
        bandwidth: ε, the width of K.
    """
    value_MF, l0 = _JumpReluAndL0.apply(pre_MF, threshold_F, bandwidth)  # type: ignore[no-untyped-call]
    return value_MF, l0


def geometric_median(vectors_MD: Tensor, iterations: int = 100, tolerance: float = 1e-5) -> Tensor:
    """The point with the least summed distance to the vectors, by Weiszfeld's iteration.

    Args:
        tolerance: stop when a step moves by less than this share of the point's norm.
    """
    point_D = vectors_MD.mean(0)
    for _ in range(iterations):
        weight_M = 1 / (vectors_MD - point_D).norm(dim=-1).clamp_min(ENERGY_EPS)
        moved_D = weight_M @ vectors_MD / weight_M.sum()
        step, point_D = (moved_D - point_D).norm(), moved_D
        if step <= tolerance * point_D.norm():
            break
    return point_D
