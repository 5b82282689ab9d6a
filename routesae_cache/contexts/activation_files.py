"""Activations on disk, in a parquet file that is written while they are found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from numpy.typing import NDArray

from routesae_cache.contexts.mining import NO_LAYER, Activations, Floats, Ints, joined
from routesae_cache.whole_files import partial_of, rename_durably

_GROUP_ROWS = 1 << 18
_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int32(), nullable=False),
        pa.field("position", pa.int32(), nullable=False),
        pa.field("latent", pa.int32(), nullable=False),
        pa.field("activation", pa.float32(), nullable=False),
        pa.field("layer", pa.int16()),
    ]
)
_REPEATED = ["row", "position", "layer"]  # worth a dictionary
_IN_PARTS = {"pre_buffer": False, "buffer_size": 1 << 18}  # or the whole file would be in memory


class ActivationFile:
    """Writes activations to parquet, a bounded number of them at a time.

    Args:
        context: positions in a row of the store.
    """

    def __init__(self, path: Path, context: int) -> None:
        self._context = context
        self._writer = pq.ParquetWriter(
            path,
            _SCHEMA,
            compression="zstd",
            use_dictionary=_REPEATED,
            write_page_checksum=True,
        )
        self._waiting: list[Activations] = []
        self._n_waiting = 0

    def add(self, found: Activations) -> None:
        """Add activations, ordered by token."""
        if not len(found.token_P):
            return
        self._waiting.append(found)
        self._n_waiting += len(found.token_P)
        if self._n_waiting >= _GROUP_ROWS:
            self._write()

    def close(self) -> None:
        """Write what waits and the file's end."""
        self._write(last=True)
        self._writer.close()

    def abandon(self) -> None:
        """Let go of the file, which is not to be kept."""
        with suppress(OSError):  # of a full disk, where even the file's end has no room
            self._writer.close()

    def _write(self, *, last: bool = False) -> None:
        """Write whole groups, so that a file does not depend on how its rows came; `last`: all."""
        if not self._waiting:
            return
        found = joined(self._waiting)
        for start in range(0, self._n_waiting, _GROUP_ROWS):
            group = found.take(slice(start, start + _GROUP_ROWS))
            if len(group.token_P) < _GROUP_ROWS and not last:
                self._waiting, self._n_waiting = [group], len(group.token_P)
                return
            self._write_group(group)
        self._waiting, self._n_waiting = [], 0

    def _write_group(self, found: Activations) -> None:
        row_P, position_P = np.divmod(found.token_P, self._context)
        layer_P = pa.array(found.layer_P, mask=found.layer_P == NO_LAYER)
        columns = [row_P, position_P, found.latent_P]
        columns = [column.astype(np.int32) for column in columns]
        self._writer.write_table(pa.table([*columns, found.value_P, layer_P], schema=_SCHEMA))


@contextmanager
def activation_file(path: Path, context: int) -> Iterator[ActivationFile]:
    """A parquet file to fill, which is there once it is whole; its folder is made with it."""
    partial = partial_of(path.parent.with_name(f"{path.parent.name}.{path.name}"))
    try:
        with ExitStack() as failing:
            file = ActivationFile(partial, context)
            failing.callback(file.abandon)
            yield file
            file.close()
            failing.pop_all()
        path.parent.mkdir(exist_ok=True)
        rename_durably(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


class Part(NamedTuple):
    """Some rows of an activations file, as columns."""

    row_P: NDArray[np.int32]
    position_P: NDArray[np.int32]
    latent_P: NDArray[np.int32]
    value_P: Floats
    layer_P: NDArray[np.int16]
    """NO_LAYER where there is none."""


def read_activations(path: Path) -> Iterator[Part]:
    """The rows of an activations file in their order, a bounded number at a time.

    Raises ValueError where it is damaged, as far as its checksums, which are of pages, show it.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True, **_IN_PARTS) as file:
            if file.schema_arrow != _SCHEMA:
                raise ValueError(f"expected the columns {_SCHEMA.names}")
            for batch in file.iter_batches(batch_size=_GROUP_ROWS):
                row, position, latent, activation, layer = batch.columns
                yield Part(
                    row.to_numpy(),
                    position.to_numpy(),
                    latent.to_numpy(),
                    activation.to_numpy(),
                    layer.fill_null(NO_LAYER).to_numpy(zero_copy_only=False),
                )
    except (pa.ArrowException, OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


class Histograms(NamedTuple):
    """How often each of some latents took which values."""

    edges_HB: NDArray[np.float64]
    """From the threshold to the latent's largest value, one more than bins."""
    counts_HB: Ints
    sum_H: NDArray[np.float64]
    """Of all values, added in the file's order."""


def histograms(
    path: Path, latents: Ints, *, threshold: float, max_F: Floats, bins: int
) -> Histograms:
    """Histograms of H latents' values, from an activations file."""
    edges_HB = np.linspace(threshold, max_F[latents].astype(np.float64), bins + 1, axis=1)
    index_F = np.full(len(max_F), -1)
    index_F[latents] = np.arange(len(latents))
    scale_H = bins / (edges_HB[:, -1] - threshold)
    counts, sum_H = np.zeros(len(latents) * bins, np.int64), np.zeros(len(latents))
    for part in read_activations(path):
        index_P = index_F[part.latent_P]
        wanted = index_P >= 0
        index_P, value_P = index_P[wanted], part.value_P[wanted]
        np.add.at(sum_H, index_P, value_P.astype(np.float64))
        bin_P = ((value_P - threshold) * scale_H[index_P]).astype(np.int64)
        flat_P = index_P * bins + np.minimum(bin_P, bins - 1)
        counts += np.bincount(flat_P, minlength=len(counts))
    return Histograms(edges_HB, counts.reshape(-1, bins), sum_H)
