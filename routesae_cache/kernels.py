"""The fast paths: matrix products, and sparse encode and decode with hand-written backward.

A TopK step needs the encoder's product in full to know which latents are active. Everything after
it (decode, both weight gradients, the gradient of the values, the bias gradients) involves the
active (row, latent) pairs alone, and is expressed with three primitives over those pairs:

- a weighted sum of table rows per bag (`weighted_rows`): decode, and the gradient to the input;
- a dot product per pair (`pair_dots`): the gradient of the values;
- the weighted sum over pairs grouped by latent (`transposed_rows`): both weight gradients.

The pairs are sorted by latent once a step; the last two walk them in that order, which reads each
row of a weight matrix once.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
import warnings
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(  # type: ignore[no-untyped-call]
    torch.ops.mkldnn, "_linear_pointwise"
)
_HAS_ONEDNN_BFLOAT16 = _HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()
_ONEDNN = {torch.float32: _HAS_ONEDNN, torch.bfloat16: _HAS_ONEDNN_BFLOAT16}
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Make the C library keep large freed blocks for the next allocation, where it is glibc.

    By default every tensor of a few tens of MB is mapped afresh, and the kernel zeroes it page by
    page: at D=2048, F=16384 that costs more than the sparse gradients themselves. It holds for the
    whole process, and memory stays at its peak until the process ends; so the training command
    calls it, the library does not.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(_M_MMAP_MAX, 0)
            libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def product(left_MD: Tensor, right_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """left @ right.T (+ bias), without gradients; any strides.

    On a CPU through oneDNN: in float32 about twice as fast as PyTorch's default (MKL) on processors
    that are not Intel's, and as fast on those; in bfloat16 a tenth faster.
    """
    if left_MD.device.type == "cpu" and _ONEDNN.get(left_MD.dtype, False):
        if not (right_FD.is_contiguous() or right_FD.t().is_contiguous()):
            right_FD = right_FD.contiguous()  # with gaps it would be a thousand times slower
        out = torch.ops.mkldnn._linear_pointwise(left_MD, right_FD, bias_F, "none", [], "")
        return cast(Tensor, out)
    return F.linear(left_MD, right_FD, bias_F)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_MD: Tensor,
        centre_D: Tensor | None,
        weight_FD: Tensor,
        bias_F: Tensor | None,
    ) -> Tensor:
        centred_MD = x_MD if centre_D is None else x_MD - centre_D
        ctx.save_for_backward(centred_MD, weight_FD)
        return product(centred_MD, weight_FD, bias_F)

    @staticmethod
    def backward(ctx: Any, grad_MF: Tensor) -> tuple[Tensor | None, ...]:
        centred_MD, weight_FD = ctx.saved_tensors
        needs_x, needs_centre, needs_weight, needs_bias = ctx.needs_input_grad
        grad_F = grad_MF.sum(0)
        return (
            product(grad_MF, weight_FD.t()) if needs_x else None,
            -(grad_F @ weight_FD) if needs_centre else None,
            product(grad_MF.t(), centred_MD.t()) if needs_weight else None,
            grad_F if needs_bias else None,
        )


def linear(
    x_MD: Tensor, centre_D: Tensor | None, weight_FD: Tensor, bias_F: Tensor | None
) -> Tensor:
    """(x − centre) @ weight.T + bias, differentiable; a centre alone costs no input gradient."""
    out = _Linear.apply(x_MD, centre_D, weight_FD, bias_F)  # type: ignore[no-untyped-call]
    return cast(Tensor, out)


class _RowsLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z_MF: Tensor, weight_FD: Tensor, bias_D: Tensor | None) -> Tensor:
        ctx.save_for_backward(z_MF, weight_FD)
        return product(z_MF, weight_FD.t(), bias_D)

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor | None, ...]:
        z_MF, weight_FD = ctx.saved_tensors
        needs_z, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            product(grad_MD, weight_FD) if needs_z else None,
            product(z_MF.t(), grad_MD.t()) if needs_weight else None,
            grad_MD.sum(0) if needs_bias else None,
        )


def dense_decode(z_MF: Tensor, decoder_FD: Tensor, bias_D: Tensor | None) -> Tensor:
    """z @ decoder (+ bias), differentiable: decode where most latents may be active."""
    return cast(Tensor, _RowsLinear.apply(z_MF, decoder_FD, bias_D))  # type: ignore[no-untyped-call]


class ByLatent(NamedTuple):
    """Pairs grouped by latent."""

    order_P: Tensor
    """Pair numbers, ascending by latent."""
    row_P: Tensor
    """The row of each pair, in that order."""
    offsets_F: Tensor
    """Where each latent's pairs begin in that order."""


