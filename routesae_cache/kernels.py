"""The fast paths of the TopK family: encode + select, and sparse decode, with sparse backward.

A step needs the encoder's product in full to know which latents are active. Everything after it
(decode, both weight gradients, the gradient of the values, the bias gradients) involves the active
(row, latent) pairs alone. All of it is expressed with three primitives over those pairs:

- a weighted sum of table rows per bag (`embedding_bag`): decode, and the gradient to the input;
- a dot product per pair (what `embedding_bag` calls the gradient of its per-sample weights): the
  gradient of the values, and values recomputed in float32;
- the first one again over pairs grouped by latent: the gradients of both weight matrices. The
  pairs are sorted by latent once a step, and both gradients use that order.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

EncodeDtype = Literal["float32", "bfloat16"]
CHUNK_ELEMENTS = 1 << 24
"""Pre-activations held at once while selecting."""


class ByLatent(NamedTuple):
    """Pairs grouped by latent."""

    order_P: Tensor
    """Pair numbers, ascending by latent."""
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
        self.offsets_M = _starts(torch.bincount(row_P, minlength=rows))
        self._by_latent: ByLatent | None = None

    def by_latent(self) -> ByLatent:
        """The pairs grouped by latent, sorted once."""
        if self._by_latent is None:
            order_P = torch.sort(self.index_P, stable=True).indices
            counts_F = torch.bincount(self.index_P, minlength=self.latents)
            self._by_latent = ByLatent(order_P, _starts(counts_F))
        return self._by_latent

    def regrouped(self, bag_P: Tensor, bags: int) -> Support:
        """The same pairs with other, finer rows; `bag_P` ascending."""
        finer = Support(bag_P, self.index_P, rows=bags, latents=self.latents)
        finer._by_latent = self.by_latent()
        return finer


def row_support(index_MK: Tensor, latents: int) -> Support:
    """The support of the same number of latents in every row."""
    rows, k = index_MK.shape
    row_P = torch.arange(rows, device=index_MK.device).repeat_interleave(k)
    return Support(row_P, index_MK.reshape(-1), rows=rows, latents=latents)


def _starts(counts: Tensor) -> Tensor:
    return counts.cumsum(0) - counts


def weighted_rows(table: Tensor, index_P: Tensor, weight_P: Tensor, offsets: Tensor) -> Tensor:
    """Sum of weight · table[index] over each bag of pairs, (bags, columns)."""
    return F.embedding_bag(index_P, table, offsets, mode="sum", per_sample_weights=weight_P)


def pair_dots(left_MD: Tensor, table_FD: Tensor, support: Support) -> Tensor:
    """⟨left[row], table[latent]⟩ of each pair, (P,)."""
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        left_MD, table_FD, support.index_P, support.offsets_M, support.row_P, 0, -1
    )
    return cast(Tensor, dots)


def transposed_rows(left_MD: Tensor, weight_P: Tensor, support: Support) -> Tensor:
    """Sum of weight · left[row] over the pairs of each latent, (F, D): a weight gradient."""
    order_P, offsets_F = support.by_latent()
    return weighted_rows(left_MD, support.row_P[order_P], weight_P[order_P], offsets_F)


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
        return value_P

    @staticmethod
    def backward(ctx: Any, grad_P: Tensor) -> tuple[Tensor | None, ...]:
        centred_MD, encoder_FD = ctx.saved_tensors
        support: Support = ctx.support
        grad_P = grad_P.contiguous()
        grad_latent_bias_F = torch.zeros_like(encoder_FD[:, 0]).index_add_(
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
        grad_value_P = pair_dots(grad_MD, decoder_FD, ctx.support)
        grad_decoder_FD = transposed_rows(grad_MD, value_P, ctx.support)
        grad_bias_D = grad_MD.sum(0) if ctx.needs_input_grad[2] else None
        return grad_value_P, grad_decoder_FD, grad_bias_D, None


def sparse_decode(
    value_P: Tensor, decoder_FD: Tensor, bias_D: Tensor | None, support: Support
) -> Tensor:
    """Sum of value · decoder row over each row's pairs, plus a bias; differentiable, (rows, D)."""
    decoded = _SparseDecode.apply(value_P, decoder_FD, bias_D, support)  # type: ignore[no-untyped-call]
    return cast(Tensor, decoded)


class Selected(NamedTuple):
    """Pre-activations chosen in each row, without gradients."""

    index_MK: Tensor
    """int64."""
    value_MK: Tensor
    """float32 whatever dtype selected them."""


@torch.no_grad()
def select_topk(
    centred_MD: Tensor,
    encoder_FD: Tensor,
    bias_F: Tensor,
    k: int,
    encode_dtype: EncodeDtype = "float32",
) -> Selected:
    """The k largest of W_e (x − b_pre) + b_lat in each row.

    Args:
        encode_dtype: `bfloat16` selects on a bfloat16 product and recomputes the chosen values.
    """
    low = getattr(torch, encode_dtype) if encode_dtype != "float32" else centred_MD.dtype
    weight_DF = encoder_FD.to(low).T
    bias_low_F = bias_F.to(low)
    rows = max(1, CHUNK_ELEMENTS // encoder_FD.shape[0])
    tops = [
        torch.addmm(bias_low_F, chunk.to(low), weight_DF).topk(k, sorted=False)
        for chunk in torch.split(centred_MD, rows)
    ]
    index_MK = torch.cat([top.indices for top in tops])
    value_MK = torch.cat([top.values for top in tops])
    if low is centred_MD.dtype:
        return Selected(index_MK, value_MK)
    support = row_support(index_MK, encoder_FD.shape[0])
    value_P = pair_dots(centred_MD, encoder_FD, support) + bias_F[support.index_P]
    return Selected(index_MK, value_P.view_as(index_MK))


class SelectedPairs(NamedTuple):
    """Pre-activations chosen over a batch, without gradients; ascending by row, then latent."""

    row_P: Tensor
    index_P: Tensor
    value_P: Tensor


@torch.no_grad()
def select_batchtopk(
    centred_MD: Tensor,
    encoder_FD: Tensor,
    bias_F: Tensor,
    k: int,
    encode_dtype: EncodeDtype = "float32",
) -> SelectedPairs:
    """The M·k largest of W_e (x − b_pre) + b_lat over the whole batch (Bussmann et al. 2024)."""
    low = getattr(torch, encode_dtype) if encode_dtype != "float32" else centred_MD.dtype
    latents = encoder_FD.shape[0]
    pre_MF = torch.addmm(bias_F.to(low), centred_MD.to(low), encoder_FD.to(low).T)
    position_P = pre_MF.view(-1).topk(centred_MD.shape[0] * k, sorted=False).indices.sort().values
    row_P, index_P = position_P // latents, position_P % latents
    if low is centred_MD.dtype:
        return SelectedPairs(row_P, index_P, pre_MF.view(-1)[position_P])
    support = Support(row_P, index_P, rows=centred_MD.shape[0], latents=latents)
    value_P = pair_dots(centred_MD, encoder_FD, support) + bias_F[index_P]
    return SelectedPairs(row_P, index_P, value_P)
