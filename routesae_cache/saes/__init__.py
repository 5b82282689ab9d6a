"""Sparse autoencoders: every architecture is a selector and a coder."""

from routesae_cache.saes.config import SaeConfig
from routesae_cache.saes.output import DenseLatents, FlatLatents, Latents, RowLatents, SaeOutput
from routesae_cache.saes.registry import PRESETS, SaeSpec, build_sae, parse_sae, parse_saes
from routesae_cache.saes.sae import Sae

__all__ = [
    "PRESETS",
    "DenseLatents",
    "FlatLatents",
    "Latents",
    "RowLatents",
    "Sae",
    "SaeConfig",
    "SaeOutput",
    "SaeSpec",
    "build_sae",
    "parse_sae",
    "parse_saes",
]