class Support:
    """Which latents are active in which row: P pairs ordered by row, and their order by latent.

    Args:
        row_P: int64, ascending.
        index_P: int64, the latent of each pair.
        rows: number of rows; some may be empty.
        latents: number of latents.
    """

    def __init__(self, row_P: Tensor, index_P: Tensor, *, rows: int, latents: int) -> None:
        self.row_P, self.index_P = row_P, index_P
        self.rows, self.latents = rows, latents
        self.offsets_M = _starts(row_P, rows)
        self._by_latent: ByLatent | None = None

    def by_latent(self) -> ByLatent:
        """The pairs grouped by latent, sorted once."""
        if self._by_latent is None:
            sorted_index_P, order_P = torch.sort(self.index_P, stable=True)
            offsets_F = _starts(sorted_index_P, self.latents)
            self._by_latent = ByLatent(order_P, self.row_P[order_P], offsets_F)
        return self._by_latent

    def regrouped(self, bag_P: Tensor, bags: int) -> Support:
        """The same pairs with other, finer rows; `bag_P` ascending."""
        finer = Support(bag_P, self.index_P, rows=bags, latents=self.latents)
        order = self.by_latent()
        finer._by_latent = order._replace(row_P=bag_P[order.order_P])
        return finer


def row_support(index_MK: Tensor, latents: int) -> Support:
    """The support of the same number of latents in every row."""
    rows, k = index_MK.shape
    row_P = torch.arange(rows, device=index_MK.device).repeat_interleave(k)
    return Support(row_P, index_MK.reshape(-1), rows=rows, latents=latents)


def _starts(sorted_P: Tensor, bins: int) -> Tensor:
    return torch.searchsorted(sorted_P, torch.arange(bins, device=sorted_P.device))


def weighted_rows(table: Tensor, index_P: Tensor, weight_P: Tensor, offsets: Tensor) -> Tensor:
    """Sum of weight · table[index] over each bag of pairs, (bags, columns).

    Args:
        offsets: where each bag begins; a bag ends where the next begins.
    """
    if _HAS_TRITON and table.is_cuda:
        from routesae_cache import triton_kernels

        return triton_kernels.weighted_rows(table, index_P, weight_P, offsets)
    return F.embedding_bag(index_P, table, offsets, mode="sum", per_sample_weights=weight_P)


def pair_dots(left_MD: Tensor, table_FD: Tensor, support: Support) -> Tensor:
    """⟨left[row], table[latent]⟩ of each pair, (P,).

    On a CPU as the product of the two, sampled at the pairs of a sparse (latents, rows) matrix.
    """
    if _HAS_TRITON and left_MD.is_cuda:
        from routesae_cache import triton_kernels

        return triton_kernels.pair_dots(left_MD, table_FD, support.row_P, support.index_P)
    by_latent = support.by_latent()
    pairs = len(by_latent.order_P)
    end = by_latent.offsets_F.new_tensor([pairs])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        pairs_FM = torch.sparse_csr_tensor(
            torch.cat([by_latent.offsets_F, end]),
            by_latent.row_P,
            left_MD.new_zeros(pairs),
            (support.latents, support.rows),
            check_invariants=False,
        )
    dots_P = torch.sparse.sampled_addmm(pairs_FM, table_FD, left_MD.t(), beta=0.0).values()
    return torch.empty_like(dots_P).scatter_(0, by_latent.order_P, dots_P)


