"""Plain dense float64 implementations of every loss, for autograd to differentiate."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from routesae_cache.saes import Sae, SaeConfig
from routesae_cache.saes.selectors import RandomSelector, RouteSelector


def reference_loss(
    sae: Sae, x_NLD: Tensor, p: Mapping[str, Tensor], dead_index: Tensor | None = None
) -> Tensor:
    """The loss of `sae` on a batch, as a function of the parameters `p`."""
    vector_MD, log_probability_N = _select(sae, x_NLD, p)
    encoder_FD, decoder_FD = p["coder.encoder"], p["coder.decoder"]
    config = sae.config
    bias_D = p.get("coder.pre_bias", torch.zeros(encoder_FD.shape[1], dtype=x_NLD.dtype))
    centred_MD = vector_MD if config.selector == "all" else vector_MD - bias_D
    product_MF = centred_MD @ encoder_FD.T
    blocks = decoder_FD.view(config.latents, -1, sae.width)
    cost_F = torch.ones(config.latents, dtype=x_NLD.dtype)
    if config.crosscoder_weighting == "decoder-norm":
        cost_F = blocks.norm(dim=-1).sum(-1)
    value_MF, extra = _code(config, product_MF, cost_F, p)
    decoded_MD = value_MF @ decoder_FD + bias_D
    loss = _nmse(decoded_MD, vector_MD, sae.width).mean() + extra
    if log_probability_N is not None:
        nmse_N = _nmse(decoded_MD, vector_MD, sae.width).detach()
        surrogate = ((nmse_N - nmse_N.mean()) * log_probability_N).mean()
        loss = loss + surrogate - surrogate.detach()
    if config.coder == "gated" and config.gated_aux == "paper":
        open_MF = torch.relu(product_MF + p["coder.gate_bias"])
        frozen_MD = open_MF @ decoder_FD.detach() + bias_D.detach()
        loss = loss + _nmse(frozen_MD, vector_MD, frozen_MD.shape[1]).mean()
    if config.coder == "matryoshka":
        assert config.group_sizes is not None
        for end in torch.tensor(config.group_sizes).cumsum(0)[:-1].tolist():
            prefix_MD = value_MF[:, :end] @ decoder_FD[:end] + bias_D
            loss = loss + _nmse(prefix_MD, vector_MD, sae.width).mean()
    if dead_index is not None:
        assert config.auxk is not None
        pre_MF = product_MF + p["coder.latent_bias"]
        keep_MF = torch.full_like(pre_MF, float("-inf"))
        keep_MF[:, dead_index] = pre_MF[:, dead_index]
        aux_MF = _keep_topk(keep_MF, config.auxk)
        if config.coder != "topk":
            aux_MF = torch.relu(aux_MF)
        error_MD = (vector_MD - decoded_MD).detach()
        aux = _nmse(aux_MF @ decoder_FD, error_MD, error_MD.shape[1]).mean()
        loss = loss + config.auxk_weight * aux
    return loss


def _select(sae: Sae, x_NLD: Tensor, p: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """The coder's input, and the log-probability of a sampled layer."""
    config, layers = sae.config, x_NLD.shape[1]
    if config.selector == "fixed":
        return x_NLD[:, 0], None
    if config.selector == "every":
        return x_NLD.reshape(-1, sae.width), None
    if config.selector == "all":
        return x_NLD.reshape(x_NLD.shape[0], -1), None
    if isinstance(sae.selector, RandomSelector):
        layer_N = (sae.selector.draw(x_NLD, sae.step) * layers).long()
        return torch.einsum("nl,nld->nd", _one_hot(layer_N, layers), x_NLD), None
    assert isinstance(sae.selector, RouteSelector)
    pooled_ND = x_NLD.sum(1) if config.aggregate == "sum" else x_NLD.mean(1)
    router_NL = torch.softmax(pooled_ND @ p["selector.router"].T, dim=-1)
    weight_NL, log_probability_N = router_NL, None
    if config.hard and config.route_estimator == "score":
        draw_N = sae.selector.draw(x_NLD, sae.step).double()
        edges_NL = router_NL.detach().cumsum(-1)[:, :-1].contiguous()
        layer_N = torch.searchsorted(edges_NL, draw_N[:, None], right=True).squeeze(1)
        weight_NL = _one_hot(layer_N, layers)
        log_probability_N = (weight_NL * router_NL).sum(-1).log()
    elif config.hard:
        chosen_NL = _one_hot(router_NL.argmax(-1), layers)
        weight_NL = chosen_NL * router_NL
        if config.route_estimator == "straight-through":
            weight_NL = chosen_NL + router_NL - router_NL.detach()
    return torch.einsum("nl,nld->nd", weight_NL, x_NLD), log_probability_N


def _code(
    config: SaeConfig, product_MF: Tensor, cost_F: Tensor, p: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Latents and the coder's own penalty."""
    none = torch.zeros((), dtype=product_MF.dtype)
    weight = config.sparsity_weight or 0.0
    if config.coder == "gated":
        gate_MF = product_MF + p["coder.gate_bias"]
        magnitude_MF = torch.relu(product_MF * p["coder.r_mag"].exp() + p["coder.mag_bias"])
        value_MF = (gate_MF > 0) * magnitude_MF
        penalised = value_MF if config.gated_aux == "authors" else torch.relu(gate_MF)
        return value_MF, weight * penalised.abs().mean()
    pre_MF = product_MF + p["coder.latent_bias"]
    if config.coder == "relu":
        value_MF = torch.relu(pre_MF)
        return value_MF, weight * (value_MF * cost_F).mean()
    if config.coder == "jumprelu":
        return _jumprelu(pre_MF, p["coder.threshold"], config.bandwidth, weight)
    assert config.k is not None
    if config.coder == "topk":
        return _keep_topk(pre_MF * cost_F, config.k) / cost_F, none
    scored_MF = torch.relu(pre_MF) * cost_F
    kept = _keep_topk(scored_MF.reshape(1, -1), config.k * pre_MF.shape[0])
    return (kept.view_as(pre_MF) > 0) * torch.relu(pre_MF), none


def _jumprelu(
    pre_MF: Tensor, threshold_F: Tensor, bandwidth: float, weight: float
) -> tuple[Tensor, Tensor]:
    """Pseudo-derivatives written as surrogates that are 0 in value."""
    near_MF = ((pre_MF - threshold_F).abs() < bandwidth / 2).detach().double()
    moving_F = threshold_F - threshold_F.detach()
    on_MF = (pre_MF > threshold_F).detach().double()
    value_MF = pre_MF * on_MF - threshold_F.detach() / bandwidth * near_MF * moving_F
    l0 = (on_MF - near_MF / bandwidth * moving_F).sum(-1).mean()
    return value_MF, weight * l0


def _keep_topk(value: Tensor, k: int) -> Tensor:
    keep = torch.zeros_like(value).scatter_(1, value.topk(k).indices, 1.0)
    return torch.where(keep > 0, value, 0.0)


def _nmse(decoded: Tensor, target: Tensor, width: int) -> Tensor:
    decoded, target = decoded.reshape(-1, width), target.reshape(-1, width)
    return ((decoded - target) ** 2).mean(-1) / (target**2).mean(-1)


def _one_hot(layer_N: Tensor, layers: int) -> Tensor:
    return torch.nn.functional.one_hot(layer_N, layers).double()
