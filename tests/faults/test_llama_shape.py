"""The shape of Llama-3.2-1B, 16 blocks of width 2048, from its harvest to the contexts.

The model is random, with a narrow MLP, few heads and a small vocabulary: large is what is harvested
and read. A store of 60 rows takes no more memory than one of 12.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers

import routesae_cache.batches
import routesae_cache.train_plan
from routesae_cache.json_files import read_json
from routesae_cache.lm import load_lm
from stores.reader import StoreReader
from tests.conftest import SENTENCES, VOCAB
from tests.faults.peak import SECONDS_TO_OPEN, peak, seconds_to_open
from tests.faults.tally import Tally

BLOCKS, WIDTH, CONTEXT, CHUNK_ROWS = 16, 2048, 64, 2
CHUNKS = {"small": 6, "large": 30}
"""Of 8 MB of codes each."""
ALLOWED = 90e6
"""Bytes; the larger store's codes take 201 MB more."""


class Harvested(NamedTuple):
    """A store, and the memory that its harvest took."""

    store: Path
    peak: int


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A folder with the model, in bfloat16, and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "llama-shape"
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=BLOCKS,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=128,
        initializer_range=0.1,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def harvested(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Harvested]:
    """A store of a few rows and one of a few more."""
    corpus = tmp_path_factory.mktemp("corpus") / "text.txt"
    corpus.write_text("\n\n".join(SENTENCES * 60))
    found = {}
    for name, chunks in CHUNKS.items():
        folder = tmp_path_factory.mktemp(name)
        arguments = ["--model", model, "--dataset", corpus, "--out", "s.zarr", "--layers", "1-16"]
        arguments += ["--tokens", (chunks - 1) * CHUNK_ROWS * CONTEXT, "--eval-tokens", 1]
        arguments += ["--context", CONTEXT, "--chunk-rows", CHUNK_ROWS, "--batch-rows", 1]
        arguments += ["--codec", "bf16", "--device", "cpu"]
        found[name] = Harvested(folder / "s.zarr", peak(folder, "harvest", *arguments))
    return found


def fewer_tokens_together() -> None:
    """So that a store of a few rows has more tokens than are in memory together."""
    routesae_cache.batches._GROUP_TOKENS = 256
    routesae_cache.train_plan._BIAS_SAMPLE = 256


def both(harvested: dict[str, Harvested], *arguments: object) -> tuple[int, int]:
    """Bytes of memory that a command takes in the folders of the two stores."""
    small, large = (
        peak(harvested[size].store.parent, *arguments, first=fewer_tokens_together)
        for size in CHUNKS
    )
    return small, large


def assert_flat(small: int, large: int) -> None:
    assert large - small < ALLOWED, f"{small / 1e6:.0f} and {large / 1e6:.0f} MB"


SAES = ["--sae", "topk:layer=12", "--sae", "routesae", "--latents", 64, "--k", 8]
RUNS = ["saes/topk_layer12_k8_f64_s42", "saes/routesae_k8_f64_s42"]
BATCHES = ["--batch-tokens", 64]


@pytest.fixture(scope="module")
def trained(harvested: dict[str, Harvested]) -> tuple[int, int]:
    """Runs on one layer and on all beside each store, and the memory that training them took."""
    return both(harvested, "train", "s.zarr", *SAES, *BATCHES, "--out", "saes")


def test_harvest(harvested: dict[str, Harvested], model: Path, tally: Tally) -> None:
    reader = StoreReader(harvested["large"].store)
    assert (len(reader.spec.layers), reader.spec.width) == (BLOCKS, WIDTH)
    assert reader.chunks("all") == list(range(CHUNKS["large"]))
    lm = load_lm(str(model), dtype="bfloat16")
    for chunk in (0, CHUNKS["large"] - 1):
        for row, ids_T in enumerate(reader.rows(chunk).tokens_RT):
            x_L1TD = lm.residuals(torch.from_numpy(ids_T[None]), reader.spec.layers)
            expected_TLD = torch.cat(x_L1TD).transpose(0, 1).float().numpy()
            stored_NLD = reader.residuals(chunk, reader.spec.layers)
            part = slice(row * CONTEXT, (row + 1) * CONTEXT)
            np.testing.assert_array_equal(stored_NLD[part], expected_TLD)
    assert_flat(*(each.peak for each in harvested.values()))
    tally.add("rows of 16 layers of 2048")


def test_train(trained: tuple[int, int], tally: Tally) -> None:
    assert_flat(*trained)
    tally.add("rows of 16 layers of 2048")


@pytest.mark.parametrize("name", ["verify", "recode", "evaluate"])
def test_reading(name: str, harvested: Any, trained: Any, tally: Tally) -> None:
    options = {
        "verify": ["store", "verify", "s.zarr"],
        "recode": ["store", "recode", "s.zarr", "t.zarr", "--codec", "delta"],
        "evaluate": ["evaluate", "s.zarr", *RUNS, "--split", "train", *BATCHES],
    }
    assert_flat(*both(harvested, *options[name]))
    tally.add("rows of 16 layers of 2048")


def test_contexts(harvested: Any, trained: Any, model: Path, tally: Tally) -> None:
    options = ["--split", "train", *BATCHES, "--threshold", 0.1, "--model", model]
    assert_flat(*both(harvested, "contexts", "s.zarr", *RUNS, *options, "--out", "contexts"))
    for size, (store, _) in harvested.items():
        for run in RUNS:
            found = read_json(store.parent / "contexts" / f"{Path(run).name}_0.1.json")
            assert found["tokens"] == (CHUNKS[size] - 1) * CHUNK_ROWS * (CONTEXT - 1)
            assert found["summary"]["activations"] > 0
    tally.add("rows of 16 layers of 2048")


def test_opening_takes_no_second(harvested: dict[str, Harvested]) -> None:
    assert seconds_to_open(harvested["large"].store) < SECONDS_TO_OPEN
