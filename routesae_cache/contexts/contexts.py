"""From a store and SAEs to the contexts that each latent is active in; no model is run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import torch

from routesae_cache.batches import Batch, BatchSource
from routesae_cache.contexts.activation_files import activation_file
from routesae_cache.contexts.delphi_cache import split_rows, write_delphi
from routesae_cache.contexts.mining import (
    NO_LAYER,
    Activations,
    Floats,
    Ints,
    StrongestFew,
    Tally,
    float32_at_most,
    strongest_layer_of_each,
)
from routesae_cache.contexts.records import (
    Summary,
    context_records,
    latent_records,
    summarise,
    write_record,
)
from routesae_cache.contexts.text import StoreText
from routesae_cache.origin import origin_tokenizer
from routesae_cache.saes.config import SaeConfig
from routesae_cache.saes.output import DenseLatents, FlatLatents, Latents, RowLatents
from routesae_cache.trained import Residuals, TrainedSae, layers_read
from stores.reader import StoreReader
from stores.spec import Split

_PAPER_THRESHOLD, _PAPER_WIDTH = 15, 2048
_SHARES = (1 / 3, 2 / 3, 1, 4 / 3, 5 / 3)  # of the threshold: 5, 10, 15, 20, 25 in the paper's


def auto_threshold(width: int) -> float:
    """RouteSAE's 15 at width 2048, scaled as the norm of a normalised residual, which is √D."""
    return _PAPER_THRESHOLD * math.sqrt(width / _PAPER_WIDTH)


@dataclass(frozen=True, kw_only=True)
class ContextsConfig:
    """What counts as a context, and what is written."""

    out: Path
    split: Split = "eval"
    threshold: float | None = None
    """Activations above it count; None: `auto_threshold`."""
    thresholds: tuple[float, ...] | None = None
    """Interpretable latents are counted at these, too; None: five around the threshold."""
    max_tokens: int = 64
    """Of a context."""
    per_token: int = 2
    """Strongest contexts kept of each latent and type of token."""
    min_contexts: int = 5
    """That an interpretable latent has."""
    max_token_types: int = 32
    """That activate an interpretable latent."""
    delphi: bool = False
    """Write delphi's latent cache, too."""
    model: str | None = None
    """Where the store's model is now, for its tokenizer; None: where it was."""
    batch_tokens: int = 2048
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.split not in get_args(Split):
            raise ValueError(
                f"split: expected one of {', '.join(get_args(Split))}, found {self.split!r}"
            )
        for name in ("max_tokens", "per_token", "min_contexts", "max_token_types"):
            if (found := getattr(self, name)) < 1:
                option = name.replace("_", "-")
                raise ValueError(f"--{option}: expected at least 1, found {found}")
        for found in (self.threshold, *(self.thresholds or ())):
            if found is not None and not (math.isfinite(found) and found >= 0):
                raise ValueError(
                    f"threshold: expected a finite number that is not negative, found {found}; "
                    "activations above it count"
                )


@dataclass(frozen=True, kw_only=True)
class Mined:
    """What was found of one SAE, and where it is."""

    run: Path
    name: str
    threshold: float
    tokens: int
    strongest: float
    """The largest activation there was, above the threshold or not."""
    summary: Summary
    contexts: Path
    """JSON."""
    activations: Path
    """Parquet."""
    delphi: Path | None


def mine_contexts(
    reader: StoreReader,
    runs: Sequence[Path],
    config: ContextsConfig,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Mined]:
    """Find the contexts of several SAEs in one pass; `progress(done, total)` counts tokens.

    Raises RunError as `TrainedSae` does, ModelError as `origin_tokenizer` does, StoreError for an
    incomplete split, and ValueError for runs of the same name and for SAEs that `auto` is not
    meant for.
    """
    saes = [TrainedSae(run, reader.spec, device=config.device) for run in runs]
    _check(saes, config)
    layers = layers_read(sae.config for sae in saes)
    source = BatchSource.in_order(
        reader,
        layers,
        split=config.split,
        batch_tokens=config.batch_tokens,
        device=config.device,
    )
    text = StoreText(reader, origin_tokenizer(reader.spec, model=config.model))
    config.out.mkdir(parents=True, exist_ok=True)
    done = 0
    with ExitStack() as files:
        miners = [_Miner(sae, reader, config, files) for sae in saes]
        with source.batches() as batches:
            for batch in batches:
                token_N = _token_N(batch, reader.spec.context)
                type_N = text.types(token_N)
                residuals = Residuals(batch.x_NLD, layers)
                for miner in miners:
                    miner.add(residuals, token_N, type_N)
                done += len(residuals)
                progress(done, source.tokens)
    return [miner.result(text, done) for miner in miners]


