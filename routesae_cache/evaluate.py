"""Reconstruction metrics of finished runs, from the store alone, and the record of all metrics."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from routesae_cache.batches import BatchSource
from routesae_cache.checkpoint import RunConfig
from routesae_cache.metrics import (
    Reconstruction,
    ReconstructionSums,
    RoutingQuality,
    RoutingSums,
    Spliced,
)
from routesae_cache.trained import OWN_RULE, ReadingRule, Residuals, TrainedSae, layers_read
from stores.places import Where
from stores.reader import StoreReader
from stores.spec import Split, StoreSpec

_COLLAPSED = 0.95  # share of tokens on one layer


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What to evaluate on."""

    split: Split = "eval"
    batch_tokens: int = 2048
    rule: ReadingRule = OWN_RULE
    routing_tokens: int = 8192
    """Tokens on which routing is compared with random and best layers; 0: none."""
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One run's results."""

    run: Path
    config: RunConfig
    reconstruction: Reconstruction
    routing: RoutingQuality | None
    """None for SAEs that do not route hard."""
    spliced: Spliced | None = None
    """What `evaluate_spliced` found; None where that was not asked."""

    @property
    def collapsed_onto(self) -> int | None:
        """The layer that nearly all tokens are routed to, if there is one."""
        use = self.reconstruction.layer_use
        if self.routing is None or not use:
            return None
        layer = max(use, key=lambda l: use[l])
        return layer if use[layer] > _COLLAPSED and len(use) > 1 else None

    def to_dict(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "run": str(self.run),
            "name": self.config.name,
            "sae": self.config.sae.to_dict(),
            "train_tokens": self.config.total_steps * self.config.batch_tokens,
            **dataclasses.asdict(self.reconstruction),
            "routing": dataclasses.asdict(self.routing) if self.routing else None,
            "collapsed_onto": self.collapsed_onto,
            "spliced": dataclasses.asdict(self.spliced) if self.spliced else None,
        }


def evaluation_record(store: Where, split: Split, results: Sequence[Evaluation]) -> dict[str, Any]:
    """All results of one call as a JSON object."""
    return {
        "kind": "evaluation",
        "store": str(store),
        "split": split,
        "results": [result.to_dict() for result in results],
    }


def evaluate(
    reader: StoreReader,
    runs: Sequence[Path],
    config: EvaluateConfig,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Evaluation]:
    """Evaluate runs in one pass over a split; `progress(done, total)` counts tokens.

    Raises RunError for what is no finished run or was trained on another model's residuals, and
    ValueError for contradicting rules and for layers that the store lacks.
    """
    return evaluate_saes(reader, load_saes(reader.spec, runs, config), config, progress)


def load_saes(spec: StoreSpec, runs: Sequence[Path], config: EvaluateConfig) -> list[TrainedSae]:
    """Finished runs' SAEs as they are to be evaluated; raises what `evaluate` does."""
    return [TrainedSae(run, spec, rule=config.rule, device=config.device) for run in runs]


def evaluate_saes(
    reader: StoreReader,
    saes: Sequence[TrainedSae],
    config: EvaluateConfig,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Evaluation]:
    """As `evaluate`, of SAEs from `load_saes`."""
    evaluators = [_Evaluator(sae, config) for sae in saes]
    layers = layers_read(evaluator.sae.config for evaluator in evaluators)
    source = BatchSource.in_order(
        reader,
        layers,
        split=config.split,
        batch_tokens=config.batch_tokens,
        device=config.device,
    )
    done = 0
    with source.batches() as batches:
        for batch in batches:
            residuals = Residuals(batch.x_NLD, layers)
            for evaluator in evaluators:
                evaluator.add(residuals)
            done += len(residuals)
            progress(done, source.tokens)
    return [evaluator.result() for evaluator in evaluators]


class _Evaluator:
    """Sums of one run."""

    def __init__(self, trained: TrainedSae, config: EvaluateConfig) -> None:
        self.sae, sae = trained, trained.config.sae
        self._sums = ReconstructionSums(sae.layers, self.sae.config.width, sae.latents)
        self._routes = sae.selector == "route" and sae.hard and config.routing_tokens > 0
        self._routing, self._routing_left = RoutingSums(), config.routing_tokens

    def add(self, residuals: Residuals) -> None:
        x_NLD = residuals.seen_by(self.sae.config).x
        output = self.sae(x_NLD)
        self._sums.add(output, len(x_NLD))
        if self._routes and self._routing_left > 0:
            n = min(self._routing_left, len(x_NLD))
            self._routing.add(output.nmse_M[:n], _nmse_of_every_layer(self.sae, x_NLD[:n]))
            self._routing_left -= n

    def result(self) -> Evaluation:
        return Evaluation(
            run=self.sae.run,
            config=self.sae.config,
            reconstruction=self._sums.result(),
            routing=self._routing.result() if self._routes else None,
        )


def _nmse_of_every_layer(sae: TrainedSae, x_NLD: Tensor) -> Tensor:
    rows = []
    for layer in range(x_NLD.shape[1]):
        index_N = torch.full((len(x_NLD),), layer, device=x_NLD.device)
        rows.append(sae(x_NLD, index_N).nmse_M)
    return torch.stack(rows)


def uniform_entropy(layers: int) -> float:
    """Entropy of a uniform choice, in nats: what a router's entropy is compared with."""
    return math.log(layers)
