"""sparsify (eai-sparsify 1.x): `cfg.json` and `sae.safetensors`."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from routesae_cache.checkpoint import RunConfig, save_tensors
from routesae_cache.interchange.folding import FoldedCoder

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


def hook_name(layer: int) -> str:
    """The module, below the model's base, whose output the layer is."""
    return f"layers.{layer - 1}" if layer else "embed_tokens"


def refusal(config: RunConfig) -> str | None:
    """Why sparsify has no place for a run, if so."""
    if config.sae.coder != "topk":
        return f"sparsify has TopK alone, and this is {config.sae.coder}; --format saelens has all"
    if config.sae.norm == "token":
        return (
            "it was trained with --norm token, a factor for each token, which cannot be folded "
            "into weights, and sparsify does not normalise; train with --norm scalar (one factor, "
            "which is folded) or none, or use --format saelens"
        )
    return None


def write(folder: Path, config: RunConfig, coder: FoldedCoder, layer: int, model: str) -> None:
    """Write one SAE for one layer."""
    latents, width = coder.encoder_FD.shape
    record = {
        "activation": "topk",
        "expansion_factor": max(1, latents // width),
        "normalize_decoder": config.sae.norm == "none",  # a folded factor is in the directions
        "num_latents": latents,
        "k": config.sae.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": width,
    }
    (folder / CONFIG).write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    tensors = {
        "encoder.weight": coder.encoder_FD.contiguous(),
        "encoder.bias": coder.latent["latent_bias"],
        "W_dec": coder.decoder_FD.contiguous(),
        "b_dec": coder.bias_D.contiguous(),
    }
    save_tensors(tensors, folder / WEIGHTS, {"format": "pt"})


def load(folder: Path) -> Callable[[Tensor], Tensor]:
    """The SAE as `eai-sparsify` itself reads it back, on the CPU."""
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
    coder = importlib.import_module("sparsify").SparseCoder.load_from_disk(str(folder))

    def reconstruct(x_ND: Tensor) -> Tensor:
        encoded = coder.encode(x_ND)
        decoded: Tensor = coder.decode(encoded.top_acts, encoded.top_indices)
        return decoded.detach()

    return reconstruct