class _Miner:
    """The contexts of one SAE, while the pass goes on."""

    def __init__(
        self, sae: TrainedSae, reader: StoreReader, config: ContextsConfig, files: ExitStack
    ) -> None:
        self._sae, self._reader, self._config = sae, reader, config
        automatic = auto_threshold(reader.spec.width)
        self._threshold = automatic if config.threshold is None else config.threshold
        others = config.thresholds or [share * self._threshold for share in _SHARES]
        self._thresholds = sorted({self._threshold, *others})
        latents, self._layers = sae.config.sae.latents, sae.config.sae.layers
        self._has_layers = _reads_single_layers(sae.config.sae)
        self._tally = Tally(latents, self._layers, self._threshold, self._thresholds)
        self._few = StrongestFew(
            latents,
            self._thresholds,
            per_token=config.per_token,
            max_token_types=config.max_token_types,
        )
        self._folder = config.out / f"{sae.config.name}_{self._threshold:g}"
        self._activations = self._folder / "activations.parquet"
        self._file = files.enter_context(activation_file(self._activations, reader.spec.context))
        self._strongest = -math.inf

    def add(self, residuals: Residuals, token_N: Ints, type_N: Ints) -> None:
        """Add a batch."""
        output = self._sae(residuals.seen_by(self._sae.config).x)
        above = _above(output.latents, float(float32_at_most(self._thresholds[0])))
        self._strongest = max(self._strongest, above.strongest)
        vectors = above.rows // len(token_N)
        index_P = above.row_P // vectors
        layer_P = np.full(len(index_P), NO_LAYER, np.int16)
        if self._has_layers:
            assert output.layer_M is not None
            layer_M = np.array(self._layers, np.int16)[output.layer_M.cpu().numpy()]
            layer_P = layer_M[above.row_P]
        found = Activations(
            token_N[index_P], above.latent_P, above.value_P, layer_P, type_N[index_P]
        )
        self._tally.add(found)
        self._file.add(found.take(found.value_P > float32_at_most(self._threshold)))
        self._few.add(strongest_layer_of_each(found) if vectors > 1 else found)

    def result(self, text: StoreText, tokens: int) -> Mined:
        """Write what was found, once the file of activations is whole."""
        config, run, spec = self._config, self._sae.config, self._reader.spec
        summary = summarise(
            self._tally, self._few, min_contexts=config.min_contexts, layers=self._has_layers
        )
        delphi = self._folder / "delphi" if config.delphi else None
        if delphi is not None:
            counts = (self._tally.layers_FL, self._tally.count_F)
            write_delphi(delphi, self._activations, self._reader, config.split, run.sae, *counts)
        contexts_F = self._few.contexts_F(self._threshold)
        latents = np.flatnonzero(contexts_F >= config.min_contexts)
        head = {
            "kind": "contexts",
            "run": str(self._sae.run),
            "name": run.name,
            "store": str(self._reader.path),
            "split": config.split,
            "tokens": tokens,
            "total_latents": len(latents),
            "threshold": self._threshold,
            "max_length": config.max_tokens,
            "max_per_token": config.per_token,
            "lines": len(split_rows(spec, config.split)),
            "min_contexts": config.min_contexts,
            "max_token_types": config.max_token_types,
            "summary": dataclasses.asdict(summary),
        }
        maps = {
            "latents": latent_records(
                self._tally, latents, self._activations, layers=self._has_layers
            ),
            "latent_context_map": context_records(
                self._few.strongest(self._threshold, latents),
                text,
                context=spec.context,
                max_tokens=config.max_tokens,
            ),
        }
        contexts = self._folder.with_name(self._folder.name + ".json")
        write_record(contexts, head, maps)
        return Mined(
            run=self._sae.run,
            name=run.name,
            threshold=self._threshold,
            tokens=tokens,
            strongest=self._strongest,
            summary=summary,
            contexts=contexts,
            activations=self._activations,
            delphi=delphi,
        )


class _Above(NamedTuple):
    """The active pairs above a threshold."""

    row_P: Ints
    latent_P: Ints
    value_P: Floats
    rows: int
    """Coded vectors that were looked at."""
    strongest: float
    """The largest value of all."""


def _above(latents: Latents, level: float) -> _Above:
    """What `pairs` gives, above a threshold: the many others are left where they are."""
    match latents:
        case RowLatents(index_MK, value_MK):
            row_P, slot_P = torch.nonzero(value_MK > level, as_tuple=True)
            values, rows = value_MK, len(value_MK)
            index_P, value_P = index_MK[row_P, slot_P], value_MK[row_P, slot_P]
        case DenseLatents(value_MF):
            row_P, index_P = torch.nonzero(value_MF > level, as_tuple=True)
            values, rows, value_P = value_MF, len(value_MF), value_MF[row_P, index_P]
        case FlatLatents(row_P, index_P, values, rows):
            keep_P = values > level
            row_P, index_P, value_P = row_P[keep_P], index_P[keep_P], values[keep_P]
    return _Above(
        row_P.cpu().numpy(),
        index_P.cpu().numpy(),
        value_P.cpu().numpy(),
        rows,
        float(values.max()) if values.numel() else -math.inf,
    )


def _token_N(batch: Batch, context: int) -> Ints:
    token_N: Ints = (batch.row_N * context + batch.position_N).cpu().numpy()
    return token_N


def _reads_single_layers(sae: SaeConfig) -> bool:
    """Whether each of its latents' values comes from one layer."""
    return sae.selector != "all" and sae.hard


def _check(saes: Sequence[TrainedSae], config: ContextsConfig) -> None:
    by_name: dict[str, Path] = {}
    for sae in saes:
        if other := by_name.get(sae.config.name):
            raise ValueError(
                f"{other} and {sae.run} are both called {sae.config.name}, and so would be their "
                "files; mine them one after the other, with another --out"
            )
        by_name[sae.config.name] = sae.run
        if config.threshold is None and sae.config.sae.norm == "none":
            raise ValueError(
                f"{sae.config.name} reads residuals that are not normalised: expected a number as "
                "--threshold, found auto, which is for vectors of norm √D"
            )