def transposed_rows(left_MD: Tensor, weight_P: Tensor, support: Support) -> Tensor:
    """Sum of weight · left[row] over the pairs of each latent, (F, D): a weight gradient."""
    by_latent = support.by_latent()
    weight_sorted_P = weight_P[by_latent.order_P]
    return weighted_rows(left_MD, by_latent.row_P, weight_sorted_P, by_latent.offsets_F)


class _ChosenValues(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_MD: Tensor,
        pre_bias_D: Tensor | None,
        encoder_FD: Tensor,
        latent_bias_F: Tensor,
        centred_MD: Tensor,
        value_P: Tensor,
        support: Support,
    ) -> Tensor:
        ctx.save_for_backward(centred_MD, encoder_FD)
        ctx.support = support
        return value_P.view_as(value_P)

    @staticmethod
    def backward(ctx: Any, grad_P: Tensor) -> tuple[Tensor | None, ...]:
        centred_MD, encoder_FD = ctx.saved_tensors
        support: Support = ctx.support
        grad_latent_bias_F = grad_P.new_zeros(support.latents).index_add_(
            0, support.index_P, grad_P
        )
        grad_encoder_FD = transposed_rows(centred_MD, grad_P, support)
        grad_x_MD = grad_pre_bias_D = None
        if ctx.needs_input_grad[0]:
            grad_x_MD = weighted_rows(encoder_FD, support.index_P, grad_P, support.offsets_M)
        if ctx.needs_input_grad[1]:
            grad_pre_bias_D = -(grad_latent_bias_F @ encoder_FD)
        return grad_x_MD, grad_pre_bias_D, grad_encoder_FD, grad_latent_bias_F, None, None, None


def chosen_values(
    x_MD: Tensor,
    pre_bias_D: Tensor | None,
    encoder_FD: Tensor,
    latent_bias_F: Tensor,
    *,
    centred_MD: Tensor,
    value_P: Tensor,
    support: Support,
) -> Tensor:
    """W_e (x − b_pre) + b_lat at the chosen pairs, differentiable in its first four arguments.

    The values were computed while selecting; this attaches their sparse gradients. The gradient to
    the input is computed only where it is asked for (routing).

    Args:
        centred_MD: x − b_pre, detached.
        value_P: the values at the pairs, detached.
    """
    value = _ChosenValues.apply(  # type: ignore[no-untyped-call]
        x_MD, pre_bias_D, encoder_FD, latent_bias_F, centred_MD, value_P, support
    )
    return cast(Tensor, value)


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value_P: Tensor, decoder_FD: Tensor, bias_D: Tensor | None, support: Support
    ) -> Tensor:
        ctx.save_for_backward(value_P, decoder_FD)
        ctx.support = support
        decoded_MD = weighted_rows(decoder_FD, support.index_P, value_P, support.offsets_M)
        return decoded_MD if bias_D is None else decoded_MD.add_(bias_D)

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor | None, ...]:
        value_P, decoder_FD = ctx.saved_tensors
        grad_MD = grad_MD.contiguous()
        needs_value, needs_decoder, needs_bias, _ = ctx.needs_input_grad
        return (
            pair_dots(grad_MD, decoder_FD, ctx.support) if needs_value else None,
            transposed_rows(grad_MD, value_P, ctx.support) if needs_decoder else None,
            grad_MD.sum(0) if needs_bias else None,
            None,
        )


def sparse_decode(
    value_P: Tensor, decoder_FD: Tensor, bias_D: Tensor | None, support: Support
) -> Tensor:
    """Sum of value · decoder row over each row's pairs, plus a bias; differentiable, (rows, D)."""
    decoded = _SparseDecode.apply(value_P, decoder_FD, bias_D, support)  # type: ignore[no-untyped-call]
    return cast(Tensor, decoded)
