"""Coders: sparse autoencoders on vectors, whichever layer a vector came from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from routesae_cache.kernels import Support, dense_decode, linear, row_support, sparse_decode
from routesae_cache.losses import geometric_median, jumprelu_and_l0, mean_l1, nmse
from routesae_cache.parallel import ALONE, World
from routesae_cache.saes.config import SaeConfig
from routesae_cache.saes.output import DenseLatents, FlatLatents, Latents, RowLatents


class Coded(NamedTuple):
    """What a coder makes of its vectors."""

    latents: Latents
    reconstruction_MD: Tensor
    terms: dict[str, Tensor]
    """Extra loss terms, weighted."""


class Coder(nn.Module, ABC):
    """Encoder rows (F, D), decoder rows (F, D) and the bias b_pre, which both sides share.

    The crosscoder gives it all layers of a token as one vector: then D counts `stacked` layers of
    `width` each, nothing is subtracted before encoding, and norms are per layer.

    Args:
        width: of one layer's residual.
        stacked: layers that make up one vector.
        generator: seeds the weights; the encoder is drawn as `nn.Linear` draws it, and the decoder
            starts as its rows scaled to unit norm.
    """

    encoder: nn.Parameter
    decoder: nn.Parameter
    pre_bias: nn.Parameter | None
    world: World = ALONE
    """Of whose batch `forward` is given a part."""

    def __init__(
        self, config: SaeConfig, width: int, *, stacked: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.config, self.width, self.stacked = config, width, stacked
        self.centres = config.selector != "all"
        self.weighted = config.crosscoder_weighting == "decoder-norm"
        shape = (config.latents, stacked * width)
        bound = width**-0.5
        self.encoder = nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=generator))
        self.decoder = nn.Parameter(self.encoder.detach().clone())
        has_bias = self.centres or config.crosscoder_bias
        self.pre_bias = nn.Parameter(torch.zeros(shape[1])) if has_bias else None
        self.unit_norm_()

    @abstractmethod
    def forward(self, x_MD: Tensor, dead_index: Tensor | None) -> Coded:
        """Encode and decode for training.

        Args:
            dead_index: latents that AuxK should revive; None where there are none.
        """

    @abstractmethod
    def candidates(self, x_MD: Tensor) -> Tensor:
        """Every latent's value (M, F) before the coder's own rule decides which are active."""

    @abstractmethod
    def active(self, x_MD: Tensor) -> Latents:
        """The latents that the coder's own rule makes active, at inference."""

    def read(self, x_MD: Tensor, infer_k: int | None, theta: float | None) -> Latents:
        """Active latents by the coder's own rule, or the k largest, or those above theta."""
        if infer_k is not None:
            top = self.candidates(x_MD).topk(infer_k, sorted=False)
            return RowLatents(top.indices, top.values)
        if theta is not None:
            value_MF = self.candidates(x_MD)
            return DenseLatents(torch.where(value_MF > theta, value_MF, 0.0))
        return self.active(x_MD)

    def decode(self, latents: Latents) -> Tensor:
        """x̂ = W_d z + b_pre, (M, D)."""
        match latents:
            case DenseLatents(value_MF):
                return self.decode_dense(value_MF)
            case RowLatents(index_MK, value_MK):
                support = row_support(index_MK, self.config.latents)
                return sparse_decode(value_MK.reshape(-1), self.decoder, self.pre_bias, support)
            case FlatLatents(row_P, index_P, value_P, rows):
                support = Support(row_P, index_P, rows=rows, latents=self.config.latents)
                return sparse_decode(value_P, self.decoder, self.pre_bias, support)

    def decode_dense(self, value_MF: Tensor) -> Tensor:
        """x̂ = W_d z + b_pre from every latent's value."""
        return dense_decode(value_MF, self.decoder, self.pre_bias)

    @property
    def centre(self) -> Tensor | None:
        """What is subtracted before encoding: b_pre, nothing for the crosscoder."""
        return self.pre_bias if self.centres else None

    def decoder_norms(self) -> Tensor:
        """Norm of each latent's direction in each stacked layer, (F, stacked)."""
        blocks_FLD = self.decoder.view(-1, self.stacked, self.width)
        norms: Tensor = torch.linalg.vector_norm(blocks_FLD, dim=-1)
        return norms

    @torch.no_grad()
    def unit_norm_(self) -> None:
        """Scale every direction to unit norm, except where the norms are part of the loss."""
        if not self.weighted:
            blocks = self.decoder.view(-1, self.stacked, self.width)
            blocks.div_(self.decoder_norms().clamp_min(1e-12)[..., None])

    @torch.no_grad()
    def initialise_bias_(self, vectors_MD: Tensor) -> None:
        """Start b_pre as `config.init_bias` says, from a sample of the coder's input."""
        if self.pre_bias is None or self.config.init_bias == "zero":
            return
        starts = {"mean": lambda v_MD: v_MD.mean(0), "median": geometric_median}
        self.pre_bias.copy_(starts[self.config.init_bias](vectors_MD))


