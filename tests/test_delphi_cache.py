"""Delphi's cache: its files, and numbers that its types cannot hold."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from safetensors.numpy import load_file

from routesae_cache.contexts import delphi_cache
from routesae_cache.contexts.activation_files import activation_file
from routesae_cache.contexts.delphi_cache import TensorFile, hookpoints, write_delphi
from routesae_cache.contexts.mining import Activations
from stores.reader import StoreReader
from tests.pipeline_helpers import array_files, config, run, topk


@pytest.fixture(scope="module")
def reader(tiny_model_dir: Path, tiny_corpus: Path, tmp_path_factory: Any) -> StoreReader:
    """Five rows of 16 tokens in the eval split."""
    return run(config(tiny_model_dir, tiny_corpus, tmp_path_factory.mktemp("d") / "s.zarr"))


def write(folder: Path, reader: StoreReader, values: list[float]) -> Path:
    """The cache of activations of latents 0 and 63 at the tokens 39 and 55."""
    n = len(values)
    found = Activations(
        token_P=np.array([39, 55])[:n],
        latent_P=np.array([0, 63])[:n],
        value_P=np.array(values, np.float32),
        layer_P=np.full(n, 3, np.int16),
        type_P=np.zeros(n, np.int64),
    )
    parquet = folder / "a" / "activations.parquet"
    with activation_file(parquet, reader.spec.context) as file:
        file.add(found)
    count_F = np.bincount(found.latent_P, minlength=64)
    write_delphi(folder / "delphi", parquet, reader, "eval", topk((3,)), count_F[:, None], count_F)
    return folder / "delphi" / "layers.2"


def test_short_numbers(reader: StoreReader, tmp_path: Path) -> None:
    folder = write(tmp_path, reader, [2.0, 1e6])  # float16 ends at 65504
    first, last = (load_file(folder / name) for name in ("0_11.safetensors", "51_63.safetensors"))
    assert first["locations"].dtype == np.uint16
    assert first["locations"].tolist() == [[2, 7, 0]]
    assert last["locations"].tolist() == [[3, 7, 12]]
    assert (first["activations"].tolist(), last["activations"].tolist()) == ([2.0], [65504.0])
    assert load_file(folder / "12_24.safetensors")["locations"].shape == (0, 3)


def test_long_numbers(reader: StoreReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delphi_cache, "_LARGEST_SHORT", 15)  # as many as positions
    assert (
        load_file(write(tmp_path, reader, [1.0]) / "0_11.safetensors")["locations"].dtype
        == np.uint16
    )
    monkeypatch.setattr(delphi_cache, "_LARGEST_SHORT", 14)
    locations = load_file(write(tmp_path, reader, [1.0]) / "0_11.safetensors")["locations"]
    assert (locations.dtype, locations.tolist()) == (np.uint32, [[2, 7, 0]])


def test_an_older_cache_is_replaced_when_the_new_one_is_whole(
    reader: StoreReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path, reader, [1.0, 2.0])
    (folder / "64_99.safetensors").touch()  # of an SAE with more latents
    before = array_files(folder)
    with monkeypatch.context() as patch:
        patch.setattr(TensorFile, "append", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write(tmp_path, reader, [3.0])
    assert array_files(folder) == before
    write(tmp_path, reader, [3.0])
    assert not (folder / "64_99.safetensors").exists()
    assert load_file(folder / "0_11.safetensors")["activations"].tolist() == [3.0]
    assert {path.name for path in tmp_path.iterdir()} == {"a", "delphi"}


def test_hookpoints() -> None:
    assert hookpoints(topk((0,))) == {"embed_tokens": 0}
    assert hookpoints(topk((0, 4), selector="every")) == {"embed_tokens": 0, "layers.3": 4}
    assert hookpoints(topk((4, 8))) == {"routed.layers.3-layers.7": None}
    assert hookpoints(topk((4, 8), selector="random")) == {"random.layers.3-layers.7": None}
    assert hookpoints(topk((0, 8), selector="all")) == {"crosscoder.embed_tokens-layers.7": None}


@given(st.lists(st.lists(st.integers(0, 9), max_size=5), max_size=4))
def test_tensor_files(parts: list[list[int]]) -> None:
    n = sum(map(len, parts))
    tensors: Any = {"a": (np.dtype(np.int32), (n, 2)), "b": (np.dtype(np.float16), (n,))}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.safetensors"
        with TensorFile(path, tensors) as file:
            for part in parts:
                file.append("b", np.array(part))
                file.append("a", np.repeat(part, 2).reshape(-1, 2))
        found = load_file(path)
        assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0  # data are aligned
    whole = [number for part in parts for number in part]
    assert (found["a"].dtype, found["b"].dtype) == (np.int32, np.float16)
    assert found["a"].tolist() == [[number, number] for number in whole]
    assert found["b"].tolist() == whole
