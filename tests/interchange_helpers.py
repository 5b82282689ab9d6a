"""Small runs to export, and what SAELens and sparsify compute, from their documented formulas."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from routesae_cache.checkpoint import CONFIG, RunConfig, save_weights
from routesae_cache.json_files import write_json
from routesae_cache.saes.config import SaeConfig
from routesae_cache.saes.registry import build_sae
from routesae_cache.saes.sae import Sae

WIDTH, LATENTS, MEAN_SQUARE = 32, 96, 150.0
SPEC = {
    "model": {"name": "tiny", "dtype": "float32", "weights": "0"},
    "tokenizer": {"bos_id": 1},
    "text": {"dataset": "letters"},
    "context": 128,
}


def sae_config(coder: str, selector: str = "fixed", **options: Any) -> SaeConfig:
    """A small SAE with what its coder needs."""
    own = {"k": 8} if coder in ("topk", "batchtopk", "matryoshka") else {"sparsity_weight": 0.1}
    layers = (3,) if selector == "fixed" else (0, 2, 5)
    values = {"selector": selector, "coder": coder, "layers": layers, "latents": LATENTS}
    return SaeConfig(**{**values, **own, **options})


def make_run(folder: Path, sae: SaeConfig, change: Callable[[Sae], None] = lambda _: None) -> Path:
    """A finished run whose every parameter is random; `change` may set some otherwise."""
    module = build_sae(sae, WIDTH, 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(("bias", "r_mag")):
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
            if name.endswith("threshold"):
                parameter += 0.3 * torch.rand(parameter.shape, generator=generator)
        if "coder.threshold_updates" in module.state_dict():
            module.state_dict()["coder.threshold"].fill_(0.4)
        change(module)
    config = RunConfig(
        name=folder.name,
        sae=sae,
        width=WIDTH,
        seed=1,
        order_seed=1,
        lr=1e-3,
        batch_tokens=32,
        total_steps=1,
        epochs=1,
        store=str(folder / "no.zarr"),
        store_spec=SPEC,
        mean_square=MEAN_SQUARE,
        chunks=1,
    )
    folder.mkdir(parents=True)
    write_json(folder / CONFIG, config.to_dict())
    save_weights(folder, module)
    return folder


def saelens(folder: Path) -> Callable[[Tensor], Tensor]:
    """SAELens 6: x -> reconstruction, in float64."""
    config = json.loads((folder / "cfg.json").read_text())
    p = {name: t.double() for name, t in load_file(folder / "sae_weights.safetensors").items()}

    def reconstruct(x_ND: Tensor) -> Tensor:
        x_ND, mean_N1, std_N1 = x_ND.double(), torch.zeros(1), torch.ones(1)
        if config["normalize_activations"] == "layer_norm":
            mean_N1, std_N1 = x_ND.mean(-1, keepdim=True), x_ND.std(-1, keepdim=True)
            x_ND = (x_ND - mean_N1) / (std_N1 + 1e-5)
        product_NF = (x_ND - config["apply_b_dec_to_input"] * p["b_dec"]) @ p["W_enc"]
        z_NF = _SAELENS[config["architecture"]](product_NF, p, config)
        return (z_NF @ p["W_dec"] + p["b_dec"]) * std_N1 + mean_N1

    return reconstruct


def _gated(product_NF: Tensor, p: dict[str, Tensor], config: Any) -> Tensor:
    magnitude_NF = torch.relu(product_NF * p["r_mag"].exp() + p["b_mag"])
    return magnitude_NF * (product_NF + p["b_gate"] > 0)


def _jumprelu(product_NF: Tensor, p: dict[str, Tensor], config: Any) -> Tensor:
    pre_NF = product_NF + p["b_enc"]
    return torch.relu(pre_NF) * (pre_NF > p["threshold"])


def _topk(product_NF: Tensor, p: dict[str, Tensor], config: Any) -> Tensor:
    assert config["rescale_acts_by_decoder_norm"] is False
    best = (product_NF + p["b_enc"]).topk(config["k"])
    return torch.zeros_like(product_NF).scatter(-1, best.indices, best.values.relu())


_SAELENS: dict[str, Callable[[Tensor, dict[str, Tensor], Any], Tensor]] = {
    "standard": lambda product_NF, p, config: torch.relu(product_NF + p["b_enc"]),
    "gated": _gated,
    "jumprelu": _jumprelu,
    "topk": _topk,
}


def sparsify(folder: Path) -> Callable[[Tensor], Tensor]:
    """sparsify 1: x -> reconstruction, in float64."""
    config = json.loads((folder / "cfg.json").read_text())
    p = {name: t.double() for name, t in load_file(folder / "sae.safetensors").items()}
    assert config["activation"] == "topk"
    assert not config["transcode"]
    assert not config["skip_connection"]

    def reconstruct(x_ND: Tensor) -> Tensor:
        centred_ND = x_ND.double() - p["b_dec"]
        pre_NF = torch.relu(centred_ND @ p["encoder.weight"].T + p["encoder.bias"])
        best = pre_NF.topk(config["k"])
        z_NF = torch.zeros_like(pre_NF).scatter(-1, best.indices, best.values)
        return z_NF @ p["W_dec"] + p["b_dec"]

    return reconstruct
