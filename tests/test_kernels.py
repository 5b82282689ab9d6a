"""The sparse kernels against dense float64 references: forward and every gradient."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from routesae_cache import kernels
from routesae_cache.kernels import Support
from routesae_cache.selection import select_topk

M, D, F = 37, 12, 29


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
    support, value_P = select_topk(centred_MD, p["encoder"], p["latent_bias"], k)
    value_P = kernels.chosen_values(
        p["x"],
        p["pre_bias"],
        p["encoder"],
        p["latent_bias"],
        centred_MD=centred_MD,
        value_P=value_P,
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


@pytest.mark.parametrize("k", [1, 5, F])
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
    support, value_P = select_topk(values["x"], values["encoder"], values["latent_bias"], 4)
    value_P.requires_grad_()
    decoded = kernels.sparse_decode(value_P, values["decoder"], None, support)
    decoded.T.contiguous().T.backward(torch.ones(D, M, dtype=torch.float64).T)
    expected = values["decoder"].sum(-1)[support.index_P]
    torch.testing.assert_close(value_P.grad, expected)


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
    support, value_P = select_topk(
        (p["x"] - p["pre_bias"]).detach(), p["encoder"], p["latent_bias"], 3
    )

    def decode(value_P: Tensor, decoder_FD: Tensor, bias_D: Tensor) -> Tensor:
        return kernels.sparse_decode(value_P, decoder_FD, bias_D, support)

    value_P.requires_grad_()
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_of_any_layout(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(M, 3, 2 * D, generator=generator).to(dtype)[:, 1]
    right = torch.randn(F, 2 * D, generator=generator).to(dtype)
    bias = torch.randn(F, generator=generator).to(dtype)
    layouts = {
        "rows of a larger tensor": (left, right),
        "columns of a larger tensor": (left[:, ::2], right[:, ::2]),
        "transposed": (left.t().contiguous().t(), right.t().contiguous().t()),
    }
    for a, b in layouts.values():
        expected = (a.double() @ b.double().T).to(dtype)
        torch.testing.assert_close(kernels.product(a, b), expected, rtol=1e-4, atol=1e-4)
        biased = kernels.product(a, b, bias)
        torch.testing.assert_close(biased, expected + bias, rtol=1e-4, atol=1e-4)


class RightOperands(TorchDispatchMode):
    """Notes whether the weights of every oneDNN product are without gaps."""

    def __init__(self) -> None:
        super().__init__()
        self.dense: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.mkldnn._linear_pointwise.default:
            self.dense.append(args[1].is_contiguous() or args[1].t().is_contiguous())
        return func(*args, **(kwargs or {}))


def test_products_never_give_onednn_weights_with_gaps() -> None:
    x = torch.randn(M, 3, D)[:, 1]
    g = torch.randn(M, F)
    with RightOperands() as seen:
        kernels.product(g.t(), x.t())
        kernels.product(torch.randn(M, D), torch.randn(F, 2 * D)[:, :D])
    assert seen.dense == [True, True] or not kernels._HAS_ONEDNN


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_linear_and_dense_decode_gradients(centred: bool, biased: bool) -> None:
    p = leaves(tensors())

    def autoencode(
        x_MD: Tensor, encoder_FD: Tensor, decoder_FD: Tensor, centre_D: Tensor, bias_F: Tensor
    ) -> Tensor:
        centre, bias = centre_D if centred else None, bias_F if biased else None
        z_MF = kernels.linear(x_MD, centre, encoder_FD, bias)
        return kernels.dense_decode(torch.tanh(z_MF), decoder_FD, centre)

    arguments = (p["x"], p["encoder"], p["decoder"], p["pre_bias"], p["latent_bias"])
    assert torch.autograd.gradcheck(autoencode, arguments)


def test_a_centre_costs_no_input_gradient() -> None:
    values = tensors()
    p = leaves(values) | {"x": values["x"]}
    kernels.linear(p["x"], p["pre_bias"], p["encoder"], p["latent_bias"]).square().sum().backward()
    q = leaves(values)
    ((q["x"] - q["pre_bias"]) @ q["encoder"].T + q["latent_bias"]).square().sum().backward()
    assert p["x"].grad is None
    for name in ("pre_bias", "encoder", "latent_bias"):
        torch.testing.assert_close(p[name].grad, q[name].grad)


def test_pair_primitives_against_dense_ones() -> None:
    values = tensors()
    support, weight_P = select_topk(values["x"], values["encoder"], values["latent_bias"], 4)
    weight_MF = torch.zeros(M, F, dtype=torch.float64)
    weight_MF[support.row_P, support.index_P] = weight_P
    dots_MF = values["x"] @ values["decoder"].T
    torch.testing.assert_close(
        kernels.pair_dots(values["x"], values["decoder"], support),
        dots_MF[support.row_P, support.index_P],
    )
    torch.testing.assert_close(
        kernels.weighted_rows(values["decoder"], support.index_P, weight_P, support.offsets_M),
        weight_MF @ values["decoder"],
    )
    torch.testing.assert_close(
        kernels.transposed_rows(values["x"], weight_P, support), weight_MF.T @ values["x"]
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_step_equals_the_cpu_step() -> None:
    cpu, cuda = leaves(tensors()), leaves({n: v.cuda() for n, v in tensors().items()})
    weight_MD = torch.randn(M, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    sparse_step(cpu, 4).backward(weight_MD)
    sparse_step(cuda, 4).backward(weight_MD.cuda())
    for name in cpu:
        grad = cuda[name].grad
        assert grad is not None
        torch.testing.assert_close(grad.cpu(), cpu[name].grad)


def test_keeping_freed_memory_is_harmless() -> None:
    script = (
        "import torch; from routesae_cache.kernels import keep_freed_memory; keep_freed_memory();"
        "print(int(sum(torch.ones(3_000_000).sum().item() for _ in range(4))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "12000000"
