"""Contexts from a small store, against dense activations and plain dictionaries."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from safetensors.numpy import load_file

from cli.contexts import threshold_tables
from routesae_cache import ray_contexts
from routesae_cache.checkpoint import load_run
from routesae_cache.contexts import activation_files
from routesae_cache.contexts.contexts import ContextsConfig, Mined, auto_threshold, mine_contexts
from routesae_cache.contexts.records import AtThreshold, Summary
from routesae_cache.contexts.text import CLOSE, OPEN, StoreText
from routesae_cache.json_files import read_json
from routesae_cache.origin import origin_tokenizer
from routesae_cache.ray_cluster import RayConfig
from routesae_cache.train import train
from routesae_cache.train_plan import TrainConfig
from stores.reader import StoreReader
from tests.command_helpers import routesae
from tests.pipeline_helpers import all_tokens, config, fail_at, run, topk
from tests.ray_helpers import without_ray

LAYERS = (1, 2, 3)
SAES = {
    "fixed": topk((3,)),
    "routed": topk(LAYERS, route_estimator="straight-through"),
    "soft": topk(LAYERS, hard=False, k=5),
    "every": topk(LAYERS, selector="every"),
    "crosscoder": topk(LAYERS, selector="all"),
    "relu": topk((1,), coder="relu", k=None, sparsity_weight=0.1),
    "batchtopk": topk((2,), coder="batchtopk"),
}
WITH_LAYERS = ("fixed", "routed", "every", "relu", "batchtopk")
THRESHOLD, THRESHOLDS = 0.5, (0.25, 1.0)
RULE = {"per_token": 2, "min_contexts": 3, "max_token_types": 15}


@pytest.fixture(scope="module")
def reader(tiny_model_dir: Path, tiny_corpus: Path, tmp_path_factory: Any) -> StoreReader:
    out = tmp_path_factory.mktemp("c") / "s.zarr"
    return run(config(tiny_model_dir, tiny_corpus, out, tokens=640, eval_tokens=640))


@pytest.fixture(scope="module")
def runs(reader: StoreReader, tmp_path_factory: Any) -> dict[str, Path]:
    options = TrainConfig(out=tmp_path_factory.mktemp("runs"), batch_tokens=64, tokens=256)
    folders = train(reader, [(sae, 1) for sae in SAES.values()], options).folders
    return dict(zip(SAES, folders, strict=True))


@pytest.fixture(scope="module")
def mined(
    reader: StoreReader, runs: dict[str, Path], tiny_model_dir: Path, tmp_path_factory: Any
) -> dict[str, Mined]:
    options = ContextsConfig(
        out=tmp_path_factory.mktemp("contexts") / "deep" / "er",
        threshold=THRESHOLD,
        thresholds=THRESHOLDS,
        delphi=True,
        model=str(tiny_model_dir),
        batch_tokens=100,
        **RULE,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activation_files, "_GROUP_ROWS", 333)
        results = mine_contexts(reader, list(runs.values()), options)
    return dict(zip(runs, results, strict=True))


Found = dict[tuple[int, int, int, int | None], float]
"""(row, position, latent, layer) -> activation."""


def stored(path: Path) -> Found:
    table = pq.read_table(path)
    assert table.column_names == ["row", "position", "latent", "activation", "layer"]
    columns = table.to_pydict()
    keys = zip(*(columns[name] for name in ("row", "position", "latent", "layer")), strict=True)
    found = dict(zip(keys, columns["activation"], strict=True))
    assert len(found) == len(table)
    places = list(zip(columns["row"], columns["position"], strict=True))
    assert places == sorted(places)
    return found


def dense(reader: StoreReader, folder: Path, threshold: float) -> Found:
    """Every token's latents, computed at once."""
    sae, run_config = load_run(folder)
    tokens = all_tokens(reader, run_config.sae.layers, "eval")
    x_NLD = torch.from_numpy(np.stack(list(tokens.values())))
    x_NLD = (x_NLD - x_NLD.mean(-1, keepdim=True)) / (x_NLD.std(-1, keepdim=True) + 1e-6)
    output = sae.inference(x_NLD)
    value_MF = output.latents.dense(64)
    vectors = len(value_MF) // len(x_NLD)
    found: Found = {}
    for m, latent in torch.nonzero(value_MF > threshold).tolist():
        row, position = list(tokens)[m // vectors]
        layer = None
        if output.layer_M is not None and run_config.sae.selector != "all":
            layer = run_config.sae.layers[int(output.layer_M[m])]
        found[row, position, latent, layer] = float(value_MF[m, latent])
    return found


@pytest.mark.parametrize("name", SAES)
def test_parquet_is_what_a_dense_computation_gives(
    name: str, reader: StoreReader, runs: dict[str, Path], mined: dict[str, Mined]
) -> None:
    found = stored(mined[name].activations)
    expected = dense(reader, runs[name], THRESHOLD)
    assert len(found) > 300
    differing = found.keys() ^ expected.keys()  # rounding, near the threshold alone
    values = {**expected, **found}
    assert all(abs(values[key] - THRESHOLD) < 1e-4 for key in differing)
    assert all(
        found[key] == pytest.approx(expected[key], abs=1e-4) for key in found & expected.keys()
    )
    layers = {layer for *_, layer in found}
    assert layers <= set(SAES[name].layers) if name in WITH_LAYERS else layers == {None}
    if name in ("routed", "every"):
        assert len(layers) > 1


def brute_force(found: Found, type_at: dict[tuple[int, int], str | None], threshold: float) -> Any:
    """latent -> type -> [(activation, row, position, layer)], with the rules of `RULE`."""
    best: dict[tuple[int, int, int], tuple[float, int | None]] = {}
    for (row, position, latent, layer), value in found.items():
        if value > threshold and value > best.get((row, position, latent), (0.0, None))[0]:
            best[row, position, latent] = value, layer
    by_type: Any = defaultdict(lambda: defaultdict(list))
    for (row, position, latent), (value, layer) in best.items():
        if (name := type_at[row, position]) is not None:
            by_type[latent][name].append((value, row, position, layer))
    kept = {}
    for latent, types in by_type.items():
        strongest = {
            name: sorted(of_type, key=lambda c: (-c[0], c[1], c[2]))[: RULE["per_token"]]
            for name, of_type in types.items()
        }
        enough = sum(map(len, strongest.values())) >= RULE["min_contexts"]
        if len(types) <= RULE["max_token_types"] and enough:
            kept[latent] = strongest
    return kept


@pytest.fixture(scope="module")
def type_at(reader: StoreReader, tiny_model_dir: Path) -> dict[tuple[int, int], str | None]:
    """Token types of the eval split, by row and position."""
    text = StoreText(reader, origin_tokenizer(reader.spec, model=str(tiny_model_dir)))
    where = list(all_tokens(reader, (1,), "eval"))
    numbers = text.types(np.array([row * reader.spec.context + p for row, p in where]))
    names = (None if n < 0 else text.type_names[n] for n in numbers.tolist())
    return dict(zip(where, names, strict=True))


@pytest.mark.parametrize("name", SAES)
def test_contexts_are_what_dictionaries_give(
    name: str, mined: dict[str, Mined], type_at: dict[tuple[int, int], str | None]
) -> None:
    result = mined[name]
    record = json.loads(result.contexts.read_text("utf-8"))
    expected = brute_force(stored(result.activations), type_at, THRESHOLD)
    assert record["total_latents"] == len(expected) == result.summary.interpretable
    assert expected or name == "relu"  # which is active everywhere
    found = record["latent_context_map"]
    assert list(map(int, found)) == sorted(expected)
    if name == "every":  # the layers of a token make one context
        assert len(stored(result.activations)) > len({k[:3] for k in stored(result.activations)})
    for latent, types in found.items():
        entries = {
            token: [(c["activation"], c["row"], c["position"], c["layer"]) for c in contexts]
            for token, contexts in types.items()
        }
        assert entries == {
            token: [(pytest.approx(value, rel=1e-6), *where) for value, *where in contexts]
            for token, contexts in expected[int(latent)].items()
        }
        firsts = [contexts[0][0] for contexts in entries.values()]
        assert firsts == sorted(firsts, reverse=True)


@pytest.mark.parametrize("name", SAES)
def test_counts(
    name: str, reader: StoreReader, runs: dict[str, Path], mined: dict[str, Mined]
) -> None:
    summary, found = mined[name].summary, stored(mined[name].activations)
    record = json.loads(mined[name].contexts.read_text("utf-8"))
    assert summary.activations == len(found)
    assert summary.latents_activated == len({latent for _, _, latent, _ in found})
    thresholds = [counts.threshold for counts in summary.by_threshold]
    assert thresholds == [0.25, 0.5, 1.0]
    assert [counts.activations for counts in summary.by_threshold][1] == len(found)
    above_one = {key for key, value in found.items() if value > 1}
    assert summary.by_threshold[2].activations == len(above_one)
    assert summary.by_threshold[2].latents_activated == len(
        {latent for _, _, latent, _ in above_one}
    )
    every = dense(reader, runs[name], 0.25)
    assert summary.by_threshold[0].activations == pytest.approx(len(every), rel=1e-3)
    for latent, about in record["latents"].items():
        of_latent = {key: value for key, value in found.items() if key[2] == int(latent)}
        assert about["activations"] == len(of_latent) == sum(about["histogram"]["counts"])
        assert about["max"] == pytest.approx(max(of_latent.values()), rel=1e-6)
        assert about["mean"] == pytest.approx(np.mean(list(of_latent.values())), rel=1e-5)
        edges = about["histogram"]["edges"]
        assert (edges[0], edges[-1]) == (THRESHOLD, pytest.approx(about["max"]))
        expected, _ = np.histogram(list(of_latent.values()), edges)
        assert np.abs(expected - about["histogram"]["counts"]).sum() <= 2  # at edges
        if name in WITH_LAYERS:
            layers = [str(layer) for *_, layer in of_latent]
            assert about["layers"] == {l: layers.count(l) for l in sorted(set(layers))}
        else:
            assert about["layers"] is None
    if name in WITH_LAYERS:
        assert summary.layer_share is not None
        assert tuple(summary.layer_share) == SAES[name].layers
        assert sum(summary.layer_share.values()) == pytest.approx(1)
    else:
        assert summary.layer_share is None


def test_interpretable_latents_at_each_threshold(
    reader: StoreReader,
    runs: dict[str, Path],
    mined: dict[str, Mined],
    type_at: dict[tuple[int, int], str | None],
    tiny_model_dir: Path,
    tmp_path: Path,
) -> None:
    options = ContextsConfig(out=tmp_path, threshold=0.25, model=str(tiny_model_dir), **RULE)
    lowest = mine_contexts(reader, list(runs.values()), options)
    dropped = 0
    for name, result in zip(runs, lowest, strict=True):
        found = stored(result.activations)
        for counts in mined[name].summary.by_threshold:
            expected = brute_force(found, type_at, counts.threshold)
            assert counts.interpretable == len(expected)
            dropped += len(expected.keys() - brute_force(found, type_at, 0.25).keys())
    assert dropped > 0  # some are interpretable at a higher threshold alone


def test_structure(mined: dict[str, Mined], reader: StoreReader, runs: dict[str, Path]) -> None:
    result = mined["routed"]
    text = result.contexts.read_text("utf-8")
    record = read_json(result.contexts)
    summary = record.pop("summary")
    latents, contexts = record.pop("latents"), record.pop("latent_context_map")
    assert record == {
        "kind": "contexts",
        "run": str(runs["routed"]),
        "name": runs["routed"].name,
        "store": str(reader.path),
        "split": "eval",
        "tokens": 600,
        "total_latents": len(latents),
        "threshold": THRESHOLD,
        "max_length": 64,
        "max_per_token": 2,
        "lines": 40,
        "min_contexts": 3,
        "max_token_types": 15,
    }
    assert list(latents) == list(contexts)
    assert list(summary["layer_share"]) == ["1", "2", "3"]
    assert set(summary["by_threshold"][0]) == {
        *("threshold", "interpretable", "latents_activated", "activations")
    }
    assert result.contexts == result.activations.parents[1] / f"{result.name}_0.5.json"
    for types in contexts.values():
        for token, entries in types.items():
            for entry in entries:
                mark = entry["context"].split(OPEN)[1].split(CLOSE)[0]
                assert mark.lower().strip() == token
                assert 1 <= entry["first"] <= entry["position"] <= entry["last"] < 16
    assert "ö" in text  # not escaped
    left = {path.name for path in result.contexts.parent.rglob("*") if "partial" in path.name}
    assert not left


def test_batches_do_not_matter(
    reader: StoreReader,
    runs: dict[str, Path],
    mined: dict[str, Mined],
    tiny_model_dir: Path,
    tmp_path: Path,
) -> None:
    options = ContextsConfig(
        out=tmp_path, threshold=THRESHOLD, model=str(tiny_model_dir), batch_tokens=33, **RULE
    )
    for name, result in zip(runs, mine_contexts(reader, list(runs.values()), options), strict=True):
        first, second = (
            json.loads(one.contexts.read_text("utf-8"))["latent_context_map"]
            for one in (mined[name], result)
        )
        assert {latent: set(types) for latent, types in first.items()} == {
            latent: set(types) for latent, types in second.items()
        }


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_chunks_shared_out_give_the_same_files(
    mined: dict[str, Mined],
    reader: StoreReader,
    runs: dict[str, Path],
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_ray(monkeypatch, ray_contexts)
    monkeypatch.setattr(activation_files, "_GROUP_ROWS", 333)
    expected = mined["fixed"].contexts.parent
    options = ContextsConfig(
        out=tmp_path / "c",
        threshold=THRESHOLD,
        thresholds=THRESHOLDS,
        delphi=True,
        model=str(tiny_model_dir),
        batch_tokens=100,
        **RULE,
    )
    seen: list[tuple[int, int]] = []
    found = ray_contexts.mine_on_ray(
        reader,
        list(runs.values()),
        options,
        lambda done, total: seen.append((done, total)),
        cluster=RayConfig(address="local", workers=3),
    )
    assert [one.summary for one in found] == [mined[name].summary for name in runs]
    assert [one.strongest for one in found] == [mined[name].strongest for name in runs]
    assert files_of(tmp_path / "c") == files_of(expected)
    assert seen[-1] == (found[0].tokens, found[0].tokens)
    assert all(done <= total for done, total in seen)


def test_delphi(mined: dict[str, Mined], reader: StoreReader) -> None:
    hookpoints = {
        "fixed": {"layers.2": 3},
        "routed": {"routed.layers.0-layers.2": None},
        "soft": {"routed.layers.0-layers.2": None},
        "every": {"layers.0": 1, "layers.1": 2, "layers.2": 3},
        "crosscoder": {"crosscoder.layers.0-layers.2": None},
        "relu": {"layers.0": 1},
        "batchtopk": {"layers.1": 2},
    }
    tokens_RT = np.concatenate([reader.rows(c).tokens_RT for c in reader.chunks("eval")])
    for name, result in mined.items():
        assert result.delphi is not None
        assert {path.name for path in result.delphi.iterdir()} == set(hookpoints[name])
        found = stored(result.activations)
        for folder, layer in hookpoints[name].items():
            expected = {k[:3]: v for k, v in found.items() if layer is None or k[3] == layer}
            assert cached(result.delphi / folder, tokens_RT) == pytest.approx(expected, rel=1e-3)


def cached(folder: Path, tokens_RT: Any) -> dict[tuple[int, int, int], float]:
    """A hookpoint's activations; checks the form of its files."""
    found: dict[tuple[int, int, int], float] = {}
    edges = sorted(tuple(map(int, path.stem.split("_"))) for path in folder.glob("*.safetensors"))
    assert [start for start, _ in edges] == [0, *(end + 1 for _, end in edges[:-1])]
    assert edges[-1][1] == 63
    for start, end in edges:
        tensors = load_file(folder / f"{start}_{end}.safetensors")
        where, values = tensors["locations"], tensors["activations"]
        assert (where.dtype, values.dtype) == (np.uint16, np.float16)
        assert where.shape == (len(values), 3)
        np.testing.assert_array_equal(tensors["tokens"], tokens_RT)
        triples = [(row, position, latent + start) for row, position, latent in where.tolist()]
        assert all(start <= latent <= end for *_, latent in triples)
        assert [triple[:2] for triple in triples] == sorted(triple[:2] for triple in triples)
        found |= zip(triples, values.tolist(), strict=True)
    record = json.loads((folder / "config.json").read_text())
    assert record["model_name"] == "tiny-llama"
    assert record["dataset_repo"] == "tiny.jsonl"
    assert (record["cache_ctx_len"], record["n_tokens"]) == (16, 640)
    return found


def test_rows_of_the_train_split(
    reader: StoreReader, runs: dict[str, Path], tiny_model_dir: Path, tmp_path: Path
) -> None:
    options = ContextsConfig(
        out=tmp_path, split="train", threshold=0.5, delphi=True, model=str(tiny_model_dir)
    )
    (result,) = mine_contexts(reader, [runs["fixed"]], options)
    rows = {row for row, *_ in stored(result.activations)}
    assert 40 <= min(rows) < max(rows) < reader.spec.rows
    assert result.delphi is not None
    shard = load_file(next((result.delphi / "layers.2").glob("*.safetensors")))
    assert shard["locations"][:, 0].max() < len(shard["tokens"]) == reader.spec.train_rows
    record = json.loads(result.contexts.read_text("utf-8"))
    assert (record["split"], record["lines"]) == ("train", reader.spec.train_rows)


def test_failure_leaves_nothing(
    reader: StoreReader,
    runs: dict[str, Path],
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(StoreText, "types", fail_at(3, StoreText.types, OSError("full")))
    options = ContextsConfig(
        out=tmp_path / "o", threshold=0.5, model=str(tiny_model_dir), batch_tokens=64
    )
    with pytest.raises(OSError, match="full"):
        mine_contexts(reader, [runs["fixed"]], options)
    assert list((tmp_path / "o").iterdir()) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"threshold": float("nan")},
        {"threshold": float("inf")},
        {"threshold": -1.0},
        {"thresholds": (1.0, -2.0)},
        {"per_token": 0},
        {"max_tokens": 0},
        {"min_contexts": 0},
        {"max_token_types": 0},
        {"split": "test"},
    ],
)
def test_what_cannot_be(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected .*, found "):
        ContextsConfig(out=tmp_path, **changes)


def test_a_run_given_twice(reader: StoreReader, runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="both called"):
        mine_contexts(reader, [runs["fixed"]] * 2, ContextsConfig(out=tmp_path / "o"))
    assert not (tmp_path / "o").exists()


def test_auto_is_for_normalised_residuals(
    reader: StoreReader, tiny_model_dir: Path, tmp_path: Path
) -> None:
    assert auto_threshold(2048) == 15
    assert auto_threshold(576) == pytest.approx(7.95, abs=0.01)
    options = TrainConfig(out=tmp_path / "runs", batch_tokens=64, tokens=64)
    (folder,) = train(reader, [(topk((3,), norm="none"), 1)], options).folders
    wanted = ContextsConfig(out=tmp_path / "o", model=str(tiny_model_dir))
    with pytest.raises(ValueError, match="expected a number as --threshold, found auto"):
        mine_contexts(reader, [folder], wanted)
    assert not (tmp_path / "o").exists()


def test_command(
    reader: StoreReader, runs: dict[str, Path], tiny_model_dir: Path, tmp_path: Path
) -> None:
    command = ["contexts", reader.path, runs["routed"], runs["fixed"], "--out", tmp_path]
    command += ["--model", tiny_model_dir, "--format", "delphi"]
    result = routesae(*command, "--threshold", 0.5, "--thresholds", "0.25,1", "--min-contexts", 3)
    assert result.exit_code == 0, result.output
    words = (
        "600 tokens",
        "interpretable",
        "0.25",
        "layer 2 (after block 1)",
        "activations.parquet",
    )
    assert all(word in result.stdout for word in words), result.output
    assert "No interpretable" not in result.output
    names = {f"{runs[name].name}_0.5" for name in ("routed", "fixed")}
    assert {path.name for path in tmp_path.iterdir()} == names | {f"{name}.json" for name in names}
    result = routesae(*command, "--threshold", 99)
    assert result.exit_code == 0, result.output
    assert f"of {runs['fixed'].name} at 99: 0 activations are above it" in result.stderr
    record = json.loads((tmp_path / f"{runs['fixed'].name}_99.json").read_text())
    assert (record["total_latents"], record["latent_context_map"]) == (0, {})


def test_tables_by_threshold_fit_80_characters(tmp_path: Path) -> None:
    thresholds = [0.25 + 1.25 * i for i in range(8)]
    mined = [
        Mined(
            run=tmp_path,
            name=f"routesae_score_k32_f4608_s{seed}",
            threshold=0.25,
            tokens=100,
            strongest=9.0,
            summary=Summary(
                activations=1,
                latents_activated=1,
                interpretable=1,
                layer_share=None,
                by_threshold=tuple(
                    AtThreshold(
                        threshold=threshold,
                        interpretable=1000 * seed + number,
                        latents_activated=1,
                        activations=1,
                    )
                    for number, threshold in enumerate(thresholds)
                ),
            ),
            contexts=tmp_path,
            activations=tmp_path,
            delphi=None,
        )
        for seed in range(10, 19)
    ]
    console = Console(width=80)
    with console.capture() as shown:
        for table in threshold_tables(mined):
            console.print(table)
    lines = shown.get().splitlines()
    assert max(map(len, lines)) <= 80
    cells = {cell for line in lines for cell in line.replace("│", " ").replace("┃", " ").split()}
    assert {f"{threshold:g}" for threshold in thresholds} <= cells
    assert {f"{1000 * seed + n:,}" for seed in range(10, 19) for n in range(8)} <= cells
    assert {one.name for one in mined} <= cells


def test_command_refuses(
    reader: StoreReader, runs: dict[str, Path], tiny_model_dir: Path, tmp_path: Path
) -> None:
    twin = tmp_path / "twin" / "other-folder"
    shutil.copytree(runs["fixed"], twin)
    out, fixed = tmp_path / "o", runs["fixed"]
    command = ["contexts", reader.path, fixed, "--out", out, "--model", tiny_model_dir]
    for changes, words in (
        (["--threshold", "much"], ["--threshold", "auto or a number", "'much'"]),
        (["--threshold", "-1"], ["not negative", "-1"]),
        (["--thresholds", "1,,2"], ["--thresholds", "commas"]),
        (["--per-token", "0"], ["--per-token", "at least 1"]),
        (["--split", "test"], ["eval", "train"]),
        (["--format", "csv"], ["delphi"]),
        (["--batch-tokens", "0"], ["at least 1"]),
        ([twin], ["both called", "another --out"]),
        ([fixed], ["both called"]),
        ([tmp_path / "none"], ["expected a run"]),
        (["--model", tmp_path / "no-model"], ["no-model"]),
    ):
        result = routesae(*command, *changes)
        assert result.exit_code == 2, result.output
        message = " ".join(result.stderr.split())
        assert all(word in message for word in words), message
        assert "Traceback" not in result.output
        assert not out.exists()
