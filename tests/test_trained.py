"""Normalisation is undone exactly, for every kind of SAE."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from routesae_cache.saes.config import SaeConfig
from routesae_cache.train import train
from routesae_cache.train_plan import TrainConfig
from routesae_cache.trained import Residuals, TrainedSae, layers_read, reconstruction_MD
from stores.reader import StoreReader
from tests.pipeline_helpers import config, run, topk

SAES = [
    topk((3,), norm="scalar"),
    topk((3,), norm="none"),
    topk((1, 2, 3), route_estimator="factor"),
    topk((1, 2, 3), selector="every"),
    SaeConfig(selector="all", coder="relu", layers=(1, 2, 3), latents=64, sparsity_weight=1e-3),
]


@pytest.fixture(scope="module")
def reader(tiny_model_dir: Path, tiny_corpus: Path, tmp_path_factory: Any) -> StoreReader:
    return run(config(tiny_model_dir, tiny_corpus, tmp_path_factory.mktemp("t") / "s.zarr"))


@pytest.fixture(scope="module")
def trained(reader: StoreReader, tmp_path_factory: Any) -> list[TrainedSae]:
    options = TrainConfig(out=tmp_path_factory.mktemp("runs"), batch_tokens=64, epochs=1)
    folders = train(reader, [(sae, 1) for sae in SAES], options).folders
    return [TrainedSae(folder, reader.spec) for folder in folders]


@pytest.mark.parametrize("index", range(len(SAES)))
def test_a_perfect_reconstruction_is_the_residual(index: int, trained: list[TrainedSae]) -> None:
    sae = trained[index]
    x_NLD = 3 + 5 * torch.randn(7, 4, 32, generator=torch.Generator().manual_seed(0))
    seen = Residuals(x_NLD, (0, 1, 2, 3)).seen_by(sae.config)
    output = sae(seen.x)
    perfect = output._replace(reconstruction_MD=output.target_MD)
    assert output.layer_M is not None
    token_M = torch.arange(7).repeat_interleave(len(output.layer_M) // 7)
    layer_M = torch.tensor(sae.config.sae.layers)[output.layer_M]
    torch.testing.assert_close(
        reconstruction_MD(perfect, seen), x_NLD[token_M, layer_M], atol=1e-4, rtol=1e-5
    )


def test_a_mixture_of_layers_has_no_reconstruction(trained: list[TrainedSae]) -> None:
    sae = trained[2]
    seen = Residuals(torch.randn(7, 3, 32), (1, 2, 3)).seen_by(sae.config)
    soft = sae(seen.x)._replace(layer_M=None)
    with pytest.raises(ValueError, match="soft routing"):
        reconstruction_MD(soft, seen)


def test_scalar_normalisation_divides_by_the_root_mean_square(trained: list[TrainedSae]) -> None:
    config = dataclasses.replace(trained[0].config, mean_square=4.0)
    seen = Residuals(torch.full((2, 1, 32), 6.0), (3,)).seen_by(config)
    assert seen.x.eq(3).all()


def test_layers_of_several(trained: list[TrainedSae]) -> None:
    assert layers_read(sae.config for sae in trained) == (1, 2, 3)
