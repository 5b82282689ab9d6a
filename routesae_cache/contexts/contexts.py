"""From a store and SAEs to the contexts that each latent is active in; no model is run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from routesae_cache.batches import Batch, BatchSource
from routesae_cache.contexts.activation_files import ActivationFile, activation_file
from routesae_cache.contexts.delphi_cache import split_rows, write_delphi
from routesae_cache.contexts.findings import Findings
from routesae_cache.contexts.mining import Ints
from routesae_cache.contexts.records import (
    Summary,
    context_records,
    latent_records,
    summarise,
    write_record,
)
from routesae_cache.contexts.text import StoreText
from routesae_cache.origin import origin_tokenizer
from routesae_cache.sole_use import sole_use
from routesae_cache.sources import ModelSource
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
    model: str | ModelSource | None = None
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
    incomplete split, InUseError while another process makes the same, and ValueError for runs of
    the same name and for SAEs that `auto` is not meant for.
    """
    mining = Mining(reader, runs, config)
    with mining.alone():
        with mining.files() as files:
            findings = mining.findings()
            mining.mine(None, findings, files, progress)
        return mining.results(findings)


class Mining:
    """The contexts of several SAEs, found in all chunks of a split or in some at a time.

    Raises what `mine_contexts` does.
    """

    def __init__(self, reader: StoreReader, runs: Sequence[Path], config: ContextsConfig) -> None:
        self.reader, self.config = reader, config
        self._saes = [TrainedSae(run, reader.spec, device=config.device) for run in runs]
        _check(self._saes, config)
        self._layers = layers_read(sae.config for sae in self._saes)
        self.tokens = self._source(None).tokens
        """In the split."""
        self.text = StoreText(reader, origin_tokenizer(reader.spec, model=config.model))
        automatic = auto_threshold(reader.spec.width)
        self._threshold = automatic if config.threshold is None else config.threshold
        others = config.thresholds or [share * self._threshold for share in _SHARES]
        self._thresholds = sorted({self._threshold, *others})
        names = [f"{sae.config.name}_{self._threshold:g}" for sae in self._saes]
        self._folders = [config.out / name for name in names]

    def findings(self) -> list[Findings]:
        """Nothing yet, for each SAE."""
        return [
            Findings(
                sae.config.sae,
                self._threshold,
                self._thresholds,
                per_token=self.config.per_token,
                max_token_types=self.config.max_token_types,
            )
            for sae in self._saes
        ]

    def alone(self) -> AbstractContextManager[None]:
        """Have the results to oneself; their folder is made."""
        return sole_use(self.config.out, (folder.name for folder in self._folders))

    @contextmanager
    def files(self, folder: Path | None = None) -> Iterator[list[ActivationFile]]:
        """The files of the SAEs' activations; in another folder those of a part."""
        with ExitStack() as stack:
            yield [
                stack.enter_context(activation_file(path, self.reader.spec.context))
                for path in self.activations(folder)
            ]

    def activations(self, folder: Path | None = None) -> list[Path]:
        """Where `files` are."""
        folders = [folder / own.name if folder else own for own in self._folders]
        return [own / "activations.parquet" for own in folders]

    def mine(
        self,
        chunks: tuple[int, ...] | None,
        findings: Sequence[Findings],
        files: Sequence[ActivationFile],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Add what is found in some chunks of the split, or in all; their order is the store's."""
        source, done = self._source(chunks), 0
        with source.batches() as batches:
            for batch in batches:
                token_N = _token_N(batch, self.reader.spec.context)
                type_N = self.text.types(token_N)
                residuals = Residuals(batch.x_NLD, self._layers)
                for sae, found, file in zip(self._saes, findings, files, strict=True):
                    reading = sae.read(residuals.seen_by(sae.config).x)
                    file.add(found.add(reading, token_N, type_N))
                done += len(residuals)
                progress(done, source.tokens)

    def results(self, findings: Sequence[Findings]) -> list[Mined]:
        """Write what was found, once the files of activations are whole."""
        return [
            self._result(sae, found, folder)
            for sae, found, folder in zip(self._saes, findings, self._folders, strict=True)
        ]

    def _source(self, chunks: tuple[int, ...] | None) -> BatchSource:
        return BatchSource.in_order(
            self.reader,
            self._layers,
            split=self.config.split,
            batch_tokens=self.config.batch_tokens,
            device=self.config.device,
            chunks=chunks,
            within_chunks=True,
        )

    def _result(self, sae: TrainedSae, found: Findings, folder: Path) -> Mined:
        config, run, spec = self.config, sae.config, self.reader.spec
        tally, few, activations = found.tally, found.few, folder / "activations.parquet"
        layers = found.has_layers
        summary = summarise(tally, few, min_contexts=config.min_contexts, layers=layers)
        delphi = folder / "delphi" if config.delphi else None
        if delphi is not None:
            counts = (tally.layers_FL, tally.count_F)
            write_delphi(delphi, activations, self.reader, config.split, run.sae, *counts)
        contexts_F = few.contexts_F(self._threshold)
        latents = np.flatnonzero(contexts_F >= config.min_contexts)
        head = {
            "kind": "contexts",
            "run": str(sae.run),
            "name": run.name,
            "store": str(self.reader.path),
            "split": config.split,
            "tokens": self.tokens,
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
            "latents": latent_records(tally, latents, activations, layers=layers),
            "latent_context_map": context_records(
                few.strongest(self._threshold, latents),
                self.text,
                context=spec.context,
                max_tokens=config.max_tokens,
            ),
        }
        contexts = folder.with_name(folder.name + ".json")
        write_record(contexts, head, maps)
        return Mined(
            run=sae.run,
            name=run.name,
            threshold=self._threshold,
            tokens=self.tokens,
            strongest=found.strongest,
            summary=summary,
            contexts=contexts,
            activations=activations,
            delphi=delphi,
        )


def _token_N(batch: Batch, context: int) -> Ints:
    token_N: Ints = (batch.row_N * context + batch.position_N).cpu().numpy()
    return token_N


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
