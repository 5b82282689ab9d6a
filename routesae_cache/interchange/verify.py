"""How far the reconstructions of an exported SAE are from the run's own.

Two comparisons for each layer. *Exact*: residuals that nothing inexpressible touches, where only
rounding may differ. *As read*: the residuals that the SAE itself reads from the layer, as it reads
them, with everything that the other library does differently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from routesae_cache.checkpoint import RunConfig
from routesae_cache.interchange.activations import Activations, normalise
from routesae_cache.losses import nmse
from routesae_cache.saes.coders import Coder
from routesae_cache.saes.config import CoderKind
from routesae_cache.saes.output import DenseLatents, SaeOutput
from routesae_cache.saes.sae import Sae

TOLERANCE = 1e-4
"""Largest difference that is put down to rounding."""
_ROUNDING = 2.0**-20
"""Share of ‖w‖‖x‖ that two float32 products may differ by."""
_STD_FROM = 256.0
"""A standard deviation to which adding 1e-5 changes nothing in float32."""
BELOW, CLOSE_CALL = "a latent below 0", "a choice within rounding"


@dataclass(frozen=True, kw_only=True)
class AsRead:
    """The comparison on the residuals that the SAE reads from a layer, as they are."""

    count: int
    largest: float | None
    """Largest difference; this and the others are None where the SAE reads none."""
    nmse_run: float | None
    """NormMSE of the run's own reconstructions."""
    nmse_export: float | None
    """NormMSE of the exported SAE's."""
    gate: float | None
    """Mean of the router's factor p; None also where the SAE has no such factor."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One layer's comparison. A difference is the largest over channels, in units of the residual's
    own standard deviation over channels, whatever `--norm` was."""

    layer: int
    compared: int
    """Residuals of the layer that were looked at."""
    touched: Mapping[str, int]
    """Why some of them cannot agree -> how many."""
    exact_count: int
    """Residuals that nothing touches."""
    exact: float | None
    """Largest difference on those; None where there are none."""
    predicted: float | None
    """Largest difference on all but those that hang on rounding, once latents below 0 are set to 0
    in the run, too; None where there are none."""
    read: AsRead

    @property
    def ok(self) -> bool:
        """Whether there was something to compare, and it agreed."""
        return self.predicted is not None and self.predicted <= TOLERANCE


