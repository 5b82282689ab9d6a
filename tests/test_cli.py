"""The commands as a user runs them: what they print, make and refuse."""

from __future__ import annotations

import errno
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cli.layer_table import layer_table
from stores.writer import StoreWriter
from tests.command_helpers import refused, routesae
from tests.pipeline_helpers import array_files
from tests.store_helpers import chunk_file

HARVEST = ["--tokens", "300", "--eval-tokens", "60", "--context", "16", "--chunk-rows", "4"]
SMALL = ["--layers", "1-3", "--dtype", "float32", "--device", "cpu"]


@pytest.fixture(scope="module")
def harvest_command(tiny_model_dir: Path, tiny_corpus: Path) -> list[Any]:
    return ["harvest", "--model", tiny_model_dir, "--dataset", tiny_corpus, *HARVEST, *SMALL]


@pytest.fixture(scope="module")
def store(harvest_command: list[Any], tmp_path_factory: Any) -> Path:
    path = tmp_path_factory.mktemp("cli") / "s.zarr"
    result = routesae(*harvest_command, "--out", path)
    assert result.exit_code == 0, result.output
    assert "Harvested 384 tokens" in result.output
    return path


@pytest.fixture(scope="module")
def runs(store: Path, tmp_path_factory: Any) -> list[Path]:
    out = tmp_path_factory.mktemp("runs")
    command = ["train", store, "--sae", "routesae", "--sae", "topk", "--layer", 3, "--k", 4]
    result = routesae(*command, "--latents", 64, "--batch-tokens", 32, "--out", out)
    assert result.exit_code == 0, result.output
    return sorted(out.iterdir())


def test_help_lists_every_command() -> None:
    result = routesae("--help")
    assert all(word in result.output for word in ("harvest", "train", "evaluate", "store"))


def test_evaluate_prints_tables_and_writes_json(
    store: Path, runs: list[Path], tmp_path: Path
) -> None:
    result = routesae("evaluate", store, *runs, "--json", tmp_path / "deep" / "eval.json")
    assert result.exit_code == 0, result.output
    words = ("routesae_k4_f64_s42", "layer 3 (after block 2)", "NormMSE", "best layer")
    assert all(word in result.output for word in words)
    record = json.loads((tmp_path / "deep" / "eval.json").read_text())
    assert (record["kind"], record["store"], record["split"]) == ("evaluation", str(store), "eval")
    results = record["results"]
    assert [Path(one["run"]) for one in results] == runs
    assert results[0]["routing"]["oracle"] <= results[0]["nmse"]
    assert [one["spliced"] for one in results] == [None, None]


def test_evaluate_spliced(
    store: Path, runs: list[Path], tiny_model_dir: Path, tmp_path: Path
) -> None:
    file = tmp_path / "eval.json"
    command = ["evaluate", store, *runs, "--spliced", "--model", tiny_model_dir, "--rows", 3]
    result = routesae(*command, "--ablation", "mean", "--json", file)
    assert result.exit_code == 0, result.output
    words = ("Spliced into tiny-llama on 3 rows, 45 tokens", "mean ablation", "each token's")
    assert all(word in result.output for word in words), result.output
    spliced = [one["spliced"] for one in json.loads(file.read_text())["results"]]
    assert [set(one) for one in spliced] == 2 * [
        {"kl", "kl_per_row", "delta_ce", "recovered", "rows", "tokens", "scale", "ablation"}
        | {"ce", "at_layer", "per_layer"}
    ]
    assert [(one["rows"], one["scale"], one["ablation"]) for one in spliced] == 2 * [
        (3, "exact", "mean")
    ]
    assert spliced[0]["kl_per_row"]["mean"] == pytest.approx(15 * spliced[0]["kl"]["mean"])


def test_evaluate_spliced_refuses(store: Path, runs: list[Path], tmp_path: Path) -> None:
    command = ["evaluate", store, *runs, "--json", tmp_path / "deep" / "eval.json"]
    refused(
        routesae(*command, "--rows", 3, "--ablation", "none"), "--rows, --ablation", "--spliced"
    )
    refused(routesae(*command, "--spliced"), "'tiny-llama'", "--model")
    refused(routesae(*command, "--spliced", "--rows", 0), "rows", "at least 1")
    refused(routesae(*command, "--spliced", "--at-layer", 2), "--at-layer", "crosscoder")
    refused(routesae(*command[:4], "--json", tmp_path), "the folder")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("n_runs", [1, 3, 4, 20])
def test_layer_tables_fit_whatever_the_number_of_runs(n_runs: int) -> None:
    name = "route+batchtopk_k32_f16384_route_estimator-straight-through_aggregate-mean_s"
    share = {layer: layer / 232 for layer in range(7, 23)}
    console = Console(width=120, file=io.StringIO())
    console.print(layer_table("Share", [(f"{name}{run}", share) for run in range(n_runs)]))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 120
    assert sum(line.count("9.5%") for line in lines) == n_runs
    assert any("layer 22 (after block 21)" in line for line in lines) == (n_runs <= 3)
    assert not any("…" in line for line in lines)


