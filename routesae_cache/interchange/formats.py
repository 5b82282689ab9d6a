"""The one table from the names of formats to what writes and reads them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from routesae_cache.checkpoint import RunConfig
from routesae_cache.interchange import saelens, sparsify
from routesae_cache.interchange.folding import FoldedCoder

Reconstruct = Callable[[Tensor], Tensor]
"""(N, D) residuals as the model has them -> their reconstructions."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """How one other library keeps an SAE on one layer in a directory."""

    title: str
    package: str
    """What installs the library."""
    module: str
    refusal: Callable[[RunConfig], str | None]
    """Why a run cannot be exported, if so."""
    write: Callable[[Path, RunConfig, FoldedCoder, int, str], None]
    """Folder, run, weights, layer, the model's name."""
    load: Callable[[Path], Reconstruct]
    """Read a directory back with the library itself."""
    hook: Callable[[int], str]
    """The library's name for a layer."""
    usage: str
    """Python that loads `{folder}`."""
    model_note: str
    """How to load the language model so that it has the residuals trained on."""

    @property
    def installed(self) -> bool:
        """Whether the library is there to read a directory back."""
        return importlib.util.find_spec(self.module) is not None


FORMATS: Mapping[str, Format] = {
    "saelens": Format(
        title="SAELens (version 6)",
        package="sae-lens",
        module="sae_lens",
        refusal=lambda config: None,
        write=saelens.write,
        load=saelens.load,
        hook=saelens.hook_name,
        usage='from sae_lens import SAE\n\nsae = SAE.load_from_disk("{folder}")',
        model_note="Load the language model with `from_pretrained_no_processing`: processed "
        "weights can have other residuals.",
    ),
    "sparsify": Format(
        title="sparsify",
        package="eai-sparsify",
        module="sparsify",
        refusal=sparsify.refusal,
        write=sparsify.write,
        load=sparsify.load,
        hook=sparsify.hook_name,
        usage='from sparsify import SparseCoder\n\nsae = SparseCoder.load_from_disk("{folder}")',
        model_note="The hook is the name of a module below the model's base, whose output to take.",
    ),
}


def find_format(name: str) -> Format:
    """A format by its name; ValueError lists the names there are."""
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}; there are {', '.join(FORMATS)}")
    return FORMATS[name]
