"""The latent cache that EleutherAI's delphi reads, made from a file of activations.

A folder for each hookpoint; in it `{start}_{end}.safetensors` for the latents start … end, both
included, with `locations` (N, 3): sequence, position, latent - start; `activations` (N,) in
float16; `tokens` (sequences, context); and a `config.json`.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from routesae_cache.contexts.activation_files import read_activations
from routesae_cache.contexts.mining import Ints
from routesae_cache.interchange.sparsify import hook_name
from routesae_cache.json_files import write_json
from routesae_cache.saes.config import SaeConfig
from stores.reader import StoreReader
from stores.spec import Split, StoreSpec

_FILES = 5  # a hookpoint, delphi's own default
_TYPES = {"int32": "I32", "uint32": "U32", "uint16": "U16", "float16": "F16"}
_LARGEST_SHORT = np.iinfo(np.uint16).max
_LARGEST_HALF = np.float32(np.finfo(np.float16).max)
_MIXED = {"route": "routed", "random": "random", "all": "crosscoder"}


def split_rows(spec: StoreSpec, split: Split) -> range:
    """The rows of a split, counted over the whole store."""
    chunks = spec.split_chunks(split)
    return range(spec.chunk_range(chunks[0]).start, spec.chunk_range(chunks[-1]).stop)


def hookpoints(sae: SaeConfig) -> dict[str, int | None]:
    """The hookpoints of an SAE, each with the layer whose activations it has; None: all.

    A single layer is called after the module that it is the output of. An SAE that chooses from
    several layers, or reads them together, is one hookpoint that says so.
    """
    if sae.selector in ("fixed", "every"):
        return {hook_name(layer): layer for layer in sae.layers}
    ends = f"{hook_name(sae.layers[0])}-{hook_name(sae.layers[-1])}"
    return {f"{_MIXED[sae.selector]}.{ends}": None}


def write_delphi(
    folder: Path,
    activations: Path,
    reader: StoreReader,
    split: Split,
    sae: SaeConfig,
    layers_FL: Ints,
    count_F: Ints,
) -> None:
    """Write the cache of an SAE; replaces what is in the folder, once it is whole.

    Args:
        activations: the file to make it from.
        layers_FL: how many activations of each latent it has from each of the SAE's layers.
        count_F: and altogether.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of one that was killed
    try:
        for name, layer in hookpoints(sae).items():
            n_F = count_F if layer is None else layers_FL[:, sae.layers.index(layer)]
            (partial / name).mkdir(parents=True)
            _write_hookpoint(partial / name, activations, reader, split, layer, n_F)
            write_json(partial / name / "config.json", _config(reader, split, sae), checked=False)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _config(reader: StoreReader, split: Split, sae: SaeConfig) -> dict[str, Any]:
    """What delphi records of its own caches, and the layers as the store counts them."""
    spec = reader.spec
    return {
        "dataset_repo": spec.text["dataset"],
        "dataset_split": split,
        "dataset_name": "",
        "dataset_column": spec.text.get("text_field"),
        "batch_size": spec.batch_rows,
        "cache_ctx_len": spec.context,
        "n_tokens": len(split_rows(spec, split)) * spec.context,
        "n_splits": min(_FILES, sae.latents),
        "model_name": spec.model["name"],
        "layers": list(sae.layers),
    }


def _write_hookpoint(
    folder: Path,
    activations: Path,
    reader: StoreReader,
    split: Split,
    layer: int | None,
    count_F: Ints,
) -> None:
    rows, latents = split_rows(reader.spec, split), len(count_F)
    edges = np.linspace(0, latents, min(_FILES, latents) + 1).astype(np.int64)
    largest = max(len(rows), reader.spec.context, int(np.diff(edges).max())) - 1
    integer = np.uint16 if largest <= _LARGEST_SHORT else np.uint32
    with ExitStack() as stack:
        files = []
        for start, stop in pairwise(edges.tolist()):
            n = int(count_F[start:stop].sum())
            tensors = {
                "tokens": (np.dtype(np.int32), (len(rows), reader.spec.context)),
                "locations": (np.dtype(integer), (n, 3)),
                "activations": (np.dtype(np.float16), (n,)),
            }
            path = folder / f"{start}_{stop - 1}.safetensors"
            files.append(stack.enter_context(TensorFile(path, tensors)))
        for chunk in reader.chunks(split):
            tokens_RT = reader.rows(chunk).tokens_RT
            for file in files:
                file.append("tokens", tokens_RT)
        for part in read_activations(activations):
            at_layer = slice(None) if layer is None else part.layer_P == layer
            columns = (part.row_P - rows.start, part.position_P, part.latent_P)
            where_P3 = np.stack(columns, axis=1)[at_layer]
            value_P = np.minimum(part.value_P[at_layer], _LARGEST_HALF)
            for file, (start, stop) in zip(files, pairwise(edges), strict=True):
                inside = (where_P3[:, 2] >= start) & (where_P3[:, 2] < stop)
                file.append("locations", where_P3[inside] - (0, 0, start))
                file.append("activations", value_P[inside])


class TensorFile:
    """A safetensors file of tensors whose sizes are known and whose rows come bit by bit.

    Args:
        tensors: dtype and shape of each, the widest dtypes first, which keeps them aligned.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]
    ) -> None:
        self._dtypes = {name: dtype for name, (dtype, _) in tensors.items()}
        sizes = [math.prod(shape) * dtype.itemsize for dtype, shape in tensors.values()]
        offsets = list(pairwise(accumulate(sizes, initial=0)))
        header = {
            name: {"dtype": _TYPES[dtype.name], "shape": shape, "data_offsets": offset}
            for (name, (dtype, shape)), offset in zip(tensors.items(), offsets, strict=True)
        }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        data = 8 + len(text)
        self._next = {name: data + a for name, (a, _) in zip(tensors, offsets, strict=True)}
        self._end = {name: data + b for name, (_, b) in zip(tensors, offsets, strict=True)}
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def append(self, name: str, rows: NDArray[Any]) -> None:
        """Write further rows of a tensor."""
        content = rows.astype(self._dtypes[name]).tobytes()
        self._file.seek(self._next[name])
        self._file.write(content)
        self._next[name] += len(content)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        assert kind is not None or self._next == self._end