def test_harvest_again_does_nothing(store: Path, harvest_command: list[Any]) -> None:
    before = array_files(store)
    result = routesae(*harvest_command, "--out", store)
    assert result.exit_code == 0
    assert "Nothing to do" in result.output
    assert array_files(store) == before


def test_dry_run_makes_nothing(harvest_command: list[Any], tmp_path: Path) -> None:
    result = routesae(*harvest_command, "--out", tmp_path / "s.zarr", "--dry-run")
    assert result.exit_code == 0
    assert "To do: 360 of 360 tokens" in result.output
    assert list(tmp_path.iterdir()) == []


def test_harvest_by_two_workers(harvest_command: list[Any], store: Path, tmp_path: Path) -> None:
    command = [*harvest_command, "--out", tmp_path / "s.zarr"]
    shown = routesae(*command, "--worker", "1/2", "--dry-run")
    assert "Worker 1/2: about 3 of 6 chunks, 192 tokens" in shown.output
    assert list(tmp_path.iterdir()) == []
    first = routesae(*command, "--worker", "0/2")
    assert "Worker 0/2 is done, 3 chunks are left to others" in first.output, first.output
    assert "Worker 0/2: 0 of 3 chunks" in routesae(*command, "--worker", "0/2").output
    assert "The store is complete" in routesae(*command, "--worker", "1/2").output
    assert array_files(tmp_path / "s.zarr") == array_files(store)
    refused(routesae(*command, "--worker", "2/2"), "i/n", "found 2/2")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ray", "local"], ["Ray, which is not installed", "pip install 'routesae-cache[ray]'"]),
        (["--workers", "2"], ["--workers belongs to --ray"]),
        (["--gpus-per-worker", "1"], ["--gpus-per-worker belongs to --ray"]),
        (["--ray", "local", "--worker", "0/2"], ["either --worker or --ray"]),
        (["--ray", "local", "--workers", "0"], ["workers: expected at least 1, found 0"]),
        (["--ray", "local", "--gpus-per-worker", "-1"], ["expected 0 or more, found -1"]),
        (["--ray", "ray://head:10001"], ["HOST:PORT", "ray://head:10001"]),
        (["--ray", "head"], ["HOST:PORT", "'head'"]),
    ],
)
def test_harvest_on_ray_refuses(
    options: list[str],
    words: list[str],
    harvest_command: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    command = [part for part in harvest_command if part not in ("--device", "cpu")]
    refused(routesae(*command, "--out", tmp_path / "s.zarr", *options), *words)
    if "--worker" not in options:
        again = routesae(*harvest_command, "--out", tmp_path / "s.zarr", "--ray", "local")
        refused(again, "--device", "--gpus-per-worker")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command",
    [
        ["train", "s.zarr", "--sae", "topk", "--out", "o"],
        ["sweep", "s.zarr", "s.toml"],
        ["contexts", "s.zarr", "r", "--out", "o"],
        ["evaluate", "s.zarr", "r", "--spliced"],
    ],
)
def test_others_on_ray_refuse(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    refused(routesae(*command, "--ray", "local", "--workers", 2), "routesae-cache[ray]")
    refused(routesae(*command, "--workers", 2), "--workers belongs to --ray")
    refused(routesae(*command, "--ray", "local", "--device", "cpu"), "--gpus-per-worker says it")


def test_ray_is_for_splicing(
    store: Path, runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("routesae_cache.ray_cluster.import_ray", lambda: None)
    refused(routesae("evaluate", store, *runs, "--ray", "local"), "--ray belongs to --spliced")


def test_store_info(store: Path) -> None:
    result = routesae("store", "info", store)
    words = ("tiny-llama", "tiny.jsonl", "layer 1 (after block 0)", "x than bf16", "6 of 6 chunks")
    assert all(word in result.output for word in words), result.output
    facts = json.loads(routesae("store", "info", store, "--json").stdout)
    size = sum(len(content) for content in array_files(store).values())
    assert facts["bytes"] == size
    assert facts["bits_per_value"] == pytest.approx(8 * size / (384 * 3 * 32))
    assert len(facts["distortion"]) == 3


def test_store_verify_names_what_is_bad(store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "s.zarr"
    shutil.copytree(store, copy)
    assert routesae("store", "verify", copy).exit_code == 0
    file = chunk_file(copy, "residuals/2/low", 3)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    chunk_file(copy, "tokens", 1).unlink()
    result = routesae("store", "verify", copy)
    assert result.exit_code == 1
    assert "chunk 3, array residuals/2/low" in result.stderr
    assert "chunk 1, array tokens: the file is missing" in result.stderr
    train = ["train", copy, "--sae", "topk", "--layer", 3, "--k", 4, "--latents", 64]
    refused(
        routesae(*train, "--out", tmp_path / "runs", "--batch-tokens", 32), "chunk 3", "corrupt"
    )


def test_store_recode(store: Path, tmp_path: Path) -> None:
    result = routesae("store", "recode", store, tmp_path / "r.zarr", "--codec", "int8")
    assert result.exit_code == 0, result.output
    facts = json.loads(routesae("store", "info", tmp_path / "r.zarr", "--json").stdout)
    assert facts["spec"]["codec"] == {"kind": "int8"}
    again = routesae("store", "recode", store, tmp_path / "r.zarr", "--codec", "delta")
    refused(again, "codec.kind: the store has 'int8', asked for 'delta'")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--model", "no-such-model"], ["no-such-model", "smollm2-135m", "llama-3.2-1b"]),
        (["--dataset", "no-such-text"], ["no-such-text", "news", "openwebtext2"]),
        (["--dataset", "/no/such/file.jsonl"], ["/no/such/file.jsonl"]),
        (["--text-field", "body"], ["'body'", "'text'", "'title'"]),
        (["--layers", "2-9"], ["no layer 9", "4 blocks"]),
        (["--layers", "many"], ["many", "auto"]),
        (["--codec", "int8", "--step", "0.1"], ["--step", "delta"]),
        (["--step", "-1"], ["step", "-1"]),
        (["--tokens", "0"], ["at least 1"]),
        (["--context", "5000"], ["context 5000", "128"]),
        (["--device", "abacus"], ["abacus"]),
        (["--codec", "mp3"], ["mp3"]),
    ],
)
def test_harvest_refuses(
    changes: list[str], words: list[str], harvest_command: list[Any], tmp_path: Path
) -> None:
    refused(routesae(*harvest_command, "--out", tmp_path / "s.zarr", *changes), *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--k", "65"], ["k=65", "latents=64"]),
        (["--sae", "sparsenet"], ["sparsenet", "routesae", "topk"]),
        (["--layer", "9"], ["[9]", "[1, 2, 3]"]),
        (["--sparsity-weight", "0.1"], ["sparsity_weight"]),
        (["--lr", "nan"], ["lr"]),
        (["--batch-tokens", "100000"], ["100000", "--batch-tokens"]),
    ],
)
def test_train_refuses(changes: list[str], words: list[str], store: Path, tmp_path: Path) -> None:
    sae = [] if "--sae" in changes else ["--sae", "topk", "--layer", 3]
    command = ["train", store, *sae, "--latents", 64, "--k", 4, "--out", tmp_path / "runs"]
    refused(routesae(*command, "--batch-tokens", 32, *changes), *words)
    assert not (tmp_path / "runs").exists()