class Comparison:
    """A run and the residuals it is compared on; `layer` compares one exported layer."""

    def __init__(self, sae: Sae, config: RunConfig, activations: Activations) -> None:
        self._sae, self._config = sae, config
        self._x_NLD = activations.x_NLD
        self._normalised = normalise(config, self._x_NLD)
        self._output = sae.inference(self._normalised.x)

    @torch.no_grad()
    def layer(self, index: int, reconstruct: Callable[[Tensor], Tensor]) -> Difference:
        """Compare what a library makes of a layer.

        Args:
            index: into `config.layers`.
            reconstruct: (N, D) residuals as the model has them -> reconstructions.
        """
        difference_N, below_N, close_N = self._exact(self._x_NLD[:, index], reconstruct)
        clean_N = ~(below_N | close_N)
        return Difference(
            layer=self._config.sae.layers[index],
            compared=len(self._x_NLD),
            touched={BELOW: int(below_N.sum()), CLOSE_CALL: int(close_N.sum())},
            exact_count=int(clean_N.sum()),
            exact=_largest(difference_N[clean_N]),
            predicted=_largest(difference_N[~close_N]),
            read=self._as_read(index, reconstruct),
        )

    def _exact(
        self, x_ND: Tensor, reconstruct: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Difference of each residual once latents below 0 are 0 here, too; which residuals have
        such latents; which hang on rounding."""
        if self._config.sae.norm == "token":
            x_ND = _without_epsilon(x_ND)
        n_ND, mean_N1, unit_N1 = normalise(self._config, x_ND)
        coder, options = self._sae.coder, self._config.sae
        latents = coder.read(n_ND, options.k if options.coder == "topk" else None, None)
        value_NF = latents.dense(options.latents)
        ours_ND = coder.decode(DenseLatents(value_NF.clamp_min(0))) * unit_N1 + mean_N1
        close_N = CLOSE[options.coder](coder, n_ND, _margin(coder, n_ND))
        return _differences(reconstruct(x_ND), ours_ND, x_ND), (value_NF < 0).any(-1), close_N

    def _as_read(self, index: int, reconstruct: Callable[[Tensor], Tensor]) -> AsRead:
        output = self._output
        assert output.layer_M is not None
        row_M = torch.nonzero(output.layer_M == index).flatten()
        if not len(row_M):
            return AsRead(count=0, largest=None, nmse_run=None, nmse_export=None, gate=None)
        token_M = row_M // (len(output.layer_M) // len(self._x_NLD))
        n_MD, mean_M1, unit_M1 = (part[token_M, index] for part in self._normalised)
        x_MD, ours_MD = self._x_NLD[token_M, index], _unscaled(output, row_M)
        theirs_MD = reconstruct(x_MD)
        return AsRead(
            count=len(row_M),
            largest=_largest(_differences(theirs_MD, ours_MD * unit_M1 + mean_M1, x_MD)),
            nmse_run=_mean(nmse(ours_MD, n_MD)),
            nmse_export=_mean(nmse((theirs_MD - mean_M1) / unit_M1, n_MD)),
            gate=None if output.scale_M is None else _mean(output.scale_M[row_M]),
        )


def _differences(theirs_MD: Tensor, ours_MD: Tensor, x_MD: Tensor) -> Tensor:
    difference_M: Tensor = (theirs_MD - ours_MD).abs().amax(-1) / x_MD.std(-1)
    return difference_M


def _unscaled(output: SaeOutput, row_M: Tensor) -> Tensor:
    ours_MD = output.reconstruction_MD[row_M]
    return ours_MD if output.scale_M is None else ours_MD / output.scale_M[row_M, None]


def _without_epsilon(x_ND: Tensor) -> Tensor:
    """Each residual times a power of two, so large that no epsilon next to its standard deviation
    is more than rounding; the normalisation takes the factor out again."""
    exponent_N1 = torch.log2(_STD_FROM / x_ND.std(-1, keepdim=True)).ceil()
    return torch.ldexp(x_ND, exponent_N1)


def _margin(coder: Coder, x_ND: Tensor) -> Tensor:
    """How far two float32 computations of a pre-activation may lie apart, (N,)."""
    state: dict[str, Tensor] = coder.state_dict()
    length_N = torch.linalg.vector_norm(x_ND - state["pre_bias"], dim=-1)
    longest = torch.linalg.vector_norm(state["encoder"], dim=-1).max()
    biases = [state[name].abs().max() for name in state if name.endswith("_bias")]
    margin_N: Tensor = (length_N * longest + torch.stack(biases).max()) * _ROUNDING
    return margin_N


def _never(coder: Coder, x_ND: Tensor, margin_N: Tensor) -> Tensor:
    return torch.zeros_like(margin_N, dtype=torch.bool)


def _close_topk(coder: Coder, x_ND: Tensor, margin_N: Tensor) -> Tensor:
    """The last chosen latent and the first that is not are as good as equal."""
    k = coder.config.k
    assert k is not None
    if k == coder.config.latents:
        return _never(coder, x_ND, margin_N)
    best_NK = coder.candidates(x_ND).topk(k + 1).values
    gap_N: Tensor = best_NK[:, k - 1] - best_NK[:, k]
    return gap_N < 2 * margin_N


def _close_threshold(coder: Coder, x_ND: Tensor, margin_N: Tensor) -> Tensor:
    """A pre-activation is as good as equal to a threshold at which its latent jumps."""
    threshold: Tensor = coder.state_dict()["threshold"]
    near_NF = (coder.candidates(x_ND) - threshold).abs() < margin_N[:, None]
    return (near_NF & (threshold.abs() > margin_N[:, None])).any(-1)


def _close_gate(coder: Coder, x_ND: Tensor, margin_N: Tensor) -> Tensor:
    """A gate is as good as 0 where its latent jumps."""
    state: dict[str, Tensor] = coder.state_dict()
    product_NF = (x_ND - state["pre_bias"]) @ state["encoder"].T
    magnitude_NF = product_NF * state["r_mag"].exp() + state["mag_bias"]
    near_NF = (product_NF + state["gate_bias"]).abs() < margin_N[:, None]
    return (near_NF & (magnitude_NF > margin_N[:, None])).any(-1)


CLOSE: Mapping[CoderKind, Callable[[Coder, Tensor, Tensor], Tensor]] = {
    "relu": _never,
    "gated": _close_gate,
    "topk": _close_topk,
    "batchtopk": _close_threshold,
    "jumprelu": _close_threshold,
    "matryoshka": _close_threshold,
}
"""Residuals whose active latents hang on rounding, for each coder."""


def _largest(difference_N: Tensor) -> float | None:
    return float(difference_N.max()) if len(difference_N) else None


def _mean(value_N: Tensor) -> float:
    return float(value_N.double().mean())
