"""Passes of a store's token rows through its model, as it is and with residuals replaced."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from routesae_cache.lm import LanguageModel, ModelError
from routesae_cache.splicing.splice import Edit, resumable, resumed, spliced
from stores.reader import StoreReader
from stores.spec import Split

# NMSE that another order of operations leaves after 30 blocks, in eps² of the type: up to 4 were
# measured in bfloat16 and float16, 41 in float32. A GPU may round float32 products to 10 bits.
_ROUNDING, _LEAST_ROUNDING = 64, 1e-5


class Rows(NamedTuple):
    """Rows of one chunk that have counted tokens, cut after the longest."""

    chunk: int
    row_R: list[int]
    """In the chunk."""
    ids_RT: Tensor
    counted_RT: Tensor
    """Where residuals are replaced and predictions compared."""
    through: int
    """Rows that are done with once these are."""
    total: int
    """Rows there are to do."""


class CleanPass(NamedTuple):
    """The model as it is. N runs over the counted positions."""

    rows: Rows
    residuals: dict[int, Tensor]
    """By layer, (R, T, D)."""
    x_NLD: Tensor
    """The same at the counted positions, float32."""
    final_ND: Tensor
    """What enters the head."""
    row_N: Tensor
    position_N: Tensor


class Splice(NamedTuple):
    """One layer of each token, and the residual to put there."""

    layer_N: Tensor
    vector_ND: Tensor


class ChunkRows(NamedTuple):
    """The first rows of a chunk."""

    chunk: int
    rows: int


def first_rows(reader: StoreReader, split: Split, at_most: int | None) -> list[ChunkRows]:
    """The first rows of a split, chunk by chunk; IncompleteStoreError if chunks are missing."""
    found: list[ChunkRows] = []
    left = math.inf if at_most is None else at_most
    for chunk in reader.chunks(split):
        part = reader.spec.chunk_range(chunk)
        if n_rows := min(part.stop - part.start, left):
            found.append(ChunkRows(chunk, int(n_rows)))
        left -= n_rows
    return found


def row_batches(
    reader: StoreReader, parts: Sequence[ChunkRows], *, batch_tokens: int, device: torch.device
) -> Iterator[Rows]:
    """Rows of some chunks, in order; a batch never crosses a chunk."""
    total = sum(part.rows for part in parts)
    size = max(1, batch_tokens // reader.spec.context)
    through = 0
    for chunk, n_rows in parts:
        rows = reader.rows(chunk)
        counted_RT = rows.counted_RT()
        for start in range(0, n_rows, size):
            row_R = np.arange(start, min(start + size, n_rows))
            through += len(row_R)
            row_R = row_R[counted_RT[row_R].any(1)]
            if len(row_R):
                longest = rows.lengths_R[row_R].max()
                ids_RT = torch.from_numpy(rows.tokens_RT[row_R, :longest]).to(device)
                places_RT = torch.from_numpy(counted_RT[row_R, :longest]).to(device)
                yield Rows(chunk, row_R.tolist(), ids_RT, places_RT, through, total)


class Passes:
    """Forward passes of batches of rows, in which no block runs that need not.

    Args:
        fill_LD: what an ablation puts at each layer of the model, layer 0 first.
    """

    def __init__(self, lm: LanguageModel, layers: Sequence[int], fill_LD: Tensor) -> None:
        self.lm, self.layers, self._fill_LD = lm, tuple(layers), fill_LD.to(lm.device)
        self._resumable: dict[int, bool] = {}

    def clean(self, rows: Rows) -> CleanPass:
        """The model as it is."""
        states = self.lm.states(rows.ids_RT, self.layers)
        counted_RT = rows.counted_RT
        row_N, position_N = counted_RT.nonzero(as_tuple=True)
        return CleanPass(
            rows,
            residuals=dict(zip(self.layers, states.residuals, strict=True)),
            x_NLD=torch.stack([x_RTD[counted_RT] for x_RTD in states.residuals], 1).float(),
            final_ND=states.final_RTD[counted_RT],
            row_N=row_N,
            position_N=position_N,
        )

    def spliced(self, clean: CleanPass, splice: Splice) -> Tensor:
        """What enters the head at the counted positions, (N, D), with residuals replaced there."""
        layers = sorted(set(splice.layer_N.tolist()))
        edits = {layer: _edit(clean, splice, layer) for layer in layers}
        with self._begun_at(layers[0], clean), spliced(self.lm, edits):
            return self.lm.states(clean.rows.ids_RT).final_RTD[clean.rows.counted_RT]

    def ablated(self, clean: CleanPass, splice: Splice) -> Tensor:
        """The same with the ablation in the splice's places."""
        return self.spliced(clean, splice._replace(vector_ND=self._fill_LD[splice.layer_N]))

    def _begun_at(self, layer: int, clean: CleanPass) -> AbstractContextManager[None]:
        if layer not in self._resumable:
            self._resumable[layer] = resumable(self.lm, layer)
        if not self._resumable[layer]:
            return nullcontext()
        return resumed(self.lm, layer, clean.residuals[layer])


