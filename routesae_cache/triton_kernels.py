"""The pair primitives of `kernels` for CUDA, in Triton. Checked in Triton's interpreter and not yet
on a GPU; without Triton `kernels` uses PyTorch's own operations, which run on CUDA as well."""

# mypy: disallow-untyped-decorators=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_D = 256


@triton.jit
def _weighted_rows_kernel(
    table_ptr: Any,
    index_ptr: Any,
    weight_ptr: Any,
    start_ptr: Any,
    end_ptr: Any,
    out_ptr: Any,
    row_stride: Any,
    width: Any,
    BLOCK: tl.constexpr,
) -> None:
    bag = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), dtype=out_ptr.dtype.element_ty)
    for pair in range(tl.load(start_ptr + bag), tl.load(end_ptr + bag)):
        row = tl.load(index_ptr + pair)
        weight = tl.load(weight_ptr + pair)
        total += weight * tl.load(table_ptr + row * row_stride + column, mask=inside, other=0.0)
    tl.store(out_ptr + bag.to(tl.int64) * width + column, total, mask=inside)


@triton.jit
def _pair_dots_kernel(
    left_ptr: Any,
    table_ptr: Any,
    row_ptr: Any,
    index_ptr: Any,
    out_ptr: Any,
    left_stride: Any,
    table_stride: Any,
    width: Any,
    BLOCK: tl.constexpr,
) -> None:
    pair = tl.program_id(0)
    left = left_ptr + tl.load(row_ptr + pair) * left_stride
    right = table_ptr + tl.load(index_ptr + pair) * table_stride
    total = tl.zeros((BLOCK,), dtype=out_ptr.dtype.element_ty)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        total += tl.load(left + column, mask=inside, other=0.0) * tl.load(
            right + column, mask=inside, other=0.0
        )
    tl.store(out_ptr + pair, tl.sum(total, axis=0))


def weighted_rows(table: Tensor, index_P: Tensor, weight_P: Tensor, offsets: Tensor) -> Tensor:
    """`kernels.weighted_rows`: one program per bag and block of columns."""
    assert table.stride(1) == 1
    bags, width = offsets.shape[0], table.shape[1]
    ends = torch.cat([offsets[1:], offsets.new_tensor([index_P.shape[0]])])
    out = table.new_empty(bags, width)
    _weighted_rows_kernel[(bags, triton.cdiv(width, BLOCK_D))](
        table,
        index_P,
        weight_P.contiguous(),
        offsets,
        ends,
        out,
        table.stride(0),
        width,
        BLOCK=BLOCK_D,
    )
    return out


def pair_dots(left_MD: Tensor, table_FD: Tensor, row_P: Tensor, index_P: Tensor) -> Tensor:
    """`kernels.pair_dots`: one program per pair."""
    assert left_MD.stride(1) == table_FD.stride(1) == 1
    out_P = left_MD.new_empty(row_P.shape[0])
    _pair_dots_kernel[(row_P.shape[0],)](
        left_MD,
        table_FD,
        row_P,
        index_P,
        out_P,
        left_MD.stride(0),
        table_FD.stride(0),
        left_MD.shape[1],
        BLOCK=BLOCK_D,
    )
    return out_P
