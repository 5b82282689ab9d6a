"""What decoder directions say: the tokens they promote and suppress, and which are alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from routesae_cache.lm import LanguageModel
from routesae_cache.saes.sae import Sae

_LATENTS_AT_ONCE = 256
_TOKENS_AT_ONCE = 4096


class TokenEffects(NamedTuple):
    """Tokens and how much a direction raises their logits, the largest effect first."""

    promoted: list[tuple[int, float]]
    suppressed: list[tuple[int, float]]


class Neighbour(NamedTuple):
    """Another latent of the same SAE."""

    latent: int
    cosine: float


def token_effects(
    lm: LanguageModel, sae: Sae, latents: Sequence[int], count: int
) -> list[TokenEffects]:
    """The tokens that each latent's direction promotes and suppresses through the unembedding.

    The direction, with a root mean square of 1, goes through the final norm and the output
    embedding: the change of the logits, up to a factor. A norm's bias is left out, for it is the
    same for all. A crosscoder's direction is that of its last layer.
    """
    norm, unembedding_VD = _head(lm)
    direction_ND = sae.direction_FD(-1)[torch.tensor(latents, dtype=torch.int64)].detach().float()
    direction_ND = direction_ND.to(lm.device)
    scale_N1 = direction_ND.square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()
    with torch.inference_mode():
        effect_ND = _through(norm, direction_ND * scale_N1)
        sides = _extremes(effect_ND, unembedding_VD, min(count, len(unembedding_VD)))
    return [
        TokenEffects(*(list(zip(*side, strict=True)) for side in both))
        for both in zip(*sides, strict=True)
    ]


def neighbours(sae: Sae, latents: Sequence[int], count: int) -> list[list[Neighbour]]:
    """The latents whose directions are closest by cosine, the closest first.

    A crosscoder's directions are compared over all of its layers together.
    """
    decoder_FD = nn.functional.normalize(sae.coder.decoder.detach().float(), dim=-1)
    index_N = torch.tensor(latents, dtype=torch.int64, device=decoder_FD.device)
    count = min(count, len(decoder_FD) - 1)
    found = []
    for part_N in torch.split(index_N, _LATENTS_AT_ONCE):
        cosine_NF = decoder_FD[part_N] @ decoder_FD.T
        cosine_NF[torch.arange(len(part_N)), part_N] = -2.0  # not itself
        cosine_NK, latent_NK = cosine_NF.topk(count, dim=-1)
        for row in zip(latent_NK.tolist(), cosine_NK.tolist(), strict=True):
            found.append([Neighbour(*pair) for pair in zip(*row, strict=True)])
    return found


def _head(lm: LanguageModel) -> tuple[nn.Module | None, Tensor]:
    """The final norm, if there is one, and the output embedding (V, D)."""
    unembedding_VD: Tensor = lm.model.get_output_embeddings().weight
    norms = [
        module
        for module in lm.model.get_decoder().children()
        if isinstance(weight := getattr(module, "weight", None), Tensor)
        and weight.shape == (lm.width,)
    ]
    return (norms[-1] if norms else None), unembedding_VD


def _through(norm: nn.Module | None, direction_ND: Tensor) -> Tensor:
    if norm is None:
        return direction_ND
    dtype = next(norm.parameters()).dtype

    def apply(x_ND: Tensor) -> Tensor:
        normed_ND: Tensor = norm(x_ND.to(dtype))
        return normed_ND.float()

    return (apply(direction_ND) - apply(-direction_ND)) / 2


def _extremes(
    effect_ND: Tensor, unembedding_VD: Tensor, count: int
) -> list[list[tuple[list[int], list[float]]]]:
    """The tokens with the largest products and those with the smallest, with these products.

    A block of the vocabulary at a time: the product with all of it would not fit.
    """
    found: dict[bool, list[tuple[Tensor, Tensor]]] = {True: [], False: []}
    for start in range(0, len(unembedding_VD), _TOKENS_AT_ONCE):
        block_DV = unembedding_VD[start : start + _TOKENS_AT_ONCE].float().T
        k = min(count, block_DV.shape[1])
        parts = [part_ND @ block_DV for part_ND in torch.split(effect_ND, _LATENTS_AT_ONCE)]
        for largest, kept in found.items():
            best = [part_NV.topk(k, dim=-1, largest=largest) for part_NV in parts]
            kept.append(
                (torch.cat([b.values for b in best]), torch.cat([b.indices for b in best]) + start)
            )
    sides = []
    for largest, kept in found.items():
        value_NK, token_NK = (torch.cat(part, -1) for part in zip(*kept, strict=True))
        value_NK, order_NK = value_NK.topk(count, dim=-1, largest=largest)
        token_NK = token_NK.gather(-1, order_NK)
        sides.append(list(zip(token_NK.tolist(), value_NK.tolist(), strict=True)))
    return sides
