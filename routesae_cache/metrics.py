"""Accumulators: sums and counts over tokens, divided once at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

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


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure and how well the rows that were read determine it."""

    mean: float
    se: float | None
    """Standard error over rows; None where there is one row alone."""


class RowSums:
    """Adds up several sums of each row, so that a figure made of them comes with its error.

    Rows are what is drawn; the tokens in one are not independent. Kept are the mean of the rows'
    sums and the products of their deviations from it: memory does not grow with rows.

    Args:
        sums: how many there are of each row, S.
    """

    def __init__(self, sums: int) -> None:
        self.rows = 0
        self._mean_S = torch.zeros(sums, dtype=torch.float64)
        self._products_SS = torch.zeros(sums, sums, dtype=torch.float64)

    def add(self, sums_RS: Tensor) -> None:
        """Add R rows, as Chan, Golub and LeVeque 1983 join two samples."""
        sums_RS = sums_RS.to("cpu", torch.float64)
        mean_S = sums_RS.mean(0)
        off_RS, shift_S = sums_RS - mean_S, mean_S - self._mean_S
        share = len(sums_RS) / (self.rows + len(sums_RS))
        self._products_SS += off_RS.T @ off_RS + self.rows * share * shift_S.outer(shift_S)
        self._mean_S += share * shift_S
        self.rows += len(sums_RS)

    def estimate(self, figure: Callable[[Tensor], Tensor]) -> Estimate:
        """A figure of the rows' mean sums (S,), with its standard error by the delta method.

        For a ratio of two sums that is the usual error of a ratio estimator over clusters.
        """
        mean_S = self._mean_S.clone().requires_grad_()
        value = figure(mean_S)
        (slope_S,) = torch.autograd.grad(value, mean_S)
        mean = float(value.detach())
        if self.rows == 1:
            return Estimate(mean=mean, se=None)
        variance = slope_S @ self._products_SS @ slope_S / (self.rows * (self.rows - 1))
        return Estimate(mean=mean, se=float(variance.clamp_min(0).sqrt()))


@dataclass(frozen=True, kw_only=True)
class SplicedMetrics:
    """What a reconstruction in the residual's place does to the model's predictions."""

    kl: Estimate
    """KL(original ‖ spliced) of the next-token distributions, in nats a token."""
    kl_per_row: Estimate
    """The same summed over a row's tokens, as the RouteSAE authors report it."""
    delta_ce: Estimate
    """Cross-entropy of the next token, spliced less original, in nats."""
    recovered: Estimate | None
    """1 - delta_ce / the same of the ablation; None where nothing was ablated."""


@dataclass(frozen=True, kw_only=True)
class Spliced(SplicedMetrics):
    """The spliced metrics of one SAE, the mean over layers where each is spliced alone."""

    rows: int
    tokens: int
    """Spliced and measured; those with a token after them count in cross-entropies."""
    scale: str
    """What a router's factor does: `exact` or `authors`."""
    ablation: str | None
    """What `recovered` compares with: `zero`, `mean` or nothing."""
    ce: float
    """Cross-entropy of the model as it is, in nats a token."""
    at_layer: int | None
    """The one layer asked for, of an SAE that reconstructs several."""
    per_layer: dict[int, SplicedMetrics] | None
    """Each layer spliced alone; None where there is one splice alone."""


class _MeanSums(NamedTuple):
    """Means over rows of their sums; C places."""

    tokens: Tensor
    nexts: Tensor
    kl_C: Tensor
    delta_C: Tensor
    ablated_C: Tensor
    """Means something where there is an ablation."""


class SplicedSums:
    """Adds up what `SplicedMetrics` reports, of one SAE spliced in C places, each by itself."""

    def __init__(self, places: int, *, ablated: bool) -> None:
        self._places, self._ablated = places, ablated
        self._sums = RowSums(3 + places * (3 if ablated else 2))
        self.tokens = 0
        """Added so far."""

    @property
    def rows(self) -> int:
        """Added so far."""
        return self._sums.rows

    def add(self, clean_R3: Tensor, kl_RC: Tensor, delta_RC: Tensor, ablated_RC: Tensor) -> None:
        """Add the sums of R rows.

        Args:
            clean_R3: number of tokens, number of those with a token after them, and the
                cross-entropy of the latter in the model as it is.
            delta_RC: how much more that is with the reconstruction in place.
            ablated_RC: how much more it is with the ablation in place; (R, 0) without one.
        """
        self.tokens += int(clean_R3[:, 0].sum())
        self._sums.add(torch.cat([clean_R3, kl_RC, delta_RC, ablated_RC], dim=1))

    def ce(self) -> float:
        """Cross-entropy of the model as it is, a token."""
        return self._sums.estimate(lambda mean_S: mean_S[2] / mean_S[1]).mean

    def result(self, place: int | None = None) -> SplicedMetrics:
        """Divide; of one place, or the mean over all."""
        chosen = slice(None) if place is None else slice(place, place + 1)

        def figure(of: Callable[[_MeanSums], Tensor]) -> Estimate:
            return self._sums.estimate(lambda mean_S: of(self._split(mean_S, chosen)).mean())

        return SplicedMetrics(
            kl=figure(lambda m: m.kl_C / m.tokens),
            kl_per_row=figure(lambda m: m.kl_C),
            delta_ce=figure(lambda m: m.delta_C / m.nexts),
            recovered=figure(lambda m: 1 - m.delta_C / m.ablated_C) if self._ablated else None,
        )

    def _split(self, mean_S: Tensor, chosen: slice) -> _MeanSums:
        tokens, nexts, _ = mean_S[:3]
        groups = mean_S[3:].reshape(-1, self._places)[:, chosen]
        return _MeanSums(tokens, nexts, groups[0], groups[1], groups[-1])
