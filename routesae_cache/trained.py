"""Finished SAEs, checked against the store whose residuals they are to read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from routesae_cache.checkpoint import RunConfig, RunError, load_run
from routesae_cache.losses import Normalised, normalise_scalar, normalise_token
from routesae_cache.saes.output import Reading, SaeOutput
from routesae_cache.saes.sae import check_inference_rule
from stores.spec import Record, StoreSpec


@dataclass(frozen=True, kw_only=True)
class ReadingRule:
    """By which rule latents are read; at most one of the two."""

    infer_k: int | None = None
    """Keep the k largest latents instead of the coder's own rule."""
    theta: float | None = None
    """Keep latents above this value instead of the coder's own rule."""


OWN_RULE = ReadingRule()


class Residuals:
    """Residuals of a batch of tokens, normalised once for however many SAEs read them.

    Args:
        x_NLD: as the model gave them, float32.
        layers: which they are, in order.
    """

    def __init__(self, x_NLD: Tensor, layers: Sequence[int]) -> None:
        self.x_NLD, self.layers = x_NLD, tuple(layers)

    def __len__(self) -> int:
        return len(self.x_NLD)

    @cached_property
    def _by_token(self) -> Normalised:
        return normalise_token(self.x_NLD)

    def seen_by(self, config: RunConfig) -> Normalised:
        """The layers of an SAE, (N, L, D), normalised as it was trained, and what undoes it."""
        index = [self.layers.index(layer) for layer in config.sae.layers]
        if config.sae.norm == "token":
            return Normalised(*(part[:, index] for part in self._by_token))
        zero, one = self.x_NLD.new_zeros(1, 1, 1), self.x_NLD.new_ones(1, 1, 1)
        x_NLD = self.x_NLD[:, index]
        if config.sae.norm == "none":
            return Normalised(x_NLD, zero, one)
        return Normalised(
            normalise_scalar(x_NLD, config.mean_square), zero, one * config.mean_square**0.5
        )


class TrainedSae:
    """A finished run's SAE.

    Args:
        run: the run's directory.
        spec: of the store whose residuals it is to read.

    Raises:
        RunError: for what is no finished run, was trained on another model's residuals, or reads
            layers that the store lacks.
        ValueError: for a contradicting rule.
    """

    def __init__(
        self,
        run: Path,
        spec: StoreSpec,
        *,
        rule: ReadingRule = OWN_RULE,
        device: str = "cpu",
    ) -> None:
        self.run, self.rule = run, rule
        self.sae, self.config = load_run(run, device)
        _check_source(run, self.config, spec)
        check_inference_rule(self.config.sae, infer_k=rule.infer_k, theta=rule.theta)

    def __call__(self, x_NLD: Tensor, layer_index_N: Tensor | None = None) -> SaeOutput:
        """Read latents by the rule.

        Args:
            x_NLD: `Residuals.seen_by(self.config).x`.
            layer_index_N: as `Sae.inference` has it.
        """
        return self.sae.inference(
            x_NLD, infer_k=self.rule.infer_k, theta=self.rule.theta, layer_index_N=layer_index_N
        )

    def read(self, x_NLD: Tensor) -> Reading:
        """The same latents, without what they reconstruct."""
        return self.sae.read(x_NLD, infer_k=self.rule.infer_k, theta=self.rule.theta)


def layers_read(configs: Iterable[RunConfig]) -> tuple[int, ...]:
    """Every layer that one of several SAEs reads, ascending."""
    return tuple(sorted({layer for config in configs for layer in config.sae.layers}))


def reconstruction_MD(output: SaeOutput, seen: Normalised) -> Tensor:
    """Reconstructions in the scale of the model's residuals, one of each coded vector.

    Args:
        seen: the SAE's input, as `Residuals.seen_by` gave it.

    Raises:
        ValueError: if the SAE mixes layers (soft routing): a mixture has no single scale.
    """
    if output.layer_M is None:
        raise ValueError("soft routing mixes layers: its reconstruction belongs to none of them")
    vectors_MD = output.reconstruction_MD
    if output.scale_M is not None:
        vectors_MD = vectors_MD / output.scale_M[:, None]
    tokens, layers = seen.x.shape[:2]
    token_M = torch.arange(tokens, device=vectors_MD.device)
    token_M = token_M.repeat_interleave(len(vectors_MD) // tokens)
    mean, std = (part.expand(tokens, layers, 1) for part in (seen.mean, seen.std))
    return vectors_MD * std[token_M, output.layer_M] + mean[token_M, output.layer_M]


def _check_source(run: Path, config: RunConfig, spec: StoreSpec) -> None:
    trained_on = config.store_spec.get("model", {})
    if lacking := [layer for layer in config.sae.layers if layer not in spec.layers]:
        raise RunError(f"{run} reads the layers {lacking}, which the store lacks")
    if trained_on != spec.model or config.width != spec.width:
        raise RunError(
            f"{run} was trained on residuals of another model: expected "
            f"{trained_on.get('name')!r} with the weights {_short(trained_on)}, the store has "
            f"{spec.model['name']!r} with {_short(spec.model)}"
        )


def _short(model: Record) -> str:
    return str(model.get("weights"))[:12]
