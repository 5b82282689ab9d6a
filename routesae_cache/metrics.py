"""Accumulators: sums and counts over tokens, divided once at the end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from routesae_cache.saes.output import SaeOutput


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """How well an SAE reconstructs the residuals it reads, on one split."""

    tokens: int
    nmse: float
    """Mean over coded vectors of the squared error over the vector's energy."""
    explained_variance: float
    """1 - sum of squared errors / sum of squared distances to the mean vector."""
    l0: float
    """Mean number of active latents of a coded vector."""
    dead_share: float
    """Share of latents that are active on no token of the split."""
    layer_use: dict[int, float] | None
    """Layer -> share of coded vectors read from it; None where there is no single layer."""
    router_entropy: float | None
    """Mean over tokens of the entropy of the router's probabilities, in nats."""
    router_share: dict[int, float] | None
    """Layer -> mean probability that the router gives it."""


class ReconstructionSums:
    """Adds up what `Reconstruction` reports, batch by batch; memory does not grow."""

    def __init__(self, layers: tuple[int, ...], width: int, latents: int) -> None:
        self._layers, self._latents = layers, latents
        self._tokens = self._vectors = self._coded = 0
        self._nmse = self._squared_error = self._energy = self._active = self._entropy = 0.0
        self._sum_D = torch.zeros(width, dtype=torch.float64)
        self._fired_F = torch.zeros(latents, dtype=torch.bool)
        self._use_L: Tensor | None = None
        self._share_L: Tensor | None = None

    def add(self, output: SaeOutput, tokens: int) -> None:
        """Add a batch of `tokens` tokens; a router's factor on targets and errors is undone."""
        target_MD, error_MD = output.target_MD, output.reconstruction_MD - output.target_MD
        if output.scale_M is not None:
            target_MD, error_MD = (x / output.scale_M[:, None] for x in (target_MD, error_MD))
        self._tokens += tokens
        self._vectors += len(target_MD)
        self._nmse += float(output.nmse_M.double().sum())
        self._squared_error += float(error_MD.square().sum(dtype=torch.float64))
        self._energy += float(target_MD.square().sum(dtype=torch.float64))
        self._sum_D += target_MD.sum(0, dtype=torch.float64).cpu()
        l0_M = output.latents.l0_M()
        self._coded += len(l0_M)
        self._active += float(l0_M.sum())
        self._fired_F |= output.latents.fired_F(self._latents).cpu()
        if output.layer_M is not None:
            use_L = torch.bincount(output.layer_M, minlength=len(self._layers)).double().cpu()
            self._use_L = use_L if self._use_L is None else self._use_L + use_L
        if output.router_NL is not None:
            share_L = output.router_NL.sum(0, dtype=torch.float64).cpu()
            self._share_L = share_L if self._share_L is None else self._share_L + share_L
            self._entropy += float(torch.special.entr(output.router_NL).sum(dtype=torch.float64))

    def result(self) -> Reconstruction:
        """Divide; at least one batch was added."""
        variance = self._energy - float(self._sum_D.square().sum()) / self._vectors
        return Reconstruction(
            tokens=self._tokens,
            nmse=self._nmse / self._vectors,
            explained_variance=1 - self._squared_error / variance,
            l0=self._active / self._coded,
            dead_share=1 - float(self._fired_F.double().mean()),
            layer_use=self._by_layer(self._use_L, self._vectors),
            router_entropy=None if self._share_L is None else self._entropy / self._tokens,
            router_share=self._by_layer(self._share_L, self._tokens),
        )

    def _by_layer(self, sum_L: Tensor | None, count: int) -> dict[int, float] | None:
        if sum_L is None:
            return None
        return dict(zip(self._layers, (sum_L / count).tolist(), strict=True))


@dataclass(frozen=True, kw_only=True)
class RoutingQuality:
    """NMSE when each token is read from another layer than the router chose."""

    tokens: int
    """The first ones of the split."""
    router: float
    random: float
    """Expected for a layer drawn uniformly for each token."""
    oracle: float
    """For each token the layer it is reconstructed best from."""


class RoutingSums:
    """Adds up what `RoutingQuality` reports."""

    def __init__(self) -> None:
        self._tokens = 0
        self._router = self._random = self._oracle = 0.0

    def add(self, router_N: Tensor, every_LN: Tensor) -> None:
        """NMSE of N tokens as routed, and as read from each of L layers."""
        self._tokens += len(router_N)
        self._router += float(router_N.double().sum())
        self._random += float(every_LN.double().mean(0).sum())
        self._oracle += float(every_LN.double().amin(0).sum())

    def result(self) -> RoutingQuality:
        """Divide; at least one token was added."""
        n = self._tokens
        return RoutingQuality(
            tokens=n, router=self._router / n, random=self._random / n, oracle=self._oracle / n
        )
