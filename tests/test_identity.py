"""Two models are told apart, and one is known again."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from routesae_cache.identity import config_hash, weights_hash


def test_config_hash_is_about_what_the_model_computes() -> None:
    config = {"hidden_size": 8, "rope": {"theta": 1.0}, "dtype": "float32"}
    same = {"dtype": "bfloat16", "rope": {"theta": 1.0, "dtype": "x"}, "hidden_size": 8}
    same |= {"transformers_version": "9", "_name_or_path": "elsewhere"}
    assert config_hash(config) == config_hash(same)
    assert config_hash(config) != config_hash({**config, "rope": {"theta": 2.0}})


def test_weights_hash(tiny_model: Callable[..., Any]) -> None:
    assert weights_hash(tiny_model("llama")) == weights_hash(tiny_model("llama"))
    assert weights_hash(tiny_model("llama")) != weights_hash(tiny_model("llama").bfloat16())
    changed = tiny_model("llama")
    changed.model.layers[3].mlp.down_proj.weight.data *= 1.001
    assert weights_hash(changed) != weights_hash(tiny_model("llama"))


def test_weights_hash_looks_at_every_column_of_large_matrices() -> None:
    for column in (0, 1, 100, 511):
        model = nn.Linear(512, 512, bias=False)
        before = weights_hash(model)
        with torch.no_grad():
            model.weight[:, column] += 1
        assert weights_hash(model) != before


def test_weights_hash_takes_every_saved_kind() -> None:
    model = nn.BatchNorm1d(4)
    before = weights_hash(model)
    assert model.num_batches_tracked is not None
    model.num_batches_tracked += 1
    assert weights_hash(model) != before