def test_out_that_is_something_else(harvest_command: list[Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    refused(routesae(*harvest_command, "--out", tmp_path / "file"), "not a zarr v3 group")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("precious")
    refused(routesae(*harvest_command, "--out", tmp_path / "folder"), "activation store")
    refused(routesae(*harvest_command, "--out", tmp_path / "file" / "s.zarr"), "not a directory")
    assert (tmp_path / "folder" / "thesis.txt").read_text() == "precious"
    assert (tmp_path / "file").read_text() == "precious"


def test_stores_and_runs_that_are_not(store: Path, runs: list[Path], tmp_path: Path) -> None:
    refused(routesae("store", "info", tmp_path), "expected an activation store")
    refused(routesae("evaluate", tmp_path / "no.zarr", *runs), "nothing there")
    refused(routesae("evaluate", store, tmp_path), "expected a run of `routesae train`")
    copy = tmp_path / "new.zarr"
    shutil.copytree(store, copy)
    description = (copy / "zarr.json").read_text()
    newer = description.replace('"format_version": 1', '"format_version": 2')
    (copy / "zarr.json").write_text(newer)
    refused(routesae("store", "info", copy), "format 2 is newer than format 1", "upgrade")


def test_incomplete_store(harvest_command: list[Any], store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "part.zarr"
    shutil.copytree(store, copy)
    chunk_file(copy, "committed", 4).unlink()
    train = ["train", copy, "--sae", "topk", "--layer", 3, "--k", 4, "--latents", 64]
    refused(routesae(*train, "--out", tmp_path / "runs"), "1 of 5 chunks", "harvest command again")
    assert routesae(*harvest_command, "--out", copy).exit_code == 0
    assert array_files(copy) == array_files(store)


def test_full_disk(
    harvest_command: list[Any], store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = StoreWriter.write_chunk

    def full(self: Any, chunk: int, *rest: Any) -> int:
        if chunk == 3:
            raise OSError(errno.ENOSPC, "No space left on device", "s.zarr/residuals/1/low")
        return original(self, chunk, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "write_chunk", full)
        refused(routesae(*harvest_command, "--out", tmp_path / "s.zarr"), "disk is full", "again")
    assert routesae("store", "verify", tmp_path / "s.zarr").exit_code == 0
    assert routesae(*harvest_command, "--out", tmp_path / "s.zarr").exit_code == 0
    assert array_files(tmp_path / "s.zarr") == array_files(store)


def test_second_writer(harvest_command: list[Any], store: Path) -> None:
    with StoreWriter(store):
        refused(routesae(*harvest_command, "--out", store, "--tokens", 600), "another process")
