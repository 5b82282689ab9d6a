"""The coders of the TopK family, on the sparse kernels, and AuxK."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from routesae_cache import kernels
from routesae_cache.losses import nmse
from routesae_cache.saes.coders import Coded, Coder
from routesae_cache.saes.config import SaeConfig
from routesae_cache.saes.output import DenseLatents, FlatLatents, Latents, RowLatents
from routesae_cache.selection import Chosen, select_batchtopk, select_topk

THRESHOLD_RATE = 0.05
"""Share of the newest batch in BatchTopK's running threshold. The smallest active value of a batch
of many thousands hardly varies from batch to batch, so a short memory follows training closely."""


class TopKCoder(Coder):
    """TopK_k(W_e (x − b_pre) + b_lat), values kept as they are (RouteSAE; Gao et al. 2024 add a
    ReLU). Dead latents are revived by AuxK (Gao et al. 2024, "Scaling and evaluating sparse
    autoencoders", appendix A.2): the k_aux strongest dead latents reconstruct the main error."""

    def __init__(
        self, config: SaeConfig, width: int, *, stacked: int, generator: torch.Generator
    ) -> None:
        super().__init__(config, width, stacked=stacked, generator=generator)
        self.latent_bias = nn.Parameter(torch.zeros(config.latents))
        assert config.k is not None
        self.k = config.k
        self.auxk = config.resolved_auxk(stacked * width)

    def forward(self, x_MD: Tensor, dead_index: Tensor | None) -> Coded:
        value_P, support = self.encode(x_MD)
        decoded_MD = kernels.sparse_decode(value_P, self.decoder, self.pre_bias, support)
        terms = self.auxk_terms(x_MD, decoded_MD, dead_index)
        return Coded(self.as_latents(value_P, support), decoded_MD, terms)

    def encode(self, x_MD: Tensor) -> tuple[Tensor, kernels.Support]:
        """The active values, with their gradients attached, and where they are."""
        centred_MD = self.centred(x_MD)
        support, value_P = self.select(centred_MD)
        value_P = kernels.chosen_values(
            x_MD,
            self.centre,
            self.encoder,
            self.latent_bias,
            centred_MD=centred_MD,
            value_P=value_P,
            support=support,
        )
        return self.activate(value_P), support

    @torch.no_grad()
    def select(self, centred_MD: Tensor) -> Chosen:
        """The active latents: those of the largest values, or of the largest values times summed
        decoder norms where the crosscoder weights by those."""
        if not self.weighted:
            return self.rule(centred_MD, self.encoder, self.latent_bias)
        cost_F = self.cost_F()
        encoder_FD, bias_F = self.encoder * cost_F[:, None], self.latent_bias * cost_F
        support, value_P = self.rule(centred_MD, encoder_FD, bias_F)
        return Chosen(support, value_P / cost_F[support.index_P])

    def rule(self, centred_MD: Tensor, encoder_FD: Tensor, bias_F: Tensor) -> Chosen:
        """Which pre-activations are active."""
        return select_topk(centred_MD, encoder_FD, bias_F, self.k, self.config.encode_dtype)

    def cost_F(self) -> Tensor:
        """Summed decoder norms of each latent."""
        return self.decoder_norms().sum(-1).clamp_min(1e-12)

    def as_latents(self, value_P: Tensor, support: kernels.Support) -> Latents:
        """The selected pairs as latents."""
        index_MK = support.index_P.view(-1, self.k)
        return RowLatents(index_MK, value_P.detach().view_as(index_MK))

    @torch.no_grad()
    def centred(self, x_MD: Tensor) -> Tensor:
        """What the encoder multiplies."""
        return x_MD if self.centre is None else x_MD - self.centre

    def candidates(self, x_MD: Tensor) -> Tensor:
        return kernels.linear(x_MD, self.centre, self.encoder, self.latent_bias)

    def active(self, x_MD: Tensor) -> Latents:
        support, value_P = self.select(self.centred(x_MD))
        return self.as_latents(value_P, support)

    def auxk_terms(
        self, x_MD: Tensor, decoded_MD: Tensor, dead_index: Tensor | None
    ) -> dict[str, Tensor]:
        """NMSE of the main error as the dead latents reconstruct it, times its weight."""
        if dead_index is None:
            return {}
        error_MD = (x_MD - decoded_MD).detach()
        value_MA = kernels.linear(
            x_MD, self.centre, self.encoder[dead_index], self.latent_bias[dead_index]
        )
        if self.auxk < dead_index.shape[0]:
            top = value_MA.topk(self.auxk, sorted=False)
            value_MA = torch.zeros_like(value_MA).scatter(1, top.indices, top.values)
        aux_MD = kernels.dense_decode(self.activate(value_MA), self.decoder[dead_index], None)
        return {"auxk": self.config.auxk_weight * nmse(aux_MD, error_MD).mean()}

    def activate(self, value: Tensor) -> Tensor:
        """What is applied to values after selection: nothing here, ReLU in BatchTopK."""
        return value


class BatchTopKCoder(TopKCoder):
    """The M·k largest of ReLU(W_e (x − b_pre) + b_lat) over a batch of M vectors (Bussmann et al.
    2024, "BatchTopK Sparse Autoencoders"). At inference a latent is active above a threshold: the
    running mean of the smallest active value of each training batch."""

    threshold: Tensor
    threshold_updates: Tensor

    def __init__(
        self, config: SaeConfig, width: int, *, stacked: int, generator: torch.Generator
    ) -> None:
        super().__init__(config, width, stacked=stacked, generator=generator)
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("threshold_updates", torch.zeros((), dtype=torch.int64))

    def rule(self, centred_MD: Tensor, encoder_FD: Tensor, bias_F: Tensor) -> Chosen:
        """The batch's largest; in training mode also moves the running threshold."""
        dtype = self.config.encode_dtype
        top = self.world.batch_top
        chosen = select_batchtopk(centred_MD, encoder_FD, bias_F, self.k, dtype, top)
        if self.training:
            self.move_threshold(chosen.value_P)
        return chosen

    def as_latents(self, value_P: Tensor, support: kernels.Support) -> Latents:
        return FlatLatents(support.row_P, support.index_P, value_P.detach(), support.rows)

    @torch.no_grad()
    def move_threshold(self, value_P: Tensor) -> None:
        """Take the batch's smallest positive value into the running threshold."""
        own_smallest = torch.where(value_P > 0, value_P, float("inf")).min()
        smallest = self.world.least(own_smallest)
        rate = (1 / (self.threshold_updates + 1)).clamp_min(THRESHOLD_RATE)
        moved = torch.lerp(self.threshold, smallest, rate)
        self.threshold.copy_(torch.where(smallest.isinf(), self.threshold, moved))
        self.threshold_updates += smallest.isfinite()

    def candidates(self, x_MD: Tensor) -> Tensor:
        return F.relu(super().candidates(x_MD))

    def active(self, x_MD: Tensor) -> Latents:
        value_MF = self.candidates(x_MD)
        compared_MF = value_MF * self.cost_F() if self.weighted else value_MF
        return DenseLatents(torch.where(compared_MF > self.threshold, value_MF, 0.0))

    def activate(self, value: Tensor) -> Tensor:
        return F.relu(value)


class MatryoshkaCoder(BatchTopKCoder):
    """BatchTopK whose first groups of latents must reconstruct on their own: the loss is the sum of
    the errors of every prefix of the groups (Bussmann et al. 2025, "Learning Multi-Level Features
    with Matryoshka Sparse Autoencoders"). `terms["prefixes"]` are the prefixes short of all."""

    group_F: Tensor

    def __init__(
        self, config: SaeConfig, width: int, *, stacked: int, generator: torch.Generator
    ) -> None:
        super().__init__(config, width, stacked=stacked, generator=generator)
        sizes = torch.tensor(config.resolved_groups())
        self.groups = len(sizes)
        numbers = torch.arange(self.groups)
        self.register_buffer("group_F", numbers.repeat_interleave(sizes), persistent=False)

    def forward(self, x_MD: Tensor, dead_index: Tensor | None) -> Coded:
        value_P, support = self.encode(x_MD)
        bag_P = support.row_P * self.groups + self.group_F[support.index_P]
        bags = support.regrouped(bag_P, support.rows * self.groups)
        parts_BD = kernels.sparse_decode(value_P, self.decoder, None, bags)
        decoded_MD, *rest = parts_BD.view(support.rows, self.groups, -1).unbind(1)
        if self.pre_bias is not None:
            decoded_MD = decoded_MD + self.pre_bias
        prefixes = []
        for part_MD in rest:
            prefixes.append(nmse(decoded_MD, x_MD).mean())
            decoded_MD = decoded_MD + part_MD
        terms = self.auxk_terms(x_MD, decoded_MD, dead_index)
        if prefixes:
            terms["prefixes"] = torch.stack(prefixes).sum()
        return Coded(self.as_latents(value_P, support), decoded_MD, terms)
