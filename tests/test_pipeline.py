"""A stage is done while its options, what it read and what it made are as recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from routesae_cache.experiment import read_experiment
from routesae_cache.pipeline import STATE, Pipeline, fingerprint
from tests.store_helpers import fill_store, store_spec

TEXT = """
out = "{out}"
store = "{store}"
[harvest]
tokens = {tokens}
[evaluate]
rows = {rows}
[[sae]]
sae = "topk"
k = [2, 4]
"""


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "s.zarr"
    fill_store(path, store_spec())
    return path


def pipeline(folder: Path, store: Path, **changes: Any) -> Pipeline:
    options = {"tokens": 100, "rows": 3} | changes
    file = folder / "e.toml"
    file.write_text(TEXT.format(out=folder / "out", store=store, **options))
    return Pipeline(read_experiment(file))


def finish_run(folder: Path, content: str = "weights") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "sae.safetensors").write_text(content)


def finish_evaluation(of: Pipeline) -> None:
    for run in of.runs():
        finish_run(run)
    of.experiment.evaluation.write_text("{}")
    of.finish("evaluate", [of.experiment.evaluation], 1.0)


def test_a_finished_stage_stays_finished(tmp_path: Path, store: Path) -> None:
    first = pipeline(tmp_path, store)
    assert first.why("evaluate") == "no result yet"
    finish_evaluation(first)
    assert pipeline(tmp_path, store).why("evaluate") is None
    assert pipeline(tmp_path, store, tokens=200).why("evaluate") is None


def test_the_first_stage_with_a_store_elsewhere(tmp_path: Path, store: Path) -> None:
    now = pipeline(tmp_path, store)
    now.finish("harvest", [store], 1.0)
    assert now.why("harvest") is None


def test_other_options(tmp_path: Path, store: Path) -> None:
    finish_evaluation(pipeline(tmp_path, store))
    assert pipeline(tmp_path, store, rows=5).why("evaluate") == "rows: 3 → 5"


def test_other_inputs(tmp_path: Path, store: Path) -> None:
    now = pipeline(tmp_path, store)
    finish_evaluation(now)
    run = now.runs()[1]
    finish_run(run, "other weights")
    assert now.why("evaluate") == f"changed: {run.name}"
    (run / "sae.safetensors").unlink()  # it failed: one input fewer
    assert now.why("evaluate") == f"changed: {run.name}"


def test_another_result(tmp_path: Path, store: Path) -> None:
    now = pipeline(tmp_path, store)
    finish_evaluation(now)
    now.experiment.evaluation.write_text("{ }")
    assert now.why("evaluate") == "its result is not the one it made: evaluation.json"
    now.experiment.evaluation.unlink()
    assert now.why("evaluate") == "its result is not the one it made: evaluation.json"


def test_a_store_by_what_is_in_it(tmp_path: Path, store: Path) -> None:
    before = fingerprint(store)
    again = tmp_path / "again.zarr"
    fill_store(again, store_spec())
    assert fingerprint(again) == before
    digests = (path for path in sorted((store / "digest").rglob("0")) if path.is_file())
    next(digests).unlink()
    assert fingerprint(store) != before


def test_runs_by_what_became_of_them(tmp_path: Path) -> None:
    finish_run(tmp_path / "run")
    before = fingerprint(tmp_path / "run")
    (tmp_path / "run" / "failed.json").write_text("{}")
    assert fingerprint(tmp_path / "run") != before
    assert fingerprint(tmp_path / "none") == "missing"


def test_a_damaged_record(tmp_path: Path, store: Path) -> None:
    now = pipeline(tmp_path, store)
    finish_evaluation(now)
    state = now.experiment.out / STATE
    for damage in ("{", "[]", json.dumps({"stages": {"train": {"options": {}}}})):
        state.write_text(damage)
        with pytest.raises(ValueError, match="remove it"):
            pipeline(tmp_path, store)
