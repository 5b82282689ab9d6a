"""Harvest: what is stored, and what is left after an end at any instant."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from routesae_cache import harvest as harvest_module
from routesae_cache.harvest import harvest
from routesae_cache.harvest_plan import plan_harvest
from routesae_cache.lm import LanguageModel, load_lm
from routesae_cache.text import TextConfig, open_text
from routesae_cache.tokens import load_tokenizer, rows
from stores.codecs import Bf16Codec, DeltaCodec
from stores.errors import NonFiniteError, SpecMismatchError, StoreError
from stores.reader import StoreReader
from stores.stats import split_stats
from stores.writer import StoreWriter
from tests.pipeline_helpers import array_files, config, fail_at, run


@pytest.fixture(scope="module")
def reference(tiny_model_dir: Path, tiny_corpus: Path, tmp_path_factory: Any) -> StoreReader:
    """A harvest that was never interrupted."""
    return run(config(tiny_model_dir, tiny_corpus, tmp_path_factory.mktemp("ref") / "s.zarr"))


def test_tokens_are_the_rows_of_the_text(
    reference: StoreReader, tiny_model_dir: Path, tiny_corpus: Path
) -> None:
    text = open_text(TextConfig(dataset=str(tiny_corpus)))
    tokenizer = load_tokenizer(str(tiny_model_dir))
    expected = rows(text.documents(), tokenizer, context=16, packing="joined")
    stored = [row for c in reference.chunks("all") for row in reference.rows(c).tokens_RT]
    assert len(stored) == reference.spec.rows
    assert all(np.array_equal(a, b.tokens) for a, b in zip(stored, expected, strict=False))
    assert '"title": "Document' in reference.rows(0).documents[0]


def test_splits_are_whole_chunks_of_at_least_what_was_asked(reference: StoreReader) -> None:
    spec = reference.spec
    assert (spec.eval_rows, spec.train_rows) == (4, 20)
    assert (spec.eval_tokens, spec.train_tokens) == (64, 320)
    assert reference.chunks("eval") == [0]
    assert reference.chunks("train") == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("codec", [Bf16Codec(), DeltaCodec(step=0.1)])
def test_residuals_are_the_models(
    codec: Any, tiny_model_dir: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    reader = run(config(tiny_model_dir, tiny_corpus, tmp_path / "s.zarr", codec=codec))
    lm = load_lm(str(tiny_model_dir), dtype="float32")
    ids_RT = torch.from_numpy(reader.rows(2).tokens_RT)
    expected_NLD = torch.stack(lm.residuals(ids_RT, [1, 2, 3]), 2).flatten(0, 1).numpy()
    error_NL = ((reader.residuals(2, [1, 2, 3]) - expected_NLD) ** 2).mean(-1)
    relative_NL = error_NL / expected_NLD.var(-1)
    assert relative_NL.mean() < (1e-5 if codec.kind == "bf16" else 2e-3)
    assert relative_NL.max() > 0


def test_statistics_leave_out_first_positions(reference: StoreReader) -> None:
    x_NLD = np.concatenate([reference.residuals(c, [1, 2, 3]) for c in reference.chunks("train")])
    counted_N = np.arange(len(x_NLD)) % 16 > 0
    stats = split_stats(reference, "train")
    assert stats.count == counted_N.sum()
    np.testing.assert_allclose(stats.mean_LD, x_NLD[counted_N].mean(0), atol=2e-3)
    np.testing.assert_allclose(stats.mean_square_L, (x_NLD[counted_N] ** 2).mean((0, 2)), rtol=1e-2)


@pytest.mark.parametrize("call", range(12))
def test_interrupted_and_resumed_is_the_same_store(
    call: int,
    reference: StoreReader,
    tiny_model_dir: Path,
    tiny_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    corpus = tmp_path / tiny_corpus.name
    shutil.copy(tiny_corpus, corpus)
    wanted = config(tiny_model_dir, corpus, tmp_path / "s.zarr")
    with monkeypatch.context() as patch:
        failing = fail_at(call, LanguageModel.residuals, KeyboardInterrupt())
        patch.setattr(LanguageModel, "residuals", failing)
        patch.setattr("routesae_cache.lm._check_causal", lambda lm: None)
        with pytest.raises(KeyboardInterrupt):
            harvest(plan_harvest(wanted))
    assert len(StoreReader(wanted.out).committed) in (call // 2, call // 2 - 1)
    corpus.unlink()  # tokens were written first: the text is not needed again
    assert array_files(run(wanted).path) == array_files(reference.path)


def test_interrupted_among_the_tokens(
    reference: StoreReader,
    tiny_model_dir: Path,
    tiny_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = config(tiny_model_dir, tiny_corpus, tmp_path / "s.zarr")
    for call in range(7):  # six chunks of rows
        with monkeypatch.context() as patch:
            name = "write_rows" if call < 6 else "commit_rows"
            failing = fail_at(call % 6, getattr(StoreWriter, name), KeyboardInterrupt())
            patch.setattr(StoreWriter, name, failing)
            with pytest.raises(KeyboardInterrupt):
                harvest(plan_harvest(wanted))
    assert array_files(run(wanted).path) == array_files(reference.path)


def _harvest_forever(wanted: Any) -> None:
    original = harvest_module._ChunkEncoding.commit

    def slow(self: Any) -> int:
        time.sleep(0.05)
        return original(self)

    harvest_module._ChunkEncoding.commit = slow  # type: ignore[method-assign]
    harvest(plan_harvest(wanted))


@pytest.mark.parametrize("after_chunks", [1, 3])
def test_killed_and_resumed_is_the_same_store(
    after_chunks: int,
    reference: StoreReader,
    tiny_model_dir: Path,
    tiny_corpus: Path,
    tmp_path: Path,
) -> None:
    wanted = config(tiny_model_dir, tiny_corpus, tmp_path / "s.zarr")
    process = multiprocessing.get_context("spawn").Process(target=_harvest_forever, args=(wanted,))
    process.start()
    committed = wanted.out / "committed" / "c"
    while process.is_alive() and (
        not committed.exists() or len(list(committed.iterdir())) < after_chunks
    ):
        time.sleep(0.002)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert array_files(run(wanted).path) == array_files(reference.path)


def test_complete_store_needs_neither_text_nor_work(
    reference: StoreReader, tiny_model_dir: Path, tiny_corpus: Path
) -> None:
    plan = plan_harvest(config(tiny_model_dir, tiny_corpus, reference.path))
    assert plan.complete
    assert plan.tokens == 384


def test_extended_is_the_same_as_harvested_at_once(
    tiny_model_dir: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    once = run(config(tiny_model_dir, tiny_corpus, tmp_path / "once.zarr", tokens=600))
    run(config(tiny_model_dir, tiny_corpus, tmp_path / "twice.zarr", tokens=200))
    twice = run(config(tiny_model_dir, tiny_corpus, tmp_path / "twice.zarr", tokens=600))
    assert twice.spec.train_tokens == 640
    assert array_files(once.path) == array_files(twice.path)


def test_text_that_runs_out(tiny_model_dir: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    wanted = config(tiny_model_dir, tiny_corpus, tmp_path / "s.zarr", tokens=10**6, context=23)
    reader = run(wanted)
    assert reader.spec.exhausted
    assert reader.spec.train_tokens < 10**6
    assert plan_harvest(wanted).complete
    last = reader.rows(reader.spec.chunks - 1)
    assert last.lengths_R[-1] < 23
    padding_TD = reader.residuals(reader.spec.chunks - 1, [2])[-(23 - last.lengths_R[-1]) :]
    assert not padding_TD.any()


def test_a_last_chunk_that_is_not_full_stays_as_it_is(
    tiny_model_dir: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    wanted = config(tiny_model_dir, tiny_corpus, tmp_path / "s.zarr", context=64, chunk_rows=16)
    reader = run(replace(wanted, tokens=10**6))
    assert reader.spec.rows % 16
    exactly = replace(wanted, tokens=reader.spec.train_tokens, out=tmp_path / "t.zarr")
    assert run(exactly).spec.exhausted
    run(replace(exactly, tokens=10**6))
    assert array_files(tmp_path / "t.zarr") == array_files(reader.path)


def test_documents_apart(tiny_model_dir: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    reader = run(
        config(tiny_model_dir, tiny_corpus, tmp_path / "s.zarr", packing="document", context=64)
    )
    lengths = np.concatenate([reader.rows(c).lengths_R for c in reader.chunks("all")])
    assert lengths.min() < 64
    assert reader.spec.tokens == lengths.sum()
    counted = sum(int(reader.rows(c).counted_RT().sum()) for c in reader.chunks("train"))
    assert split_stats(reader, "train").count == counted


def test_no_text_left_for_training(tiny_model_dir: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.zarr"
    with pytest.raises(StoreError, match="all went to the eval split"):
        run(config(tiny_model_dir, tiny_corpus, out, eval_tokens=10**6))
    assert not out.exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"codec": DeltaCodec()}, "codec.kind: the store has 'int8', asked for 'delta'"),
        ({"layers": "1-2"}, "layers"),
        ({"context": 32}, "context: the store has 16, asked for 32"),
        ({"seed": 7}, "text.seed: the store has 42, asked for 7"),
        ({"dtype": "bfloat16"}, "model.dtype"),
        ({"eval_tokens": 90}, "eval_target: the store has 60, asked for 90"),
        ({"packing": "document"}, "packing"),
    ],
)
def test_other_settings_than_the_stores(
    changes: dict[str, Any],
    named: str,
    reference: StoreReader,
    tiny_model_dir: Path,
    tiny_corpus: Path,
) -> None:
    before = array_files(reference.path)
    with pytest.raises(SpecMismatchError, match=named.replace(".", r"\.")):
        plan_harvest(config(tiny_model_dir, tiny_corpus, reference.path, **changes))
    assert array_files(reference.path) == before


def test_other_weights_under_the_same_name(
    tiny_model: Any, tiny_model_dir: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    run(config(folder, tiny_corpus, tmp_path / "s.zarr"))
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight += 0.1
    model.save_pretrained(folder)
    with pytest.raises(SpecMismatchError, match=r"model\.weights"):
        harvest(plan_harvest(config(folder, tiny_corpus, tmp_path / "s.zarr", tokens=600)))


def test_other_text_of_the_same_name(
    tiny_model_dir: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    corpus = tmp_path / "text.jsonl"
    shutil.copy(tiny_corpus, corpus)
    run(config(tiny_model_dir, corpus, tmp_path / "s.zarr"))
    corpus.write_text(corpus.read_text().replace("router", "reader"))  # of the same size
    with pytest.raises(SpecMismatchError, match=r"text: chunk \d"):
        run(config(tiny_model_dir, corpus, tmp_path / "s.zarr", tokens=600))
    corpus.write_text(corpus.read_text() + '{"text": "more"}\n')
    with pytest.raises(SpecMismatchError, match=r"text\.files"):
        run(config(tiny_model_dir, corpus, tmp_path / "s.zarr"))


def test_activations_that_are_not_finite(
    tiny_model_dir: Path, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = LanguageModel.residuals

    def residuals(self: Any, ids_RT: Any, layers: Any) -> Any:
        found = [x_RTD.clone() for x_RTD in original(self, ids_RT, layers)]
        if len(found) == 3:
            found[1][1, 5, 7] = float("nan")
        return found

    monkeypatch.setattr(LanguageModel, "residuals", residuals)
    with pytest.raises(NonFiniteError, match="row 1, layer 2"):
        run(config(tiny_model_dir, tiny_corpus, tmp_path / "s.zarr"))
    assert StoreReader(tmp_path / "s.zarr").committed == []


def test_not_enough_disk(
    tiny_model_dir: Path, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stores.local.LocalPlace.free_bytes", lambda place: 10_000)
    plan = plan_harvest(config(tiny_model_dir, tiny_corpus, tmp_path / "s.zarr"))
    with pytest.raises(ValueError, match="free space"):
        harvest(plan)
    assert not (tmp_path / "s.zarr").exists()


def test_estimate_is_near_the_truth(reference: StoreReader, tiny_model_dir: Path) -> None:
    codec, spec = reference.spec.codec, reference.spec
    estimate = codec.estimated_bits(len(spec.layers), spec.width)
    assert 4 < estimate < 7


@pytest.mark.parametrize("changes", [{"context": 4096}, {"layers": "3-9"}, {"layers": "x"}])
def test_what_the_model_cannot_do(
    changes: dict[str, Any], tiny_model_dir: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"context 4096 is beyond|layers?"):
        plan_harvest(config(tiny_model_dir, tiny_corpus, tmp_path / "s.zarr", **changes))
