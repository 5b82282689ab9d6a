"""Latents of an SAE at other values, and what that adds to the residuals they are read from.

A latent's value z becomes z', and the residual x changes by std/p · (z' − z) · W_d, std being what
normalised it and p the router's factor where the SAE was trained with one. What the SAE does not
reconstruct stays in x, so that a change of nothing changes nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from routesae_cache.checkpoint import RunConfig
from routesae_cache.saes.config import SaeConfig
from routesae_cache.saes.output import Latents
from routesae_cache.trained import Residuals, TrainedSae

ChangeKind = Literal["set", "add", "multiply"]
_CHANGED: dict[ChangeKind, Callable[[Tensor, float], Tensor]] = {
    "set": torch.full_like,
    "add": torch.add,
    "multiply": torch.mul,
}


@dataclass(frozen=True, kw_only=True)
class LatentChange:
    """What happens to a latent at every token; where it is not active its value is 0."""

    latent: int
    kind: ChangeKind
    value: float

    def __post_init__(self) -> None:
        if not abs(self.value) <= torch.finfo(torch.float32).max:
            raise ValueError(
                f"latent {self.latent}: expected a finite value to {self.kind}, found {self.value}"
            )


class Delta(NamedTuple):
    """What changed latents do to N tokens."""

    added_NLD: Tensor
    """To be added to the residuals, in their own scale."""
    index_N: Tensor | None
    """The layer where each token was read, as an index into them; None where all are together."""


class ChangedLatents:
    """A finished SAE, some of whose latents are changed.

    Args:
        at_layer: change the residual at this layer alone; for SAEs that read every layer of a
            token, and None for all of them.

    Raises:
        ValueError: for no or contradicting changes, for latents and layers that the SAE does not
            have, for `at_layer` where there is no choice of one, and for soft routing.
    """

    def __init__(
        self, sae: TrainedSae, changes: Sequence[LatentChange], at_layer: int | None = None
    ) -> None:
        config = sae.config.sae
        _check_changes(config, changes)
        _check_layer(config, at_layer)
        self._sae, self._changes = sae, tuple(changes)
        self._latents = [change.latent for change in changes]
        self._direction_SED = _directions(sae, self._latents)
        self.layers_read = config.layers
        self.layers_changed = config.layers if at_layer is None else (at_layer,)
        self.reads_layers_apart = config.selector in ("fixed", "every")
        """Whether what is read at a layer is independent of the other layers."""
        self._apart = {layer: _reading_one(sae.config, layer) for layer in config.layers}

    def delta(self, x_NLD: Tensor) -> Delta:
        """Read tokens at all layers and change the latents.

        Args:
            x_NLD: residuals at `layers_read`, as the model has them.
        """
        return self._delta(self._sae.config, x_NLD)

    def added_at(self, layer: int, x_ND: Tensor) -> Tensor:
        """Read tokens at one layer, apart from the others; returns what is added there, (N, D)."""
        return self._delta(self._apart[layer], x_ND[:, None]).added_NLD[:, 0]

    def _delta(self, config: RunConfig, x_NLD: Tensor) -> Delta:
        seen = Residuals(x_NLD.float(), config.sae.layers).seen_by(config)
        output = self._sae(seen.x)
        move_NE = self._moves(_values(output.latents, self._latents, len(x_NLD)))
        std_NL1 = seen.std.expand(*seen.x.shape[:2], 1)
        if config.sae.selector == "all":
            stacked_NLD = torch.einsum("ne,led->nld", move_NE, self._direction_SED)
            return Delta(stacked_NLD * std_NL1, None)
        assert output.layer_M is not None
        added_ND = move_NE @ self._direction_SED[0]
        if output.scale_M is not None:
            added_ND = added_ND / output.scale_M[:, None]
        token_N = torch.arange(len(x_NLD), device=x_NLD.device)
        added_NLD = torch.zeros_like(seen.x)
        added_NLD[token_N, output.layer_M] = added_ND * std_NL1[token_N, output.layer_M]
        return Delta(added_NLD, output.layer_M)

    def _moves(self, value_NE: Tensor) -> Tensor:
        """z' − z."""
        pairs = zip(self._changes, value_NE.unbind(1), strict=True)
        return torch.stack([_CHANGED[c.kind](z_N, c.value) - z_N for c, z_N in pairs], dim=1)


def _reading_one(config: RunConfig, layer: int) -> RunConfig:
    return dataclasses.replace(config, sae=dataclasses.replace(config.sae, layers=(layer,)))


def _values(latents: Latents, wanted: Sequence[int], rows: int) -> Tensor:
    """The values of E latents, 0 where they are not active; (rows, E)."""
    pairs = latents.pairs()
    value_NE = pairs.value_P.new_zeros(rows, len(wanted))
    for column, latent in enumerate(wanted):
        here_P = pairs.index_P == latent
        value_NE[pairs.row_P[here_P], column] = pairs.value_P[here_P]
    return value_NE


def _directions(sae: TrainedSae, latents: Sequence[int]) -> Tensor:
    """Directions (E, D) of some latents: one for each layer in the crosscoder, else one for all."""
    stacked = sae.sae.coder.stacked
    return torch.stack([sae.sae.direction_FD(i)[list(latents)] for i in range(stacked)]).detach()


def _check_changes(sae: SaeConfig, changes: Sequence[LatentChange]) -> None:
    if sae.selector == "route" and not sae.hard:
        raise ValueError(
            "soft routing reads a mixture of the layers, so there is no layer at which to change a "
            "latent; expected hard routing or another SAE"
        )
    latents = [change.latent for change in changes]
    if not latents:
        raise ValueError("expected at least one latent to change, found none")
    if beyond := [latent for latent in latents if not 0 <= latent < sae.latents]:
        raise ValueError(f"expected latents from 0 to {sae.latents - 1}, found {beyond}")
    if twice := sorted({latent for latent in latents if latents.count(latent) > 1}):
        raise ValueError(f"expected one change of each latent, found several of {twice}")


def _check_layer(sae: SaeConfig, at_layer: int | None) -> None:
    if at_layer is None:
        return
    if sae.selector not in ("every", "all"):
        raise ValueError(
            f"at layer {at_layer}: only for SAEs that read every layer of a token (MLSAE, "
            f"crosscoder), and {sae.name} reads one; leave it out"
        )
    if at_layer not in sae.layers:
        raise ValueError(f"expected one of the SAE's layers {list(sae.layers)}, found {at_layer}")
