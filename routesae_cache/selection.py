"""Which latents are active: the encoder's product, and exact top-k of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from routesae_cache.kernels import Support, pair_dots, product, row_support

EncodeDtype = Literal["float32", "bfloat16"]
CHUNK_ROWS = 256
"""Rows whose pre-activations are held at once on a CPU: fewer make the product slow, more leave the
cache before they have been selected from."""
GPU_CHUNK_ELEMENTS = 1 << 26
"""Pre-activations held at once on a GPU: 256 MB in float32."""
FOLD = 4


class Chosen(NamedTuple):
    """Chosen pre-activations, without gradients."""

    support: Support
    value_P: Tensor
    """In the input's dtype, whatever dtype selected them."""


class Select(Protocol):
    """`select_topk` or `select_batchtopk`."""

    def __call__(
        self,
        centred_MD: Tensor,
        encoder_FD: Tensor,
        bias_F: Tensor,
        k: int,
        encode_dtype: EncodeDtype = "float32",
    ) -> Chosen: ...


@torch.no_grad()
def select_topk(
    centred_MD: Tensor,
    encoder_FD: Tensor,
    bias_F: Tensor,
    k: int,
    encode_dtype: EncodeDtype = "float32",
) -> Chosen:
    """The k largest of W_e (x − b_pre) + b_lat in each row; k pairs a row.

    Args:
        centred_MD: x − b_pre.
        encode_dtype: `bfloat16` selects on a bfloat16 product and recomputes the chosen values.
    """
    latents = encoder_FD.shape[0]
    low_MD, low_FD, low_F = _lowered(centred_MD, encoder_FD, bias_F, encode_dtype)
    on_cpu = centred_MD.device.type == "cpu"
    rows = CHUNK_ROWS if on_cpu else max(1, GPU_CHUNK_ELEMENTS // latents)
    tops = [top_k(product(part, low_FD, low_F), k) for part in torch.split(low_MD, rows)]
    support = row_support(torch.cat([top.indices for top in tops]), latents)
    if low_MD is not centred_MD:
        return Chosen(support, _exact(centred_MD, encoder_FD, bias_F, support))
    return Chosen(support, torch.cat([top.values for top in tops]).view(-1))


@torch.no_grad()
def select_batchtopk(
    centred_MD: Tensor,
    encoder_FD: Tensor,
    bias_F: Tensor,
    k: int,
    encode_dtype: EncodeDtype = "float32",
    top: Callable[[Tensor, int], Tensor] | None = None,
) -> Chosen:
    """The M·k largest of W_e (x − b_pre) + b_lat over a batch of M rows (Bussmann et al. 2024).

    Arguments as for `select_topk`. Pairs ascend by row, then by latent. Unlike `select_topk` this
    holds all M·F pre-activations at once.

    Args:
        top: in place of `batch_top`, where the batch is larger than what is here.
    """
    latents = encoder_FD.shape[0]
    rows = centred_MD.shape[0]
    low_MD, low_FD, low_F = _lowered(centred_MD, encoder_FD, bias_F, encode_dtype)
    pre_MF = product(low_MD, low_FD, low_F)
    position_P = (top or batch_top)(pre_MF, rows * k)
    support = Support(position_P // latents, position_P % latents, rows=rows, latents=latents)
    if low_MD is not centred_MD:
        return Chosen(support, _exact(centred_MD, encoder_FD, bias_F, support))
    return Chosen(support, pre_MF.view(-1)[position_P])


class Top(NamedTuple):
    """The k largest values of each row, in no particular order."""

    values: Tensor
    indices: Tensor


def top_k(value_MF: Tensor, k: int) -> Top:
    """`torch.topk` without order, on CPUs two to three times as fast.

    The columns are folded into groups of 4, of which the k with the largest maxima hold k largest
    values; their groups are found in the same way. So little is left for the selection proper,
    which costs ten times as much per element as a maximum. That is left to NumPy, which has it in
    vector instructions.
    """
    if value_MF.device.type != "cpu":
        return Top(*value_MF.topk(k, sorted=False))
    folded = [value_MF]
    while (columns := folded[-1].shape[1]) % FOLD == 0 and columns // FOLD >= 2 * k:
        halved_MC = torch.maximum(*folded[-1].tensor_split(2, dim=1))
        folded.append(torch.maximum(*halved_MC.tensor_split(2, dim=1)))
    column_MK = _largest(folded.pop(), k)
    while folded:
        finer_MC = folded.pop()
        columns = finer_MC.shape[1]
        starts = torch.arange(0, columns, columns // FOLD)[:, None]
        column_MC = (column_MK[:, None] + starts).flatten(1)
        column_MK = column_MC.gather(1, _largest(finer_MC.gather(1, column_MC), k))
    return Top(value_MF.gather(1, column_MK), column_MK)


def _largest(value_MC: Tensor, k: int) -> Tensor:
    """Columns of the k largest of each row; NaN counts as large."""
    comparable_MC = value_MC.float() if value_MC.dtype == torch.bfloat16 else value_MC
    first = value_MC.shape[1] - k
    return torch.from_numpy(np.argpartition(comparable_MC.numpy(), first, axis=1)[:, first:])


def batch_top(value_MF: Tensor, count: int) -> Tensor:
    """Positions in the flattened tensor of its `count` largest values, ascending.

    On CPUs: `count` groups of columns have maxima of at least some value, so `count` elements have
    at least that value; only those, few more than `count`, are sorted out.
    """
    flat = value_MF.view(-1)
    if value_MF.device.type != "cpu":
        return flat.topk(count, sorted=False).indices.sort().values
    rows, columns = value_MF.shape
    fold = 1
    while columns % (2 * fold) == 0 and rows * columns // (2 * fold) >= 2 * count:
        fold *= 2
    maxima = value_MF.view(rows, fold, columns // fold).amax(1).view(-1)
    floor = maxima.kthvalue(maxima.shape[0] - count + 1).values
    candidates = torch.nonzero(~(flat < floor)).view(-1)  # NaN stays in, for the loss to show
    best = flat[candidates].topk(count, sorted=False).indices
    return candidates[best.sort().values]


def _lowered(
    centred_MD: Tensor, encoder_FD: Tensor, bias_F: Tensor, encode_dtype: EncodeDtype
) -> tuple[Tensor, Tensor, Tensor]:
    if encode_dtype == "float32":
        return centred_MD, encoder_FD, bias_F
    low = torch.bfloat16
    return centred_MD.to(low), encoder_FD.to(low), bias_F.to(low)


def _exact(centred_MD: Tensor, encoder_FD: Tensor, bias_F: Tensor, support: Support) -> Tensor:
    return pair_dots(centred_MD, encoder_FD, support).add_(bias_F[support.index_P])
