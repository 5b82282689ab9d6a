"""Normalisation and losses against their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from routesae_cache import losses


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def test_token_normalisation_and_its_inverse() -> None:
    x_NLD = random(5, 3, 16) * 7 + 2
    normalised = losses.normalise_token(x_NLD)
    mean = x_NLD.sum(-1, keepdim=True) / 16
    std = (((x_NLD - mean) ** 2).sum(-1, keepdim=True) / 15).sqrt() + 1e-6
    torch.testing.assert_close(normalised.x, (x_NLD - mean) / std)
    undone = losses.denormalise_token(normalised.x, normalised.mean, normalised.std)
    torch.testing.assert_close(undone, x_NLD)


def test_a_constant_residual_does_not_divide_by_zero() -> None:
    assert losses.normalise_token(torch.full((2, 8), 3.0)).x.isfinite().all()


def test_scalar_normalisation_and_its_inverse() -> None:
    x_ND = random(50, 16) * 7
    scaled = losses.normalise_scalar(x_ND, x_ND.square().mean().item())
    torch.testing.assert_close(scaled.square().mean(), torch.ones((), dtype=torch.float64))
    undone = losses.denormalise_scalar(scaled, x_ND.square().mean().item())
    torch.testing.assert_close(undone, x_ND)


def test_nmse_and_its_gradients() -> None:
    decoded, target = random(6, 9).requires_grad_(), random(6, 9, seed=1).requires_grad_()
    expected = ((decoded - target) ** 2).mean(-1) / (target**2).mean(-1)
    torch.testing.assert_close(losses.nmse(decoded, target), expected)
    assert torch.autograd.gradcheck(losses.nmse, (decoded, target))


def test_nmse_does_not_change_with_the_scale() -> None:
    decoded, target = random(6, 9), random(6, 9, seed=1)
    torch.testing.assert_close(
        losses.nmse(decoded * 3.7, target * 3.7), losses.nmse(decoded, target)
    )


def test_nmse_of_a_zero_target_is_finite() -> None:
    assert losses.nmse(torch.zeros(1, 4), torch.zeros(1, 4)).item() == 0.0


def test_jumprelu_and_its_pseudo_derivatives() -> None:
    """One latent, θ=0.5, ε=0.2: of the four vectors two lie in the kernel, two above θ."""
    pre = torch.tensor([[0.3], [0.45], [0.55], [0.9]], requires_grad=True)
    threshold = torch.tensor([0.5], requires_grad=True)
    value, l0 = losses.jumprelu_and_l0(pre, threshold, 0.2)
    assert value.flatten().tolist() == pytest.approx([0, 0, 0.55, 0.9])
    assert l0.item() == 0.5
    weight = torch.tensor([[1.0], [2.0], [4.0], [8.0]])
    (grad_pre, grad_threshold) = torch.autograd.grad(
        (value * weight).sum(), (pre, threshold), retain_graph=True
    )
    assert grad_pre.flatten().tolist() == [0, 0, 4, 8]
    assert grad_threshold.item() == pytest.approx(-0.5 / 0.2 * (2 + 4))
    grad_pre, grad_threshold = torch.autograd.grad(l0, (pre, threshold))
    assert not grad_pre.any()
    assert grad_threshold.item() == pytest.approx(-1 / 0.2 * 2 / 4)


def test_score_term_has_no_value_and_the_gradient_of_the_expectation() -> None:
    """Averaged over many samples it is the gradient of Σ p_ℓ nmse_ℓ."""
    nmse_L = torch.tensor([0.2, 0.5, 0.9])
    logits_L = torch.tensor([0.3, -0.2, 0.1], requires_grad=True)
    p_L = torch.softmax(logits_L, 0)
    generator = torch.Generator().manual_seed(0)
    choice_M = torch.multinomial(p_L.detach(), 200_000, replacement=True, generator=generator)
    nmse_M = nmse_L[choice_M]
    term = losses.score_term(nmse_M, p_L.log()[choice_M], nmse_M.mean())
    assert term.item() == 0.0
    (sampled,) = torch.autograd.grad(term, logits_L, retain_graph=True)
    (exact,) = torch.autograd.grad((p_L * nmse_L).sum(), logits_L)
    torch.testing.assert_close(sampled, exact, rtol=0, atol=2e-3)


def test_geometric_median() -> None:
    cluster = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.5, 0.5]])
    outlier = torch.tensor([[1e6, 1e6]])
    median = losses.geometric_median(torch.cat([cluster, outlier]), iterations=1000)
    assert (median - 0.5).abs().max() < 0.5
    line = torch.tensor([[0.0], [1.0], [10.0]])
    torch.testing.assert_close(
        losses.geometric_median(line, iterations=5000, tolerance=1e-9),
        torch.tensor([1.0]),
        rtol=0,
        atol=0.01,
    )
