"""The sparse kernels against dense float64 references: forward and every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from routesae_cache import kernels
from routesae_cache.kernels import Support, row_support

M, D, F = 37, 12, 29
CASES = {"ordinary": 5, "k=1": 1, "k=F": F}


def tensors(dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"x": (M, D), "pre_bias": (D,), "encoder": (F, D), "latent_bias": (F,)}
    shapes |= {"decoder": (F, D)}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in shapes.items()
    }


def leaves(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone().requires_grad_() for name, value in values.items()}


def sparse_step(p: dict[str, Tensor], k: int) -> Tensor:
    centred_MD = (p["x"] - p["pre_bias"]).detach()
    index_MK, value_MK = kernels.select_topk(centred_MD, p["encoder"], p["latent_bias"], k)
    support = row_support(index_MK, F)
    value_P = kernels.chosen_values(
        p["x"],
        p["pre_bias"],
        p["encoder"],
        p["latent_bias"],
        centred_MD=centred_MD,
        value_P=value_MK.reshape(-1),
        support=support,
    )
    return kernels.sparse_decode(value_P, p["decoder"], p["pre_bias"], support)


def dense_step(p: dict[str, Tensor], k: int) -> Tensor:
    pre_MF = (p["x"] - p["pre_bias"]) @ p["encoder"].T + p["latent_bias"]
    top = pre_MF.topk(k, dim=-1)
    value_MF = torch.zeros_like(pre_MF).scatter(1, top.indices, top.values)
    return value_MF @ p["decoder"] + p["pre_bias"]


def backward(decoded_MD: Tensor) -> None:
    weight_MD = torch.randn(
        decoded_MD.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64
    )
    (decoded_MD.double() * weight_MD).sum().backward()


def assert_same_step(values: dict[str, Tensor], k: int) -> None:
    sparse, dense = leaves(values), leaves(values)
    decoded, expected = sparse_step(sparse, k), dense_step(dense, k)
    torch.testing.assert_close(decoded, expected, rtol=1e-11, atol=1e-11)
    backward(decoded)
    backward(expected)
    for name in values:
        torch.testing.assert_close(
            sparse[name].grad, dense[name].grad, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize("k", CASES.values(), ids=CASES.keys())
def test_step_equals_the_dense_step(k: int) -> None:
    assert_same_step(tensors(), k)


def test_latents_that_never_fire_get_no_gradient() -> None:
    values = tensors()
    values["latent_bias"][::2] = -1e3
    assert_same_step(values, 3)
    sparse = leaves(values)
    backward(sparse_step(sparse, 3))
    grad = sparse["encoder"].grad
    assert grad is not None
    assert not grad[::2].any()


def test_non_contiguous_tensors() -> None:
    values = tensors()
    values["x"] = values["x"].repeat(1, 2)[:, ::2]
    values["x"] = values["x"].T.contiguous().T
    assert not values["x"].is_contiguous()
    index_MK, value_MK = kernels.select_topk(
        values["x"], values["encoder"], values["latent_bias"], 4
    )
    support = row_support(index_MK, F)
    value_P = value_MK.reshape(-1).clone().requires_grad_()
    decoded = kernels.sparse_decode(value_P, values["decoder"], None, support)
    decoded.T.contiguous().T.backward(torch.ones(D, M, dtype=torch.float64).T)
    expected = values["decoder"].sum(-1)[support.index_P]
    torch.testing.assert_close(value_P.grad, expected)


def test_ties_are_broken_but_every_choice_is_a_top_k() -> None:
    """Equal pre-activations: which of them is taken is free, the values are not."""
    values = tensors()
    values["encoder"][1::3] = values["encoder"][0]
    values["latent_bias"][1::3] = values["latent_bias"][0]
    top = kernels.select_topk(values["x"], values["encoder"], values["latent_bias"], 6)
    pre_MF = values["x"] @ values["encoder"].T + values["latent_bias"]
    torch.testing.assert_close(
        top.value_MK.sort(dim=-1, descending=True).values, pre_MF.topk(6).values
    )
    torch.testing.assert_close(pre_MF.gather(1, top.index_MK), top.value_MK)
    assert (top.index_MK.sort(dim=-1).values.diff(dim=-1) > 0).all(), "no latent twice"


def test_input_gradient_is_computed_only_where_asked_for() -> None:
    values = tensors()
    p = leaves(values) | {"x": values["x"]}
    backward(sparse_step(p, 4))
    full = leaves(values)
    backward(sparse_step(full, 4))
    assert p["x"].grad is None
    for name in ("pre_bias", "encoder", "latent_bias", "decoder"):
        torch.testing.assert_close(p[name].grad, full[name].grad, rtol=1e-11, atol=1e-11)


def test_gradcheck() -> None:
    p = leaves(tensors())
    index_MK, value_MK = kernels.select_topk(
        (p["x"] - p["pre_bias"]).detach(), p["encoder"], p["latent_bias"], 3
    )
    support = row_support(index_MK, F)

    def decode(value_P: Tensor, decoder_FD: Tensor, bias_D: Tensor) -> Tensor:
        return kernels.sparse_decode(value_P, decoder_FD, bias_D, support)

    value_P = value_MK.reshape(-1).requires_grad_()
    assert torch.autograd.gradcheck(decode, (value_P, p["decoder"], p["pre_bias"]))


def test_float32_step_is_close_to_float64() -> None:
    exact, single = leaves(tensors()), leaves(tensors(torch.float32))
    backward(dense_step(exact, 5))
    backward(sparse_step(single, 5))
    for name in exact:
        grad = exact[name].grad
        assert grad is not None
        torch.testing.assert_close(single[name].grad, grad.float(), rtol=1e-4, atol=1e-4)


def test_ragged_rows_and_finer_bags() -> None:
    """Rows of 0, 1 and several pairs, decoded per row and per (row, group)."""
    row_P = torch.tensor([0, 0, 0, 2, 4, 4])
    index_P = torch.tensor([1, 7, 20, 7, 0, 28])
    support = Support(row_P, index_P, rows=6, latents=F)
    value_P = torch.arange(1.0, 7.0, dtype=torch.float64).requires_grad_()
    decoder_FD = tensors()["decoder"].requires_grad_()
    dense_MF = torch.zeros(6, F, dtype=torch.float64).index_put((row_P, index_P), value_P)
    expected = dense_MF @ decoder_FD
    decoded = kernels.sparse_decode(value_P, decoder_FD, None, support)
    torch.testing.assert_close(decoded, expected)
    bags = support.regrouped(row_P * 2 + (index_P >= 10), 12)
    halves = kernels.sparse_decode(value_P, decoder_FD, None, bags).view(6, 2, D)
    torch.testing.assert_close(halves[:, 0], dense_MF[:, :10] @ decoder_FD[:10])
    torch.testing.assert_close(halves.sum(1), expected)
    weight = torch.randn(6, 2, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grads = torch.autograd.grad((halves * weight).sum(), (value_P, decoder_FD))
    split_MGD = torch.stack(
        [dense_MF[:, :10] @ decoder_FD[:10], dense_MF[:, 10:] @ decoder_FD[10:]], dim=1
    )
    wanted = torch.autograd.grad((split_MGD * weight).sum(), (value_P, decoder_FD))
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want)


def test_batchtopk_takes_the_largest_of_the_batch() -> None:
    values = tensors()
    row_P, index_P, value_P = kernels.select_batchtopk(
        values["x"], values["encoder"], values["latent_bias"], 3
    )
    pre_MF = values["x"] @ values["encoder"].T + values["latent_bias"]
    wanted = pre_MF.flatten().topk(3 * M).values
    torch.testing.assert_close(value_P.sort(descending=True).values, wanted)
    torch.testing.assert_close(pre_MF[row_P, index_P], value_P)
    assert ((row_P * F + index_P).diff() > 0).all()


def test_chunks_do_not_change_the_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    values = tensors()
    arguments = (values["x"], values["encoder"], values["latent_bias"], 4)
    whole, pairs = kernels.select_topk(*arguments), kernels.select_batchtopk(*arguments)
    monkeypatch.setattr(kernels, "CHUNK_ELEMENTS", 5 * F)
    assert torch.equal(kernels.select_topk(*arguments).index_MK, whole.index_MK)
    assert torch.equal(kernels.select_batchtopk(*arguments).index_P, pairs.index_P)


@pytest.mark.parametrize("rule", ["topk", "batchtopk"])
def test_bfloat16_selection_is_nearly_the_exact_one(rule: str) -> None:
    """Chosen values are exact to float32; a latent is missed only if it is within 1% of the
    row's largest pre-activation of the smallest one taken."""
    generator = torch.Generator().manual_seed(0)
    x_MD = torch.randn(200, 64, generator=generator)
    encoder_FD = torch.randn(512, 64, generator=generator) / 8
    bias_F = 0.1 * torch.randn(512, generator=generator)
    pre_MF = x_MD @ encoder_FD.T + bias_F
    if rule == "topk":
        low = kernels.select_topk(x_MD, encoder_FD, bias_F, 16, "bfloat16")
        row_P, index_P = torch.arange(200).repeat_interleave(16), low.index_MK.flatten()
        value_P = low.value_MK.flatten()
        smallest_M = pre_MF.topk(16).values[:, -1]
    else:
        row_P, index_P, value_P = kernels.select_batchtopk(x_MD, encoder_FD, bias_F, 16, "bfloat16")
        smallest_M = pre_MF.flatten().topk(200 * 16).values[-1].expand(200)
    torch.testing.assert_close(value_P, pre_MF[row_P, index_P], rtol=1e-5, atol=1e-5)
    slack_M = 0.01 * pre_MF.amax(dim=-1)
    assert (value_P >= (smallest_M - slack_M)[row_P]).all()
    exact = (value_P >= smallest_M[row_P]).float().mean()
    assert 0.96 < exact < 1, "bfloat16 was used, and it hardly matters"
