"""The schedule at its corners, and the optimiser."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from routesae_cache.optim import BETAS, build_optimizer, lr_factor, set_lr


def test_schedule_at_its_corners() -> None:
    total = 200
    factors = [lr_factor(step, total) for step in range(total + 1)]
    assert factors[0] == pytest.approx(1 / 10)
    assert factors[8] == pytest.approx(9 / 10)
    assert factors[9:161] == [1.0] * 152
    assert factors[161] == pytest.approx(39 / 40)
    assert factors[199] == pytest.approx(1 / 40)
    assert factors[200] == 0.0


def test_schedule_is_linear_in_both_slopes() -> None:
    factors = torch.tensor([lr_factor(step, 1000) for step in range(1001)], dtype=torch.float64)
    rises, falls = factors[:50].diff(), factors[800:].diff()
    torch.testing.assert_close(rises, torch.full_like(rises, 1 / 50))
    torch.testing.assert_close(falls, torch.full_like(falls, -1 / 200))


@pytest.mark.parametrize("total", [1, 2, 3, 7])
def test_short_runs_still_move(total: int) -> None:
    assert all(0 < lr_factor(step, total) <= 1 for step in range(total))


def test_optimizer_is_adam_with_the_papers_numbers() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = build_optimizer([parameter])
    reference = nn.Parameter(torch.zeros(3))
    plain = torch.optim.Adam([reference], lr=5e-4, betas=BETAS)
    for step in range(3):
        for p, o in ((parameter, optimizer), (reference, plain)):
            p.grad = torch.tensor([1.0, -2.0, 0.5 * step])
            o.step()
    torch.testing.assert_close(parameter, reference)
    assert optimizer.defaults["betas"] == (0.9, 0.999)


def test_set_lr() -> None:
    optimizer = build_optimizer([nn.Parameter(torch.zeros(1))])
    set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25]
