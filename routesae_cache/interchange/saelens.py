"""SAELens, version 6: `cfg.json` and `sae_weights.safetensors`."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from routesae_cache.checkpoint import RunConfig, save_tensors
from routesae_cache.interchange.folding import FoldedCoder
from routesae_cache.saes.config import CoderKind

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
FORMAT_VERSION = "6.0.0"
"""The first SAELens with this layout; what it reads as older than that it converts."""


class _Architecture(NamedTuple):
    """What SAELens calls a coder."""

    name: str
    latent: Mapping[str, str]
    """SAELens' name of a tensor with a value for each latent -> this project's."""


_JUMPRELU = _Architecture("jumprelu", {"b_enc": "latent_bias", "threshold": "threshold"})
ARCHITECTURES: Mapping[CoderKind, _Architecture] = {
    "relu": _Architecture("standard", {"b_enc": "latent_bias"}),
    "gated": _Architecture("gated", {"b_gate": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag"}),
    "topk": _Architecture("topk", {"b_enc": "latent_bias"}),
    "jumprelu": _JUMPRELU,
    "batchtopk": _JUMPRELU,
    "matryoshka": _JUMPRELU,
}


def hook_name(layer: int) -> str:
    """TransformerLens' name of a layer: the residual stream after block ℓ−1."""
    return f"blocks.{layer - 1}.hook_resid_post" if layer else "blocks.0.hook_resid_pre"


def write(folder: Path, config: RunConfig, coder: FoldedCoder, layer: int, model: str) -> None:
    """Write one SAE for one layer."""
    record = _config(config, coder, layer, model)
    (folder / CONFIG).write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    architecture = ARCHITECTURES[config.sae.coder]
    tensors = {
        "W_enc": coder.encoder_FD.T.contiguous(),
        "W_dec": coder.decoder_FD.contiguous(),
        "b_dec": coder.bias_D.contiguous(),
    }
    tensors |= {theirs: coder.latent[ours] for theirs, ours in architecture.latent.items()}
    save_tensors(tensors, folder / WEIGHTS, {"format": "pt"})


def load(folder: Path) -> Callable[[Tensor], Tensor]:
    """The SAE as `sae-lens` itself reads it back."""
    sae = importlib.import_module("sae_lens").SAE.load_from_disk(str(folder))
    return lambda x_ND: sae(x_ND).detach()


def _config(config: RunConfig, coder: FoldedCoder, layer: int, model: str) -> dict[str, Any]:
    latents, width = coder.encoder_FD.shape
    record: dict[str, Any] = {
        "architecture": ARCHITECTURES[config.sae.coder].name,
        "d_in": width,
        "d_sae": latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "layer_norm" if config.sae.norm == "token" else "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": FORMAT_VERSION,
            "sae_lens_training_version": None,
            "model_name": model,
            "hook_name": hook_name(layer),
            "hook_head_index": None,
            "context_size": config.store_spec["context"],
            "prepend_bos": config.store_spec["tokenizer"].get("bos_id") is not None,
            "dataset_path": config.store_spec["text"]["dataset"],
            "run": config.name,
        },
    }
    if config.sae.coder == "topk":
        record |= {"k": config.sae.k, "rescale_acts_by_decoder_norm": False}
    return record
