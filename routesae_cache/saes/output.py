"""What an SAE returns: its loss, its reconstructions, and which latents were active."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Pairs(NamedTuple):
    """The active (row, latent) pairs, ordered by row."""

    row_P: Tensor
    """int64: the row of each pair."""
    index_P: Tensor
    """int64: the latent of each pair."""
    value_P: Tensor
    """The latent's value there; never 0."""


class RowLatents(NamedTuple):
    """The same number of latents in every row; a value of 0 marks an unused slot."""

    index_MK: Tensor
    """int64: latents, in no particular order."""
    value_MK: Tensor

    def detached(self) -> RowLatents:
        """The same without gradients."""
        return RowLatents(self.index_MK, self.value_MK.detach())

    def l0_M(self) -> Tensor:
        """Active latents per row."""
        return (self.value_MK != 0).sum(-1)

    def fired_F(self, latents: int) -> Tensor:
        """Which latents are active in any row, bool (F,)."""
        return _fired(self.index_MK.flatten(), self.value_MK.flatten(), latents)

    def pairs(self) -> Pairs:
        """The active pairs, for walking over them one by one."""
        row_P, slot_P = torch.nonzero(self.value_MK, as_tuple=True)
        return Pairs(row_P, self.index_MK[row_P, slot_P], self.value_MK[row_P, slot_P])

    def dense(self, latents: int) -> Tensor:
        """Values as (M, F)."""
        dense_MF = self.value_MK.new_zeros(self.value_MK.shape[0], latents)
        return dense_MF.scatter_(1, self.index_MK, self.value_MK)


class FlatLatents(NamedTuple):
    """Any number of latents a row, as a list of pairs; a value of 0 marks an unused pair."""

    row_P: Tensor
    """int64, ascending."""
    index_P: Tensor
    """int64: the latent of each pair."""
    value_P: Tensor
    rows: int

    def detached(self) -> FlatLatents:
        """The same without gradients."""
        return self._replace(value_P=self.value_P.detach())

    def l0_M(self) -> Tensor:
        """Active latents per row."""
        active_P = (self.value_P != 0).long()
        return active_P.new_zeros(self.rows).index_add_(0, self.row_P, active_P)

    def fired_F(self, latents: int) -> Tensor:
        """Which latents are active in any row, bool (F,)."""
        return _fired(self.index_P, self.value_P, latents)

    def pairs(self) -> Pairs:
        """The active pairs, for walking over them one by one."""
        keep_P = self.value_P != 0
        return Pairs(self.row_P[keep_P], self.index_P[keep_P], self.value_P[keep_P])

    def dense(self, latents: int) -> Tensor:
        """Values as (M, F)."""
        dense_MF = self.value_P.new_zeros(self.rows, latents)
        return dense_MF.index_put_((self.row_P, self.index_P), self.value_P, accumulate=True)


class DenseLatents(NamedTuple):
    """Every latent's value in every row, 0 where it is not active."""

    value_MF: Tensor

    def detached(self) -> DenseLatents:
        """The same without gradients."""
        return DenseLatents(self.value_MF.detach())

    def l0_M(self) -> Tensor:
        """Active latents per row."""
        return (self.value_MF != 0).sum(-1)

    def fired_F(self, latents: int) -> Tensor:
        """Which latents are active in any row, bool (F,)."""
        assert latents == self.value_MF.shape[1]
        return (self.value_MF != 0).any(0)

    def pairs(self) -> Pairs:
        """The active pairs, for walking over them one by one."""
        row_P, index_P = torch.nonzero(self.value_MF, as_tuple=True)
        return Pairs(row_P, index_P, self.value_MF[row_P, index_P])

    def dense(self, latents: int) -> Tensor:
        """Values as (M, F)."""
        assert latents == self.value_MF.shape[1]
        return self.value_MF


Latents = RowLatents | FlatLatents | DenseLatents


class Reading(NamedTuple):
    """Which latents are active, without what they reconstruct; all as in `SaeOutput`."""

    latents: Latents
    layer_M: Tensor | None
    router_NL: Tensor | None


class SaeOutput(NamedTuple):
    """One forward pass. M counts coded vectors: N tokens, or N*L where every layer is coded
    (token-major: vector m is token m // L at layer m % L). Everything but `loss` is detached."""

    loss: Tensor
    """Scalar to minimise: the mean of `nmse_M` plus the coder's own terms."""
    nmse_M: Tensor
    """mean_D (x̂ − t)² / mean_D t² of each coded vector, t its target."""
    target_MD: Tensor
    """What the coder was asked to reconstruct, which is what it read: the normalised residual,
    times the router's p where that factor is in use (`scale_M`)."""
    reconstruction_MD: Tensor
    """The coder's x̂, in the target's scale; divide by `scale_M` to be back at the residual's."""
    scale_M: Tensor | None
    """The factor p on each coded vector; None where there is none."""
    latents: Latents
    """Active latents; one row per coded vector, but one per token for the crosscoder."""
    layer_M: Tensor | None
    """Index into `config.layers` each vector was read from; None where there is no single one."""
    router_NL: Tensor | None
    """The router's probabilities; None where there is no router."""
    terms: dict[str, Tensor]
    """The coder's extra loss terms, weighted as they enter the loss, for logging."""


def _fired(index_P: Tensor, value_P: Tensor, latents: int) -> Tensor:
    hits_F = torch.zeros(latents, dtype=torch.int32, device=index_P.device)
    return hits_F.index_add_(0, index_P, (value_P != 0).int()) > 0
