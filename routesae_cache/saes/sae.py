"""One module for every architecture: a selector, a coder, and the state of training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from routesae_cache.losses import nmse, score_term
from routesae_cache.parallel import ALONE, World
from routesae_cache.saes.coders import Coded, Coder
from routesae_cache.saes.config import SaeConfig
from routesae_cache.saes.output import Latents, Reading, SaeOutput
from routesae_cache.saes.selectors import Selection, Selector

UNIT_NORM_EVERY = 10


class Sae(nn.Module):
    """A sparse autoencoder over the layers `config.layers`; build it with `registry.build_sae`.

    A training step is `sae(x_NLD).loss.backward()`, the optimiser, `sae.after_step(step)`; after
    the last step `sae.finish()`. Everything it has learned or counted is in its state dict.
    """

    step: Tensor
    tokens_since_fired_F: Tensor
    dead_F: Tensor

    def __init__(self, config: SaeConfig, width: int, selector: Selector, coder: Coder) -> None:
        super().__init__()
        self.config, self.width = config, width
        self.world = ALONE
        self.selector, self.coder = selector, coder
        self.revives = config.resolved_auxk(coder.stacked * width) > 0
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        counts_F = torch.zeros(config.latents, dtype=torch.int64)
        self.register_buffer("tokens_since_fired_F", counts_F)
        self.register_buffer("dead_F", counts_F.bool())
        self._dead_index: Tensor | None = None
        self.register_load_state_dict_post_hook(_list_dead_again)  # type: ignore[no-untyped-call]

    def join(self, world: World) -> None:
        """Be trained by several processes: `forward` is given a part of each batch in each."""
        self.world = self.coder.world = world

    def forward(self, x_NLD: Tensor) -> SaeOutput:
        """Loss and reconstruction of a batch; in training mode also counts which latents fired.

        Args:
            x_NLD: `config.layers` in order, normalised, float32.
        """
        assert x_NLD.shape[1:] == (len(self.config.layers), self.width)
        selection = self.selector(x_NLD, self.step, None)
        coded = self.coder(selection.vector_MD, self._dead_index)
        if self.training:
            self._count_fired(coded, x_NLD.shape[0])
        return self._output(selection, coded)

    @torch.no_grad()
    def inference(
        self,
        x_NLD: Tensor,
        *,
        infer_k: int | None = None,
        theta: float | None = None,
        layer_index_N: Tensor | None = None,
    ) -> SaeOutput:
        """Read latents by the coder's own rule, or another; changes no state.

        Args:
            x_NLD: as for `forward`.
            infer_k: keep the k largest latents of each vector instead.
            theta: keep latents above this value instead.
            layer_index_N: read each token from this layer (index into `config.layers`) instead of
                the selector's choice.

        Raises:
            ValueError: if both rules are given, k exceeds the latents, or the selector does not
                choose a layer per token.
        """
        selection, latents = self._read(x_NLD, infer_k, theta, layer_index_N)
        return self._output(selection, Coded(latents, self.coder.decode(latents), {}))

    @torch.no_grad()
    def read(
        self, x_NLD: Tensor, *, infer_k: int | None = None, theta: float | None = None
    ) -> Reading:
        """As `inference`, short of the reconstruction and its error."""
        selection, latents = self._read(x_NLD, infer_k, theta, None)
        return Reading(latents, selection.layer_M, selection.router_NL)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """To be called after every optimiser step; scales directions and lists dead latents.

        Args:
            step: steps taken so far, this one included.
        """
        self.step.fill_(step)
        if step % UNIT_NORM_EVERY == 0:
            self.coder.unit_norm_()
            self.dead_F.copy_(self.tokens_since_fired_F >= self.config.dead_window_tokens)
            self._list_dead()

    @torch.no_grad()
    def finish(self) -> None:
        """To be called once after training: every direction gets unit norm."""
        self.coder.unit_norm_()

    @torch.no_grad()
    def initialise_bias(self, x_NLD: Tensor) -> None:
        """Start b_pre as `config.init_bias` says.

        Args:
            x_NLD: a sample of the training data, as for `forward`.
        """
        self.coder.initialise_bias_(self.selector(x_NLD, None, None).vector_MD)

    def direction_FD(self, layer_index: int = 0) -> Tensor:
        """Each latent's direction, a row of width D.

        Args:
            layer_index: index into `config.layers`; only the crosscoder's directions differ by it.
        """
        if self.coder.stacked == 1:
            return self.coder.decoder
        return self.coder.decoder.view(-1, self.coder.stacked, self.width)[:, layer_index]

    def _read(
        self,
        x_NLD: Tensor,
        infer_k: int | None,
        theta: float | None,
        layer_index_N: Tensor | None,
    ) -> tuple[Selection, Latents]:
        check_inference_rule(self.config, infer_k=infer_k, theta=theta)
        selection = self.selector(x_NLD, None, layer_index_N)
        return selection, self.coder.read(selection.vector_MD, infer_k, theta)

    def _output(self, selection: Selection, coded: Coded) -> SaeOutput:
        target_MD = selection.vector_MD.reshape(-1, self.width)
        reconstruction_MD = coded.reconstruction_MD.reshape(-1, self.width)
        nmse_M = nmse(reconstruction_MD, target_MD)
        loss = nmse_M.mean()
        for term in coded.terms.values():
            loss = loss + term
        if selection.log_probability_N is not None:
            baseline = self.world.mean(nmse_M.detach().mean())
            loss = loss + score_term(nmse_M, selection.log_probability_N, baseline)
        return SaeOutput(
            loss=loss,
            nmse_M=nmse_M.detach(),
            target_MD=target_MD.detach(),
            reconstruction_MD=reconstruction_MD.detach(),
            scale_M=None if selection.scale_M is None else selection.scale_M.detach(),
            latents=coded.latents.detached(),
            layer_M=selection.layer_M,
            router_NL=None if selection.router_NL is None else selection.router_NL.detach(),
            terms={name: term.detach() for name, term in coded.terms.items()},
        )

    @torch.no_grad()
    def _count_fired(self, coded: Coded, tokens: int) -> None:
        fired_F = self.world.union(coded.latents.fired_F(self.config.latents))
        self.tokens_since_fired_F.add_(tokens * self.world.size).masked_fill_(fired_F, 0)

    def _list_dead(self) -> None:
        dead_index = torch.nonzero(self.dead_F).flatten() if self.revives else None
        has_dead = dead_index is not None and dead_index.shape[0] > 0
        self._dead_index = dead_index if has_dead else None


def check_inference_rule(config: SaeConfig, *, infer_k: int | None, theta: float | None) -> None:
    """Refuse contradicting rules for reading latents.

    Raises:
        ValueError: if both are given, or k is not between 1 and the number of latents.
    """
    if infer_k is not None and theta is not None:
        raise ValueError(f"infer_k={infer_k} and theta={theta:g} contradict each other: give one")
    if infer_k is not None and not 1 <= infer_k <= config.latents:
        raise ValueError(f"infer_k must lie between 1 and latents={config.latents}; got {infer_k}")


def _list_dead_again(sae: Sae, _: object) -> None:
    sae._list_dead()
