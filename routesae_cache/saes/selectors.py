"""Selectors: which of a token's layers the coder reads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from routesae_cache.saes.config import SaeConfig

HASHED_CHANNELS = 16


class Selection(NamedTuple):
    """What the coder reads, and where it came from."""

    vector_MD: Tensor
    layer_M: Tensor | None
    """Index into `config.layers` of each vector of width D; None for mixtures."""
    router_NL: Tensor | None
    scale_M: Tensor | None = None
    """The factor on the residual; None where there is none."""
    log_probability_N: Tensor | None = None
    """Of a layer that was sampled, for the score function; None where none was."""


class Selector(nn.Module, ABC):
    """Chooses, from all layers of each token, the vectors to be coded.

    Args:
        generator: seeds weights and random choices.
    """

    stacked = 1
    """Layers that make up one vector."""

    def __init__(self, config: SaeConfig, width: int, *, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def forward(
        self, x_NLD: Tensor, step: Tensor | None, layer_index_N: Tensor | None
    ) -> Selection:
        """Select.

        Args:
            step: int64 scalar, random choices differ from step to step; None at inference.
            layer_index_N: reads each token from this layer instead, where there is a choice.

        Raises:
            ValueError: if a layer is forced on a selector that does not choose one per token.
        """


class FixedSelector(Selector):
    """One layer, always the same."""

    def forward(
        self, x_NLD: Tensor, step: Tensor | None, layer_index_N: Tensor | None
    ) -> Selection:
        _refuse_forced(layer_index_N, "a fixed SAE reads one layer")
        layer_N = torch.zeros(x_NLD.shape[0], dtype=torch.int64, device=x_NLD.device)
        return Selection(x_NLD[:, 0], layer_N, None)


class EverySelector(Selector):
    """Every layer as a vector of its own (MLSAE)."""

    def forward(
        self, x_NLD: Tensor, step: Tensor | None, layer_index_N: Tensor | None
    ) -> Selection:
        _refuse_forced(layer_index_N, "an SAE on every layer reads them all")
        return Selection(x_NLD.flatten(0, 1), _layer_major(x_NLD), None)


class AllSelector(Selector):
    """All layers of a token as one long vector (crosscoder)."""

    def __init__(self, config: SaeConfig, width: int, *, generator: torch.Generator) -> None:
        super().__init__(config, width, generator=generator)
        self.stacked = len(config.layers)

    def forward(
        self, x_NLD: Tensor, step: Tensor | None, layer_index_N: Tensor | None
    ) -> Selection:
        _refuse_forced(layer_index_N, "a crosscoder reads all layers at once")
        return Selection(x_NLD.flatten(1), _layer_major(x_NLD), None)


class Draw(nn.Module):
    """A number in [0, 1) for each token: a hash of its residual, the seed and the step.

    So it depends neither on the order of a batch nor on what was drawn before, and a resumed run
    draws as an uninterrupted one does.
    """

    salt: Tensor

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        salt = torch.randint(2**62, (HASHED_CHANNELS,), generator=generator)
        self.register_buffer("salt", salt | 1)

    def forward(self, x_NLD: Tensor, step: Tensor | None) -> Tensor:
        """Uniform float32 (N,); without a step the same for a token at every call."""
        head = x_NLD[:, 0, :HASHED_CHANNELS].float().contiguous()
        bits = head.view(torch.int32).long()
        mixed_N = (bits * self.salt[: bits.shape[1]]).sum(-1)
        if step is not None:
            mixed_N = mixed_N + step * self.salt[0]
        for _ in range(2):  # multiply and fold, so that every bit reaches the high ones
            mixed_N = (mixed_N ^ (mixed_N >> 29)) * self.salt[-1]
        return ((mixed_N >> 33) & (2**24 - 1)) / 2**24


class RandomSelector(Selector):
    """A layer drawn uniformly for each token (RouteSAE's baseline), without a factor."""

    def __init__(self, config: SaeConfig, width: int, *, generator: torch.Generator) -> None:
        super().__init__(config, width, generator=generator)
        self.draw = Draw(generator)

    def forward(
        self, x_NLD: Tensor, step: Tensor | None, layer_index_N: Tensor | None
    ) -> Selection:
        layer_N = layer_index_N
        if layer_N is None:
            layer_N = (self.draw(x_NLD, step) * x_NLD.shape[1]).long()
        return Selection(_read(x_NLD, layer_N), layer_N, None)


class RouteSelector(Selector):
    """A linear router on the sum (or mean) of the layers chooses one (RouteSAE, section 3).

    p = softmax(W_r Σ_ℓ x_ℓ), and a hard choice is argmax p, with three ways for W_r to learn:

    - `factor`, the paper's: the coder reads p_ℓ* · x_ℓ*, and the gradient passes that factor;
    - `straight-through`: the coder reads x_ℓ*, and backward treats it as Σ p_ℓ x_ℓ (Bengio et al.
      2013);
    - `score`: in training a layer is sampled from p, and the score function follows the expected
      NMSE itself (Williams 1992).

    Soft routing reads Σ p_ℓ x_ℓ. A forced layer keeps the factor of the router's own choice, so
    that the coder's input has the scale it was trained on.
    """

    def __init__(self, config: SaeConfig, width: int, *, generator: torch.Generator) -> None:
        super().__init__(config, width, generator=generator)
        bound = width**-0.5
        weight = torch.empty(len(config.layers), width)
        self.router = nn.Parameter(weight.uniform_(-bound, bound, generator=generator))
        self.draw = Draw(generator)

    def forward(
        self, x_NLD: Tensor, step: Tensor | None, layer_index_N: Tensor | None
    ) -> Selection:
        pooled_ND = x_NLD.sum(1) if self.config.aggregate == "sum" else x_NLD.mean(1)
        router_NL = torch.softmax(pooled_ND @ self.router.T, dim=-1)
        if not self.config.hard:
            _refuse_forced(layer_index_N, "soft routing mixes the layers")
            return Selection(torch.einsum("nl,nld->nd", router_NL, x_NLD), None, router_NL)
        if self.config.route_estimator == "score" and step is not None:
            return self.sample(x_NLD, router_NL, step)
        peak_N, chosen_N = router_NL.max(dim=-1)
        layer_N = chosen_N if layer_index_N is None else layer_index_N
        if self.config.route_estimator == "factor":
            scaled_ND = _read(x_NLD, layer_N) * peak_N[:, None]
            return Selection(scaled_ND, layer_N, router_NL, scale_M=peak_N)
        if self.config.route_estimator == "score":
            return Selection(_read(x_NLD, layer_N), layer_N, router_NL)
        read_ND = _StraightThrough.apply(router_NL, x_NLD, layer_N)  # type: ignore[no-untyped-call]
        return Selection(cast(Tensor, read_ND), layer_N, router_NL)

    def sample(self, x_NLD: Tensor, router_NL: Tensor, step: Tensor) -> Selection:
        """A layer drawn from p for each token."""
        below_NL = router_NL.detach().cumsum(-1)[:, :-1] <= self.draw(x_NLD, step)[:, None]
        layer_N = below_NL.sum(-1)
        log_probability_N = router_NL.gather(1, layer_N[:, None]).squeeze(1).log()
        return Selection(
            _read(x_NLD, layer_N), layer_N, router_NL, log_probability_N=log_probability_N
        )


class _StraightThrough(torch.autograd.Function):
    """Forward: the chosen layer. Backward: the gradient of Σ p_ℓ x_ℓ in p."""

    @staticmethod
    def forward(ctx: Any, router_NL: Tensor, x_NLD: Tensor, layer_N: Tensor) -> Tensor:
        ctx.save_for_backward(x_NLD)
        return _read(x_NLD, layer_N)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None]:
        (x_NLD,) = ctx.saved_tensors
        return torch.einsum("nd,nld->nl", grad_ND, x_NLD), None, None


def _read(x_NLD: Tensor, layer_N: Tensor) -> Tensor:
    tokens_N = torch.arange(x_NLD.shape[0], device=x_NLD.device)
    return x_NLD[tokens_N, layer_N]


def _layer_major(x_NLD: Tensor) -> Tensor:
    return torch.arange(x_NLD.shape[1], device=x_NLD.device).repeat(x_NLD.shape[0])


def _refuse_forced(layer_index_N: Tensor | None, why: str) -> None:
    if layer_index_N is not None:
        raise ValueError(f"{why}: a layer per token can be forced only on hard routing and random")
