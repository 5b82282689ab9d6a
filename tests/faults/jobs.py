"""The long commands on a tiny model, and what their results are compared by.

Every job runs in a folder of its own and names its files relative to it, so that two results are
equal to the byte although they lie in different places.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from stores.layout import committed_chunks, read_spec, stored_arrays
from stores.locks import FOLDER
from tests.faults.processes import finished, wait_for_server
from tests.pipeline_helpers import array_files

Content = dict[str, bytes]
STORE, RUNS, SWEEP = "s.zarr", "saes", "sweep.toml"
CODES = r"residuals/\d/(low|high|codes)/c/"
"""Matches the files with a store's residuals."""
_WEIGHTS = "/sae.safetensors"

SWEEP_TABLES = """
[train]
latents = 64
k = 4
batch_tokens = 32
epochs = {epochs}
log_every = 5
checkpoint_seconds = 0.001
[[sae]]
sae = ["routesae", "topk"]
"""
EXPERIMENT = """
out = "out"
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
[contexts]
threshold = 0.1
[report]
"""


@dataclass(frozen=True)
class Job:
    """A command in a folder, and what it makes there."""

    arguments: Sequence[object]
    result: Callable[[Path], Content]
    """What has to be the same in the end, however often it was killed."""
    kept: Callable[[Path], Content]
    """What is finished by now, and has to be the same from now on."""
    prepare: Callable[[Path], None] = lambda folder: None
    """Put into an empty folder what the command reads."""


def harvest_arguments(model: Path, corpus: Path, *, tokens: int = 300) -> list[object]:
    """Of a harvest of three layers in a few chunks."""
    sizes = ["--tokens", tokens, "--eval-tokens", 60, "--context", 16, "--chunk-rows", 4]
    options = ["--batch-rows", 2, "--layers", "1-3", "--dtype", "float32", "--device", "cpu"]
    return ["harvest", "--model", model, "--dataset", corpus, "--out", STORE, *sizes, *options]


def harvesting(model: Path, corpus: Path) -> Job:
    return Job(harvest_arguments(model, corpus), lambda f: everything(f / STORE), _committed(STORE))


def extending(model: Path, corpus: Path, smaller: Path) -> Job:
    """A harvest that goes on with a store of fewer tokens."""
    job = harvesting(model, corpus)
    return Job(job.arguments, job.result, job.kept, lambda f: _copy(smaller, f / STORE))


def recoding(source: Path) -> Job:
    arguments = ["store", "recode", source, "t.zarr", "--codec", "int8"]
    return Job(arguments, lambda f: everything(f / "t.zarr"), _committed("t.zarr"))


def training(source: Path, *, epochs: int = 12) -> Job:
    arguments = ["sweep", source, SWEEP, "--out", RUNS, "--resume"]
    return Job(
        arguments,
        lambda f: runs(f / RUNS),
        lambda f: {k: v for k, v in everything(f / RUNS).items() if k.endswith(_WEIGHTS)},
        partial(_write, SWEEP, SWEEP_TABLES.format(epochs=epochs)),
    )


def mining(source: Path, model: Path, trained: Path) -> Job:
    names = sorted(f"{RUNS}/{run.name}" for run in trained.iterdir() if run.is_dir())
    names = [name for name in names if not name.startswith(f"{RUNS}/.")]
    options = ["--threshold", 0.1, "--model", model, "--out", "contexts"]
    return Job(
        ["contexts", source, *names, *options],
        lambda f: everything(f / "contexts"),
        lambda f: whole_files(f / "contexts"),
        lambda f: _copy(trained, f / RUNS),
    )


def experimenting(model: Path, corpus: Path) -> Job:
    text = EXPERIMENT.format(model=model, dataset=corpus) + SWEEP_TABLES.format(epochs=4)
    return Job(
        ["pipeline", "e.toml"],
        lambda f: experiment(f / "out"),
        _committed("out/store.zarr"),
        partial(_write, "e.toml", text),
    )


def reference(folder: Path, job: Job) -> tuple[Content, float]:
    """What the command makes where nothing happens to it, and the seconds that it takes."""
    job.prepare(folder)
    wait_for_server()
    seconds = finished(folder, *job.arguments)
    return job.result(folder), seconds


# what is compared


def everything(path: Path) -> Content:
    """Every file in a folder, without the locks: they are no data, and the dead leave theirs."""
    return {name: v for name, v in array_files(path).items() if not name.startswith(FOLDER)}


def _committed(name: str) -> Callable[[Path], Content]:
    def kept(folder: Path) -> Content:
        return committed(folder / name)

    return kept


def committed(path: Path) -> Content:
    """The files of a store's committed chunks, by their path in it."""
    if not (path / "zarr.json").exists():
        return {}
    spec = read_spec(path)
    places = [
        path / stored.chunk_key(chunk)
        for chunk in committed_chunks(path, spec)
        for stored in stored_arrays(spec)
    ]
    return {
        str(place.relative_to(path)): place.read_bytes() if place.exists() else b"missing"
        for place in places
    }


def whole_files(path: Path) -> Content:
    """The files in a folder that are finished by their names, without the locks."""
    return {name: v for name, v in everything(path).items() if not name.endswith(".partial")}


def runs(path: Path) -> Content:
    """Every file of ended runs, without times."""
    return {
        name: _timeless_lines(content) if name.endswith("metrics.jsonl") else content
        for name, content in everything(path).items()
    }


def experiment(out: Path) -> Content:
    """Everything of an experiment that has no times in it: of the page, that it is whole."""
    found = {f"saes/{name}": v for name, v in runs(out / "saes").items()}
    found |= {f"store/{name}": v for name, v in everything(out / "store.zarr").items()}
    found |= {f"contexts/{name}": v for name, v in everything(out / "contexts").items()}
    found["evaluation"] = (out / "evaluation.json").read_bytes()
    found["report"] = (out / "report.html").read_bytes().strip()[-7:]
    stages = json.loads((out / "pipeline.json").read_bytes())["stages"]
    found["stages"] = json.dumps(_timeless_stages(stages)).encode()
    return found


def _timeless_stages(stages: dict[str, Any]) -> dict[str, Any]:
    report = str(Path("out") / "report.html")
    return {
        stage: {
            "options": record["options"],
            "inputs": record["inputs"],
            "outputs": {k: v for k, v in record["outputs"].items() if k != report},
        }
        for stage, record in stages.items()
    }


def _timeless_lines(content: bytes) -> bytes:
    lines = []
    for line in content.splitlines():
        record = json.loads(line)
        del record["seconds"], record["crc32c"]
        lines.append(json.dumps(record))
    return "\n".join(lines).encode()


def _write(name: str, text: str, folder: Path) -> None:
    (folder / name).write_text(text)


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target)
