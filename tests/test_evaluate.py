"""Evaluation against a float64 computation token by token."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from routesae_cache.checkpoint import RunError, load_run
from routesae_cache.evaluate import EvaluateConfig, evaluate
from routesae_cache.train import train
from routesae_cache.train_plan import TrainConfig
from routesae_cache.trained import ReadingRule
from stores.reader import StoreReader
from tests.pipeline_helpers import all_tokens, config, run, topk

SAES = [
    topk((3,)),
    topk((1, 2, 3), route_estimator="straight-through"),
    topk((1, 2, 3), route_estimator="factor", k=6),
    topk((1, 2, 3), hard=False, k=5),
]


@pytest.fixture(scope="module")
def reader(tiny_model_dir: Path, tiny_corpus: Path, tmp_path_factory: Any) -> StoreReader:
    return run(config(tiny_model_dir, tiny_corpus, tmp_path_factory.mktemp("e") / "s.zarr"))


@pytest.fixture(scope="module")
def runs(reader: StoreReader, tmp_path_factory: Any) -> list[Path]:
    options = TrainConfig(out=tmp_path_factory.mktemp("runs"), batch_tokens=64, epochs=3)
    return list(train(reader, [(sae, 1) for sae in SAES], options).folders)


def normalised(reader: StoreReader, layers: tuple[int, ...]) -> torch.Tensor:
    x_NLD = np.stack(list(all_tokens(reader, layers, "eval").values())).astype(np.float64)
    mean, std = x_NLD.mean(-1, keepdims=True), x_NLD.std(-1, ddof=1, keepdims=True)
    return torch.from_numpy((x_NLD - mean) / (std + 1e-6))


@pytest.mark.parametrize("index", range(len(SAES)))
@pytest.mark.parametrize("rule", [{}, {"infer_k": 2}, {"theta": 0.3}])
def test_against_float64(index: int, rule: Any, reader: StoreReader, runs: list[Path]) -> None:
    (result,) = evaluate(
        reader, [runs[index]], EvaluateConfig(batch_tokens=17, rule=ReadingRule(**rule))
    )
    sae, run_config = load_run(runs[index])
    x_NLD = normalised(reader, run_config.sae.layers)
    output = sae.double().inference(x_NLD, **rule)
    scale = 1.0 if output.scale_M is None else output.scale_M[:, None]
    target_MD, found_MD = output.target_MD / scale, output.reconstruction_MD / scale
    error_M = (target_MD - found_MD).square().sum(-1)
    metrics = result.reconstruction
    assert metrics.tokens == len(x_NLD) == 60
    nmse = (error_M / target_MD.square().sum(-1)).mean()
    assert metrics.nmse == pytest.approx(float(nmse), rel=1e-4)
    spread = (target_MD - target_MD.mean(0)).square().sum()
    assert metrics.explained_variance == pytest.approx(float(1 - error_M.sum() / spread), rel=1e-4)
    dense_MF = output.latents.dense(64)
    assert metrics.l0 == pytest.approx(float((dense_MF != 0).sum(-1).double().mean()), abs=0.05)
    dead = 1 - float((dense_MF != 0).any(0).double().mean())
    assert metrics.dead_share == pytest.approx(dead, abs=0.02)
    if output.layer_M is not None:
        use = torch.bincount(output.layer_M, minlength=len(run_config.sae.layers)) / 60
        assert metrics.layer_use is not None
        assert list(metrics.layer_use.values()) == pytest.approx(use.tolist())


def test_routing_is_between_random_and_best(reader: StoreReader, runs: list[Path]) -> None:
    results = evaluate(reader, runs, EvaluateConfig())
    assert [result.routing is not None for result in results] == [False, True, True, False]
    for result in results[1:3]:
        assert result.routing is not None
        assert result.routing.oracle <= result.routing.router
        assert result.routing.oracle < result.routing.random
        assert result.routing.router == pytest.approx(result.reconstruction.nmse, rel=1e-4)
        entropy = result.reconstruction.router_entropy
        assert entropy is not None
        assert 0 <= entropy <= np.log(3) + 1e-6


def test_one_pass_gives_what_single_ones_do(reader: StoreReader, runs: list[Path]) -> None:
    together = evaluate(reader, runs, EvaluateConfig())
    for one, run_folder in zip(together, runs, strict=True):
        (alone,) = evaluate(reader, [run_folder], EvaluateConfig())
        assert alone.reconstruction.nmse == pytest.approx(one.reconstruction.nmse, rel=1e-5)


def test_collapse_is_named(reader: StoreReader, runs: list[Path]) -> None:
    result = evaluate(reader, [runs[1]], EvaluateConfig())[0]
    collapsed = replace(result.reconstruction, layer_use={1: 0.0, 2: 0.99, 3: 0.01})
    assert replace(result, reconstruction=collapsed).collapsed_onto == 2
    even = replace(result.reconstruction, layer_use={1: 0.3, 2: 0.4, 3: 0.3})
    assert replace(result, reconstruction=even).collapsed_onto is None


def test_both_rules_at_once(reader: StoreReader, runs: list[Path]) -> None:
    with pytest.raises(ValueError, match="give one"):
        evaluate(reader, runs, EvaluateConfig(rule=ReadingRule(infer_k=2, theta=0.1)))


def test_other_models_residuals(
    tiny_model: Any, tiny_model_dir: Path, tiny_corpus: Path, runs: list[Path], tmp_path: Path
) -> None:
    fewer = run(config(tiny_model_dir, tiny_corpus, tmp_path / "few.zarr", layers="1-2"))
    with pytest.raises(RunError, match=r"reads the layers \[3\], which the store lacks"):
        evaluate(fewer, [runs[0]], EvaluateConfig())
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj.weight.data += 0.1
    model.save_pretrained(folder)
    other = run(config(folder, tiny_corpus, tmp_path / "other.zarr"))
    with pytest.raises(RunError, match="residuals of another model"):
        evaluate(other, [runs[0]], EvaluateConfig())