class ReluCoder(Coder):
    """ReLU(W_e (x − b_pre) + b_lat) with an L1 penalty: mean over tokens and latents (RouteSAE's
    Vanilla), each latent weighted by its summed decoder norms where the crosscoder asks for that
    (Lindsey et al. 2024, "Sparse Crosscoders")."""

    def __init__(
        self, config: SaeConfig, width: int, *, stacked: int, generator: torch.Generator
    ) -> None:
        super().__init__(config, width, stacked=stacked, generator=generator)
        self.latent_bias = nn.Parameter(torch.zeros(config.latents))

    def forward(self, x_MD: Tensor, dead_index: Tensor | None) -> Coded:
        value_MF = self.candidates(x_MD)
        cost_MF = value_MF * self.decoder_norms().sum(-1) if self.weighted else value_MF
        assert self.config.sparsity_weight is not None
        terms = {"l1": self.config.sparsity_weight * mean_l1(cost_MF)}
        return Coded(DenseLatents(value_MF), self.decode_dense(value_MF), terms)

    def candidates(self, x_MD: Tensor) -> Tensor:
        return F.relu(linear(x_MD, self.centre, self.encoder, self.latent_bias))

    def active(self, x_MD: Tensor) -> Latents:
        return DenseLatents(self.candidates(x_MD))


class GatedCoder(Coder):
    """A gate 1[W_e(x − b_pre) + b_gate > 0] times ReLU(exp(r) · W_e(x − b_pre) + b_mag).

    Loss of the Gated-SAE paper (Rajamanoharan et al. 2024, "Improving Dictionary Learning with
    Gated Sparse Autoencoders", eq. 8): L1 on ReLU(π_gate), and the error of a reconstruction from
    ReLU(π_gate) through a frozen decoder; both with this project's means over tokens (and latents).
    `gated_aux="authors"`: the RouteSAE authors' bare L1 on z, which gives the gate no gradient.
    """

    def __init__(
        self, config: SaeConfig, width: int, *, stacked: int, generator: torch.Generator
    ) -> None:
        super().__init__(config, width, stacked=stacked, generator=generator)
        self.gate_bias = nn.Parameter(torch.zeros(config.latents))
        self.mag_bias = nn.Parameter(torch.zeros(config.latents))
        self.r_mag = nn.Parameter(torch.zeros(config.latents))

    def forward(self, x_MD: Tensor, dead_index: Tensor | None) -> Coded:
        gate_MF, value_MF = self._gate_and_value(x_MD)
        weight = self.config.sparsity_weight
        assert weight is not None
        if self.config.gated_aux == "authors":
            terms = {"l1": weight * mean_l1(value_MF)}
        else:
            open_MF = F.relu(gate_MF)
            bias_D = None if self.pre_bias is None else self.pre_bias.detach()
            frozen_MD = dense_decode(open_MF, self.decoder.detach(), bias_D)
            terms = {"l1": weight * mean_l1(open_MF), "gate": nmse(frozen_MD, x_MD).mean()}
        return Coded(DenseLatents(value_MF), self.decode_dense(value_MF), terms)

    def candidates(self, x_MD: Tensor) -> Tensor:
        return self._gate_and_value(x_MD)[1]

    def active(self, x_MD: Tensor) -> Latents:
        return DenseLatents(self.candidates(x_MD))

    def _gate_and_value(self, x_MD: Tensor) -> tuple[Tensor, Tensor]:
        product_MF = linear(x_MD, self.centre, self.encoder, None)
        gate_MF = product_MF + self.gate_bias
        magnitude_MF = F.relu(product_MF * self.r_mag.exp() + self.mag_bias)
        return gate_MF, torch.where(gate_MF > 0, magnitude_MF, 0.0)


class JumpReluCoder(Coder):
    """u · 1[u > θ] with one learned θ per latent and an L0 penalty on the pre-activations u
    (Rajamanoharan et al. 2024, "Jumping Ahead"). θ itself is learned, not its logarithm."""

    def __init__(
        self, config: SaeConfig, width: int, *, stacked: int, generator: torch.Generator
    ) -> None:
        super().__init__(config, width, stacked=stacked, generator=generator)
        self.latent_bias = nn.Parameter(torch.zeros(config.latents))
        self.threshold = nn.Parameter(torch.full((config.latents,), config.initial_threshold))

    def forward(self, x_MD: Tensor, dead_index: Tensor | None) -> Coded:
        pre_MF = self.candidates(x_MD)
        value_MF, l0 = jumprelu_and_l0(pre_MF, self.threshold, self.config.bandwidth)
        assert self.config.sparsity_weight is not None
        terms = {"l0": self.config.sparsity_weight * l0}
        return Coded(DenseLatents(value_MF), self.decode_dense(value_MF), terms)

    def candidates(self, x_MD: Tensor) -> Tensor:
        return linear(x_MD, self.centre, self.encoder, self.latent_bias)

    def active(self, x_MD: Tensor) -> Latents:
        pre_MF = self.candidates(x_MD)
        return DenseLatents(torch.where(pre_MF > self.threshold, pre_MF, 0.0))
