"""What SAEs do to the model: its predictions with reconstructions in the residuals' place.

Each batch of rows is first passed as it is. That clean pass gives what every SAE reads and routes
by, the original predictions, and the residuals at which the spliced passes begin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from routesae_cache.checkpoint import RunConfig
from routesae_cache.lm import LanguageModel
from routesae_cache.losses import Normalised
from routesae_cache.metrics import Spliced, SplicedSums
from routesae_cache.saes.config import SaeConfig
from routesae_cache.saes.output import SaeOutput
from routesae_cache.splicing.passes import (
    ChunkRows,
    CleanPass,
    Passes,
    Splice,
    check_residuals,
    first_rows,
    row_batches,
)
from routesae_cache.splicing.predictions import compare_predictions
from routesae_cache.trained import Residuals, TrainedSae, layers_read, reconstruction_MD
from stores.reader import StoreReader
from stores.spec import Split
from stores.stats import split_stats

Ablation = Literal["zero", "mean"]
SpliceScale = Literal["exact", "authors"]

_SEVERAL_LAYERS = ("all", "every")


@dataclass(frozen=True, kw_only=True)
class SplicedConfig:
    """What to splice, where, and on which rows."""

    split: Split = "eval"
    rows: int | None = None
    """The first ones of the split; None: all."""
    batch_tokens: int = 2048
    ablation: Ablation | None = "zero"
    """What `recovered` compares with: zeros, or the layer's mean residual, at the same places."""
    scale: SpliceScale = "exact"
    """A router's factor p: `exact` codes p·x and divides by p; `authors` codes x, as the RouteSAE
    authors' code does, though it was trained on p·x."""
    at_layer: int | None = None
    """The one layer to splice of SAEs that reconstruct several; a crosscoder needs it."""

    def __post_init__(self) -> None:
        for name in ("rows", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, found {value}")


def spliced_layers(name: str, sae: SaeConfig, at_layer: int | None) -> tuple[int | None, ...]:
    """The layers at which an SAE is spliced, one pass each; None for each token's own layer.

    Raises:
        ValueError: if there is no single layer that its reconstruction of a token belongs to, or
            it does not reconstruct `at_layer`.
    """
    if sae.selector == "route" and not sae.hard:
        raise ValueError(
            f"{name}: soft routing mixes the layers, so its reconstruction belongs to none of "
            "them and cannot be spliced; leave this run out, or train it with hard routing"
        )
    if sae.selector not in _SEVERAL_LAYERS:
        return sae.layers if sae.selector == "fixed" else (None,)
    if at_layer is None and sae.selector == "every":
        return sae.layers
    if at_layer is None:
        raise ValueError(
            f"{name}: a crosscoder reconstructs {len(sae.layers)} layers of a token at once; "
            f"choose the one to splice with --at-layer, of {list(sae.layers)}"
        )
    if at_layer not in sae.layers:
        raise ValueError(f"{name} does not reconstruct layer {at_layer}; it has {list(sae.layers)}")
    return (at_layer,)


def refusal(config: RunConfig, splicing: SplicedConfig) -> str | None:
    """Why an SAE cannot be spliced; None where it can."""
    try:
        spliced_layers(config.name, config.sae, splicing.at_layer)
    except ValueError as error:
        return str(error)
    return None


def check_spliceable(configs: Sequence[RunConfig], config: SplicedConfig) -> int:
    """Refuse what cannot be spliced; returns how many forward passes each row takes at most.

    Raises:
        ValueError: for soft routing, for a crosscoder without a layer to splice, and for a layer
            to splice where no SAE reconstructs several.
    """
    several = [c.name for c in configs if c.sae.selector in _SEVERAL_LAYERS]
    if config.at_layer is not None and not several:
        raise ValueError(
            "--at-layer is for SAEs that reconstruct several layers of a token (crosscoder, "
            "MLSAE); there is none here, leave it out"
        )
    passes = [_places(run, c, config.at_layer) for run, c in enumerate(configs)]
    ablations = {place for places in passes for place in places} if config.ablation else ()
    return 1 + sum(map(len, passes)) + len(ablations)


def evaluate_spliced(
    reader: StoreReader,
    lm: LanguageModel,
    saes: Sequence[TrainedSae],
    config: SplicedConfig,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Spliced]:
    """Measure SAEs inside the model that a store came from; `progress(done, total)` counts rows.

    Args:
        lm: from `origin_lm`, on the device of the SAEs.

    Raises:
        ValueError: as `check_spliceable`.
        ModelError: if the model's residuals are not those of the store.
    """
    totals = [Total(run, sae.config, config) for run, sae in enumerate(saes)]
    splicing = Splicing(reader, lm, saes, config)
    parts = first_rows(reader, config.split, config.rows)
    for found in splicing.measure(parts, progress):
        for total, sums in zip(totals, found, strict=True):
            total.add(sums)
    return [total.result() for total in totals]


class RowsSums(NamedTuple):
    """Of R rows, with one SAE in C places; as `SplicedSums.add` has them."""

    clean_R3: Tensor
    kl_RC: Tensor
    delta_RC: Tensor
    ablated_RC: Tensor


class Splicing:
    """A model and the SAEs to put into it, for all rows of a split or some at a time.

    Raises what `evaluate_spliced` does.
    """

    def __init__(
        self,
        reader: StoreReader,
        lm: LanguageModel,
        saes: Sequence[TrainedSae],
        config: SplicedConfig,
    ) -> None:
        check_spliceable([sae.config for sae in saes], config)
        self._reader, self._lm, self._config = reader, lm, config
        self._evaluators = [_Evaluator(run, sae, config) for run, sae in enumerate(saes)]
        layers = layers_read(sae.config for sae in saes)
        self._passes = Passes(lm, layers, _fill_LD(reader, config.ablation))
        self._checked = False

    def measure(
        self,
        parts: Sequence[ChunkRows],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Iterator[list[RowsSums]]:
        """The sums of each batch of rows, of each SAE; the first batch is held against the store.

        A chunk's batches do not depend on the other chunks there are.
        """
        batches = row_batches(
            self._reader,
            parts,
            batch_tokens=self._config.batch_tokens,
            device=self._lm.device,
        )
        for rows in batches:
            with torch.inference_mode():
                clean = self._passes.clean(rows)
                if not self._checked:
                    check_residuals(self._reader, self._lm, clean)
                    self._checked = True
                found = _measure(self._passes, clean, self._evaluators)
            yield found
            progress(rows.through, rows.total)


_Place = int | tuple[int, None]
"""A layer of every token, or each token's own in the run of that number."""


def _places(run: int, config: RunConfig, at_layer: int | None) -> list[_Place]:
    layers = spliced_layers(config.name, config.sae, at_layer)
    return [(run, None) if layer is None else layer for layer in layers]


def _fill_LD(reader: StoreReader, ablation: Ablation | None) -> Tensor:
    """What an ablation puts at each layer of the model; zeros for those the store lacks."""
    fill_LD = torch.zeros(reader.spec.n_blocks + 1, reader.spec.width)
    if ablation == "mean":
        fill_LD[list(reader.spec.layers)] = torch.from_numpy(split_stats(reader).mean_LD).float()
    return fill_LD


def _measure(passes: Passes, clean: CleanPass, evaluators: Sequence[_Evaluator]) -> list[RowsSums]:
    """Splice every SAE into a batch and add up what that does; a layer is ablated once for all."""
    residuals = Residuals(clean.x_NLD, passes.layers)
    finals: list[Tensor] = []
    spliced: list[list[int]] = []
    ablated: dict[_Place, int] = {}
    for evaluator in evaluators:
        spliced.append([])
        for place, splice in zip(evaluator.places, evaluator.splices(residuals), strict=True):
            spliced[-1].append(len(finals))
            finals.append(passes.spliced(clean, splice))
            if evaluator.ablated and place not in ablated:
                ablated[place] = len(finals)
                finals.append(passes.ablated(clean, splice))
    sums = _sum_rows(passes.lm, clean, finals)
    found = []
    for evaluator, mine in zip(evaluators, spliced, strict=True):
        without = [ablated[place] for place in evaluator.places if place in ablated]
        columns = (sums.kl_RS[:, mine], sums.delta_RS[:, mine], sums.delta_RS[:, without])
        found.append(RowsSums(sums.clean_R3, *columns))
    return found


class _Sums(NamedTuple):
    """Of R rows, in the S passes of a batch."""

    clean_R3: Tensor
    """As `SplicedSums.add` has it."""
    kl_RS: Tensor
    delta_RS: Tensor


def _sum_rows(lm: LanguageModel, clean: CleanPass, finals: Sequence[Tensor]) -> _Sums:
    ids_RT, counted_RT = clean.rows.ids_RT, clean.rows.counted_RT
    # a row's first token is not counted, so what comes round to its end is no next token
    next_N = ids_RT.roll(-1, 1)[counted_RT].long()
    has_next_N = counted_RT.roll(-1, 1)[counted_RT].float()
    found = compare_predictions(lm, clean.final_ND, finals, next_N)
    row_N = clean.row_N.cpu()

    def by_row(value_NX: Tensor) -> Tensor:
        sum_RX = torch.zeros(len(ids_RT), value_NX.shape[1], dtype=torch.float64)
        return sum_RX.index_add_(0, row_N, value_NX.cpu().double())

    one_N = torch.ones_like(has_next_N)
    return _Sums(
        by_row(torch.stack([one_N, has_next_N, found.ce_N * has_next_N], 1)),
        by_row(found.kl_NS),
        by_row((found.ce_NS - found.ce_N[:, None]) * has_next_N[:, None]),
    )


class _Evaluator:
    """Splices of one SAE."""

    def __init__(self, run: int, sae: TrainedSae, config: SplicedConfig) -> None:
        self.sae, self._config = sae, config
        self.places = _places(run, sae.config, config.at_layer)
        self.ablated = config.ablation is not None

    def splices(self, residuals: Residuals) -> list[Splice]:
        """One for each place."""
        seen = residuals.seen_by(self.sae.config)
        output = self._coded(seen)
        vector_MD = reconstruction_MD(output, seen)
        layers = torch.tensor(self.sae.config.sae.layers, device=vector_MD.device)
        layer_M = layers[output.layer_M]
        if self.sae.config.sae.selector not in _SEVERAL_LAYERS:
            return [Splice(layer_M, vector_MD)]
        here = (layer_M == layer for layer in self.places)
        return [Splice(layer_M[here_M], vector_MD[here_M]) for here_M in here]

    def _coded(self, seen: Normalised) -> SaeOutput:
        output = self.sae(seen.x)
        if self._config.scale == "exact" or output.scale_M is None:
            return output
        coder, rule = self.sae.sae.coder, self.sae.rule
        latents = coder.read(output.target_MD / output.scale_M[:, None], rule.infer_k, rule.theta)
        return output._replace(reconstruction_MD=coder.decode(latents), scale_M=None)


class Total:
    """What splicing one SAE does, added up over rows.

    Args:
        run: the number of the SAE among those that are measured together.
    """

    def __init__(self, run: int, sae: RunConfig, config: SplicedConfig) -> None:
        self._sae, self._config = sae.sae, config
        self._n_places = len(_places(run, sae, config.at_layer))
        self._sums = SplicedSums(self._n_places, ablated=config.ablation is not None)

    def add(self, sums: RowsSums) -> None:
        """Add a batch; in the order of the rows, where sums are to be the same to the last bit."""
        self._sums.add(*sums)

    def result(self) -> Spliced:
        """Divide; at least one batch was added."""
        layers = self._sae.layers if self._n_places > 1 else ()
        several = self._sae.selector in _SEVERAL_LAYERS
        return Spliced(
            **vars(self._sums.result()),
            rows=self._sums.rows,
            tokens=self._sums.tokens,
            scale=self._config.scale,
            ablation=self._config.ablation,
            ce=self._sums.ce(),
            at_layer=self._config.at_layer if several else None,
            per_layer={l: self._sums.result(i) for i, l in enumerate(layers)} or None,
        )
