"""Exact top-k, over rows and over batches, and what bfloat16 does to it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from routesae_cache import selection
from routesae_cache.selection import batch_top, select_batchtopk, select_topk, top_k

ROWS = 40


def values(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def problem(width: int = 64, latents: int = 512, rows: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """Input, encoder and bias."""
    x_MD = values(rows, width)
    return x_MD, values(latents, width, seed=1) / 8, 0.1 * values(1, latents, seed=2)[0]


@pytest.mark.parametrize("columns", [1, 29, 64, 100, 512, 4608])
@pytest.mark.parametrize("k", [1, 2, 7, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_top_k_equals_torch(columns: int, k: int, dtype: torch.dtype) -> None:
    k = min(k, columns)
    value_MF = values(ROWS, columns).to(dtype)
    top = top_k(value_MF, k)
    ordered = top.values.sort(dim=-1, descending=True).values
    assert torch.equal(ordered, value_MF.topk(k).values)
    assert torch.equal(value_MF.gather(1, top.indices), top.values)
    assert all(row.unique().shape[0] == k for row in top.indices)


@pytest.mark.parametrize("levels", [1, 2, 5])
def test_top_k_with_ties(levels: int) -> None:
    """Which of equal values is taken is free; how many of each is not, and none is taken twice."""
    generator = torch.Generator().manual_seed(0)
    value_MF = torch.randint(levels, (ROWS, 256), generator=generator).float()
    top = top_k(value_MF, 16)
    assert torch.equal(top.values.sort(dim=-1, descending=True).values, value_MF.topk(16).values)
    assert all(row.unique().shape[0] == 16 for row in top.indices)


@pytest.mark.parametrize("columns", [1, 29, 512])
@pytest.mark.parametrize("share", [0.001, 0.05, 1.0])
def test_batch_top_equals_torch(columns: int, share: float) -> None:
    value_MF = values(ROWS, columns)
    count = max(1, int(share * value_MF.numel()))
    position_P = batch_top(value_MF, count)
    assert (position_P.diff() > 0).all()
    chosen = value_MF.view(-1)[position_P].sort(descending=True).values
    assert torch.equal(chosen, value_MF.view(-1).topk(count).values)


def test_batch_top_with_ties() -> None:
    value_MF = torch.zeros(ROWS, 64)
    value_MF[3, 5] = 1.0
    position_P = batch_top(value_MF, 100)
    assert position_P.unique().shape[0] == 100
    assert (position_P == 3 * 64 + 5).any()


def test_nan_reaches_the_chosen_values() -> None:
    """A diverged run must show as a non-finite loss, not as an error in the selection."""
    x_MD, encoder_FD, bias_F = problem()
    x_MD[0] = float("nan")
    assert select_topk(x_MD, encoder_FD, bias_F, 4).value_P.isnan().any()
    assert select_batchtopk(x_MD, encoder_FD, bias_F, 4).value_P.isnan().any()


def test_selected_values_are_the_pre_activations() -> None:
    x_MD, encoder_FD, bias_F = problem()
    pre_MF = x_MD @ encoder_FD.T + bias_F
    support, value_P = select_topk(x_MD, encoder_FD, bias_F, 16)
    torch.testing.assert_close(value_P, pre_MF[support.row_P, support.index_P])
    assert torch.equal(support.row_P.bincount(), torch.full((200,), 16))
    support, value_P = select_batchtopk(x_MD, encoder_FD, bias_F, 16)
    torch.testing.assert_close(value_P, pre_MF[support.row_P, support.index_P])
    assert ((support.row_P * 512 + support.index_P).diff() > 0).all()


def test_chunks_do_not_change_the_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    x_MD, encoder_FD, bias_F = (part.double() for part in problem())
    whole = select_topk(x_MD, encoder_FD, bias_F, 16)
    monkeypatch.setattr(selection, "CHUNK_ROWS", 7)
    parts = select_topk(x_MD, encoder_FD, bias_F, 16)
    assert torch.equal(parts.support.index_P, whole.support.index_P)


@pytest.mark.parametrize("select", [select_topk, select_batchtopk])
def test_bfloat16_selection_is_nearly_the_exact_one(select: selection.Select) -> None:
    """Chosen values are exact to float32; whatever was chosen instead of a true top-k latent is
    within 1% of the row's largest pre-activation of being one."""
    x_MD, encoder_FD, bias_F = problem()
    pre_MF = x_MD @ encoder_FD.T + bias_F
    support, value_P = select(x_MD, encoder_FD, bias_F, 16, "bfloat16")
    if select is select_topk:
        smallest_M = pre_MF.topk(16).values[:, -1]
    else:
        smallest_M = pre_MF.flatten().topk(200 * 16).values[-1].expand(200)
    row_P = support.row_P
    torch.testing.assert_close(value_P, pre_MF[row_P, support.index_P], rtol=1e-5, atol=1e-5)
    slack_M = 0.01 * pre_MF.amax(dim=-1)
    assert (value_P >= (smallest_M - slack_M)[row_P]).all()
    exact = (value_P >= smallest_M[row_P]).float().mean()
    assert 0.96 < exact < 1, "bfloat16 was used, and it hardly matters"
