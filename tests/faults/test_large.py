"""Large stores: memory does not grow with them, and they open at once.

A hundred times the rows that are in memory together, of few tokens and a tiny width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from routesae_cache.tokens import load_tokenizer
from stores.codecs import Bf16Codec
from stores.layout import TokenRows
from stores.spec import StoreSpec
from stores.writer import StoreWriter
from tests.faults.peak import SECONDS_TO_OPEN, peak, seconds_to_open
from tests.faults.tally import Tally
from tests.store_helpers import encoded_chunk, store_spec

VOCAB = 300


def synthetic(path: Path, *, chunks: int, **sizes: Any) -> StoreSpec:
    """A store of so many chunks, the first of them eval; every chunk has the same residuals."""
    plain = {"packing": "joined", "codec": Bf16Codec(), "eval_rows": 0, "train_rows": 0}
    empty = store_spec(**plain | sizes)
    rng = np.random.default_rng(0)
    shape = (empty.chunk_rows, empty.context)
    tokens_RT = rng.integers(0, VOCAB, shape, np.int32)
    lengths_R = np.full(empty.chunk_rows, empty.context, np.int32)
    rows = TokenRows(tokens_RT, lengths_R, ["[]"] * empty.chunk_rows)
    n_tokens = tokens_RT.size
    x_LND = [
        rng.standard_normal((n_tokens, empty.width), np.float32) for _ in range(len(empty.layers))
    ]
    codes, stats = encoded_chunk(empty, 0, x_LND, rows)
    spec = StoreSpec.from_dict(
        empty.to_dict()
        | {"eval_rows": empty.chunk_rows, "train_rows": (chunks - 1) * empty.chunk_rows}
        | {"eval_tokens": n_tokens, "train_tokens": (chunks - 1) * n_tokens}
    )
    with StoreWriter.create(path, empty) as writer:
        for chunk in range(chunks):
            writer.write_rows(chunk, rows)
        writer.commit_rows(spec)
        for chunk in range(chunks):
            writer.write_chunk(chunk, rows, codes, stats)
    return spec


@pytest.fixture(scope="module")
def many_rows(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> tuple[Path, Path]:
    """Stores of 30 and 300 thousand rows: 17 and 155 MB of codes."""
    folder = tmp_path_factory.mktemp("many-rows")
    sizes = {"layers": (1, 2), "width": 16, "context": 8, "chunk_rows": 4096, "eval_target": 1}
    sizes |= {"tokenizer": load_tokenizer(str(tiny_model_dir)).identity()}
    small, large = folder / "small.zarr", folder / "large.zarr"
    synthetic(small, chunks=8, **sizes)
    assert synthetic(large, chunks=74, **sizes).rows == 303_104
    return small, large


TRAIN = ["--sae", "topk", "--layer", 1, "--latents", 32, "--k", 4, "--batch-tokens", 16384]
SPLIT = ["--split", "train", "--batch-tokens", 16384]


@pytest.mark.parametrize("name", ["train", "evaluate", "contexts", "verify", "recode"])
def test_memory_does_not_grow_with_rows(
    name: str, many_rows: Any, tiny_model_dir: Path, tmp_path: Path, tally: Tally
) -> None:
    found = []
    for store in many_rows:
        folder = tmp_path / store.stem
        folder.mkdir()
        train = ["train", store, *TRAIN, "--out", "saes"]
        run = "saes/topk_k4_l1_f32_s42"
        if name in ("evaluate", "contexts"):
            peak(folder, *train, "--tokens", 16384)
            run = str(next((folder / "saes").glob("[!.]*")))
        options = {
            "train": train,
            "evaluate": ["evaluate", store, run, *SPLIT],
            "contexts": [
                *("contexts", store, run, *SPLIT, "--threshold", 0.1),
                *("--model", tiny_model_dir, "--out", "contexts"),
            ],
            "verify": ["store", "verify", store],
            "recode": ["store", "recode", store, "t.zarr", "--codec", "int8"],
        }
        found.append(peak(folder, *options[name]))
    small, large = found
    assert large - small < 40e6, f"{small / 1e6:.0f} and {large / 1e6:.0f} MB"
    tally.add("ten times the rows")


def test_opening_takes_no_second(many_rows: Any) -> None:
    _, large = many_rows
    assert seconds_to_open(large) < SECONDS_TO_OPEN
