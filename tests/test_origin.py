"""A store's model and tokenizer are found again, and no others are taken for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from routesae_cache.lm import ModelError
from routesae_cache.origin import origin_lm, origin_tokenizer
from stores.spec import StoreSpec
from tests.pipeline_helpers import config, run


@pytest.fixture(scope="module")
def spec(tiny_model_dir: Path, tiny_corpus: Path, tmp_path_factory: Any) -> StoreSpec:
    return run(config(tiny_model_dir, tiny_corpus, tmp_path_factory.mktemp("o") / "s.zarr")).spec


def test_the_same_model(spec: StoreSpec, tiny_model_dir: Path) -> None:
    lm = origin_lm(spec, model=str(tiny_model_dir))
    assert lm.identity.weights == spec.model["weights"]
    assert lm.dtype == torch.float32
    tokenizer = origin_tokenizer(spec, model=str(tiny_model_dir))
    assert tokenizer.identity() == spec.tokenizer


def test_other_weights(
    spec: StoreSpec,
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    tmp_path: Path,
) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is not the model that the store came from; weights"):
        origin_lm(spec, model=str(tmp_path))


def test_another_tokenizer(spec: StoreSpec, tiny_model_dir: Path) -> None:
    other = dataclasses.replace(spec, tokenizer=spec.tokenizer | {"fingerprint": "0"})
    with pytest.raises(ModelError, match="is not the tokenizer that the store came from"):
        origin_tokenizer(other, model=str(tiny_model_dir))


@pytest.mark.parametrize("find", [origin_lm, origin_tokenizer])
def test_a_local_folder_has_to_be_given(find: Callable[..., Any], spec: StoreSpec) -> None:
    with pytest.raises(ModelError, match="--model where it is now"):
        find(spec)