def check_residuals(reader: StoreReader, lm: LanguageModel, clean: CleanPass) -> None:
    """Compare residuals just computed with those in the store.

    Raises:
        ModelError: if they differ by more than twice what the codec lost on that chunk, and
            rounding in the model's type.
    """
    spec, layers = reader.spec, tuple(clean.residuals)
    wanted = spec.positions(layers)
    stats = reader.stats(clean.rows.chunk)
    recorded_L = stats.distortion[list(wanted)] / stats.count
    rounding = max(_ROUNDING * torch.finfo(lm.dtype).eps ** 2, _LEAST_ROUNDING)
    found_L = _nmse(clean.x_NLD.cpu(), _stored(reader, clean, wanted)).tolist()
    for layer, found, recorded in zip(layers, found_L, recorded_L, strict=True):
        if not found <= 2 * recorded + rounding:
            raise ModelError(
                f"{lm.identity.name!r} is not the model that {reader.path} came from, or does not "
                f"compute as it did: at layer {layer} its residuals and the stored ones differ by "
                f"an NMSE of {found:.2g}, of which the codec explains {recorded:.2g} and "
                f"{spec.model['dtype']} {rounding:.2g}; give the right one with --model, or "
                "harvest again"
            )


def _stored(reader: StoreReader, clean: CleanPass, wanted: Sequence[int]) -> Tensor:
    """The store's residuals of the same tokens, (N, L, D)."""
    spec, rows = reader.spec, clean.rows
    positions = spec.codec.required(wanted)
    row_N = np.array(rows.row_R)[clean.row_N.cpu().numpy()]
    token_N = row_N * spec.context + clean.position_N.cpu().numpy()
    codes = {name: v[token_N] for name, v in reader.codes(rows.chunk, positions).items()}
    out_NLD = np.empty(clean.x_NLD.shape, np.float32)
    spec.codec.decode(codes, positions, wanted, out_NLD)
    return torch.from_numpy(out_NLD)


def _nmse(x_NLD: Tensor, other_NLD: Tensor) -> Tensor:
    """By layer, as the codec's distortion is measured."""
    return ((other_NLD - x_NLD).square().mean(-1) / x_NLD.var(-1, correction=0)).mean(0)


def _edit(clean: CleanPass, splice: Splice, layer: int) -> Edit:
    here_N = splice.layer_N == layer
    places = clean.row_N[here_N], clean.position_N[here_N]
    vector_PD = splice.vector_ND[here_N]

    def edit(x_RTD: Tensor) -> Tensor:
        edited_RTD = x_RTD.clone()
        edited_RTD[places] = vector_PD.to(x_RTD.dtype)
        return edited_RTD

    return edit
