"""`routesae pipeline` on a tiny model: what it runs, what it leaves, what it refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.command_helpers import refused, routesae

EXPERIMENT = """
out = "{out}"
[harvest]
model = "{model}"
dataset = "{dataset}"
tokens = 300
eval_tokens = 60
context = 16
chunk_rows = 4
layers = "1-3"
dtype = "float32"
device = "cpu"
[train]
latents = 64
batch_tokens = 64
[[sae]]
sae = "routesae"
k = {k}
[[sae]]
sae = "crosscoder"
sparsity_weight = 0.01
[evaluate]
spliced = true
rows = 2
[contexts]
threshold = 0.1
thresholds = [0.1, 0.5]
[report]
"""


@pytest.fixture
def experiment(tiny_model_dir: Path, tiny_corpus: Path, tmp_path: Path) -> Path:
    return written(tmp_path, tiny_model_dir, tiny_corpus)


def written(folder: Path, model: Path, dataset: Path, k: int = 4) -> Path:
    path = folder / "e.toml"
    path.write_text(EXPERIMENT.format(out=folder / "out", model=model, dataset=dataset, k=k))
    return path


def states(output: str) -> dict[str, str]:
    """What was said of each stage."""
    stages = ("harvest", "train", "evaluate", "contexts", "interpret", "report")
    lines = (line.partition(": ") for line in output.splitlines())
    return {stage: said for stage, _, said in lines if stage in stages}


def test_everything_once(
    experiment: Path, tiny_model_dir: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    planned = routesae("pipeline", experiment, "--dry-run")
    assert planned.exit_code == 0, planned.output
    assert "no result yet" in planned.output
    assert "a store of about" in planned.output
    assert not (tmp_path / "out").exists()

    stray = tmp_path / "out" / "contexts" / "stray.json"
    stray.parent.mkdir(parents=True)
    stray.write_text("{}")
    os.utime(stray, (2**31, 2**31))  # later than anything the stages write
    first = routesae("pipeline", experiment)
    assert first.exit_code == 0, first.output
    stages = json.loads((tmp_path / "out" / "pipeline.json").read_text())["stages"]
    made = {Path(path).name for path in stages["contexts"]["outputs"]}
    assert made == {"routesae_k4_f64_s42_0.1.json", "crosscoder_l1-0.01_f64_s42_0.1.json"}
    said = states(first.output)
    assert said.pop("interpret") == "left out: the file has no [interpret]"
    assert set(said.values()) == {"no result yet"}
    out = tmp_path / "out"
    assert "<html" in (out / "report.html").read_text()
    record = json.loads((out / "evaluation.json").read_text())
    spliced = {result["name"]: result["spliced"] for result in record["results"]}
    assert spliced["routesae_k4_f64_s42"]["rows"] == 2
    assert spliced["crosscoder_l1-0.01_f64_s42"] is None

    again = routesae("pipeline", experiment)
    said = states(again.output)
    assert {said[stage] for stage in ("harvest", "train", "evaluate", "contexts", "report")} == {
        "done already"
    }

    written(tmp_path, tiny_model_dir, tiny_corpus, k=5)
    other = routesae("pipeline", experiment)
    assert other.exit_code == 0, other.output
    said = states(other.output)
    assert said["harvest"] == "done already"
    assert said["train"].startswith("sae: ")
    assert said["evaluate"].startswith("changed: routesae_k")

    planned = routesae("pipeline", experiment, "--from", "contexts", "--dry-run").output
    assert planned.count("done") == 3
    assert planned.count("asked for") == 2
    forced = routesae("pipeline", experiment, "--only", "contexts")
    assert states(forced.output) == {"contexts": "asked for"}


def test_a_failed_stage_is_named_and_gone_on_with(experiment: Path, tmp_path: Path) -> None:
    text = experiment.read_text()
    experiment.write_text(text.replace("threshold = 0.1\n", "threshold = 0.1\nmax_tokens = 0\n"))
    failed = routesae("pipeline", experiment)
    assert failed.exit_code == 2, failed.output
    assert "The stage contexts did not end well" in " ".join(failed.output.split())
    experiment.write_text(text)
    said = states(routesae("pipeline", experiment).output)
    assert said["evaluate"] == "done already"
    assert said["contexts"] == "no result yet"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("threshold = 0.1\n", "treshold = 1\n"), ("[contexts]", "treshold")),
        (("rows = 2", 'rows = "two"'), ("[evaluate]", "rows")),
        (("rows = 2", 'json = "x"'), ("[evaluate]", "the pipeline's to give")),
        (("k = 4", "l = 4"), ("[[sae]]", "l")),
    ],
)
def test_mistakes_are_found_before_any_work(
    change: tuple[str, str], words: tuple[str, ...], experiment: Path, tmp_path: Path
) -> None:
    experiment.write_text(experiment.read_text().replace(*change))
    refused(routesae("pipeline", experiment), *words)
    assert not (tmp_path / "out").exists()
