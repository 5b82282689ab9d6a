"""How next-token predictions differ between passes, a small slice of them at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from routesae_cache.lm import LanguageModel
from routesae_cache.splicing.splice import head

_SLICE_VALUES = 1 << 23  # of logits from one product of the head, whatever the vocabulary
_BLOCK_VALUES = 1 << 20  # of those on a CPU, from logits to sums while they are in its cache


class Differences(NamedTuple):
    """Of N tokens in S other passes, float32, in nats."""

    ce_N: Tensor
    """Cross-entropy of the next token in the original pass."""
    kl_NS: Tensor
    """KL(original ‖ other)."""
    ce_NS: Tensor
    """Cross-entropy of the next token in the other pass."""


def compare_predictions(
    lm: LanguageModel, original_ND: Tensor, others: Sequence[Tensor], next_N: Tensor
) -> Differences:
    """Compare the predictions of other passes with those of one, softmax in float32.

    Args:
        original_ND: what enters the head, as `lm.states` gives it.
        others: the same of each of the other passes, at least one.
        next_N: int64, the token that follows; any one where there is none.
    """
    n_tokens, n_others = len(next_N), len(others)
    # made first: small results that stay between large tensors would keep freed ones apart
    found = Differences(
        *(torch.empty(n_tokens, *more, device=lm.device) for more in ((), (n_others,), (n_others,)))
    )
    size = max(1, _SLICE_VALUES // lm.vocab_size)
    for start in range(0, n_tokens, size):
        part = slice(start, start + size)
        _compare_slice(
            lm,
            original_ND[part],
            [final_ND[part] for final_ND in others],
            next_N[part],
            Differences(*(column[part] for column in found)),
        )
    return found


def _compare_slice(
    lm: LanguageModel,
    original_ND: Tensor,
    others: Sequence[Tensor],
    next_N: Tensor,
    out: Differences,
) -> None:
    block = max(1, _BLOCK_VALUES // lm.vocab_size) if lm.device.type == "cpu" else len(next_N)
    parts = [slice(start, start + block) for start in range(0, len(next_N), block)]
    logits_NV = head(lm, original_ND)
    original = [_log_softmax(logits_NV[part]) for part in parts]
    for log_p_NV, part in zip(original, parts, strict=True):
        out.ce_N[part] = _ce(log_p_NV, next_N[part])
    for index, final_ND in enumerate(others):
        logits_NV = head(lm, final_ND)
        for log_p_NV, part in zip(original, parts, strict=True):
            log_q_NV = _log_softmax(logits_NV[part])
            out.ce_NS[part, index] = _ce(log_q_NV, next_N[part])
            out.kl_NS[part, index] = (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)


def _log_softmax(logits_NV: Tensor) -> Tensor:
    return torch.log_softmax(logits_NV, dim=-1, dtype=torch.float32)


def _ce(log_p_NV: Tensor, next_N: Tensor) -> Tensor:
    return -log_p_NV.gather(1, next_N[:, None])[:, 0]
