"""Files by others run nothing and write nothing outside; keys and passwords stay secret."""

from __future__ import annotations

import ast
import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from routesae_cache.checkpoint import CONFIG, METRICS, RunError, load_run, read_config, save_weights
from routesae_cache.corpus_files import TextError
from routesae_cache.experiment import read_experiment
from routesae_cache.interchange.reference import ReferenceFileError, read_state_dict
from routesae_cache.interpretation.chat import ChatConfig
from routesae_cache.interpretation.interpret import InterpretConfig, interpret
from routesae_cache.json_files import read_json, write_json
from routesae_cache.lm import load_lm
from routesae_cache.loggers import JsonLinesLogger
from routesae_cache.pipeline import Pipeline
from routesae_cache.report.build import ReportConfig, build_report
from routesae_cache.sources import ModelError
from routesae_cache.text import TextConfig, open_text
from tests.command_helpers import refused, routesae
from tests.faults.tally import Tally
from tests.interchange_helpers import make_run, sae_config

PACKAGES = ("stores", "routesae_cache", "cli", "benchmarks")
ROOT = Path(__file__).parents[2]


# code that loads code


def sins(source: str) -> list[str]:
    """Calls in a source that may run what a file says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            bad = {name.partition(".")[0] for name in names} & FORBIDDEN_MODULES
            if isinstance(node, ast.ImportFrom):  # where a call would not say whose it is
                bad |= {f"{node.module}.{alias.name}" for alias in node.names} & FORBIDDEN_NAMES
            found += [f"import {name}" for name in sorted(bad)]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if name in FORBIDDEN_CALLS or name.startswith("pickle."):
            found.append(name)
        if name.endswith("torch.load") and keywords.get("weights_only") != "True":
            found.append("torch.load without weights_only")
        found += [
            f"{option}={keywords[option]}"
            for option in ("trust_remote_code", "own_code")
            if keywords.get(option, "False") != "False"
        ]
        if keywords.get("shell", "False") != "False" or "True" in keywords.get("allow_pickle", ""):
            found.append("shell or allow_pickle")
        if name.rpartition(".")[2] in FORBIDDEN_METHODS:
            found.append(name)
    found += [
        f"trust_remote_code: {ast.unparse(value)}"
        for node in ast.walk(ast.parse(source))
        for key, value in said(node)
        if key == "'trust_remote_code'" and ast.unparse(value) != "False"
    ]
    return sorted(found)


def said(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Keys and values of a dictionary that is written out or added to."""
    if isinstance(node, ast.Dict):
        keys = (key and ast.unparse(key) for key in node.keys)
        yield from ((key, value) for key, value in zip(keys, node.values, strict=True) if key)
    if isinstance(node, ast.Assign):
        places = [place for place in node.targets if isinstance(place, ast.Subscript)]
        yield from ((ast.unparse(place.slice), node.value) for place in places)


FORBIDDEN_MODULES = {"yaml", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
FORBIDDEN_NAMES = {"pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load"}
FORBIDDEN_NAMES |= {"os.system", "os.popen", "shutil.unpack_archive"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
FORBIDDEN_METHODS = {"extractall", "extract", "unpack_archive", "get_class_from_dynamic_module"}
# a model's own code: where transformers is told, where its class is taken for an estimate, and
# where that is allowed, which a command alone asks for
ALLOWED = {
    "routesae_cache/lm.py": [
        "get_class_from_dynamic_module",
        "own_code=True",
        "trust_remote_code: source.own_code",
    ]
}
ASKS = {"cli/options.py": ["return with_own_code(source) if trust_remote_code else source"]}
SINNERS = (
    "eval(x)",
    "import yaml",
    "from yaml import load",
    "torch.load(f)",
    "torch.load(f, weights_only=False)",
    "pickle.loads(x)",
    "from pickle import loads",
    "from torch import load",
    "pickle.Unpickler(f)",
    "subprocess.run(x, shell=True)",
    "np.load(f, allow_pickle=True)",
    "f(trust_remote_code=flag)",
    "{'trust_remote_code': True}",
    "{'trust_remote_code': not source.own_code}",
    "where['trust_remote_code'] = flag",
    "ModelSource(name=name, own_code=flag)",
    "dynamic_module_utils.get_class_from_dynamic_module('a.B', 'owner/model')",
    "tarfile.open(f).extractall(x)",
)


@pytest.mark.parametrize("source", SINNERS)
def test_what_runs_files_is_recognised(source: str) -> None:
    assert sins(source)


def test_no_file_is_ever_run(tally: Tally) -> None:
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    sources = {file.relative_to(ROOT).as_posix(): file.read_text("utf-8") for file in files}
    assert len(files) > 80
    assert {name: told for name, source in sources.items() if (told := sins(source))} == ALLOWED
    asks = {
        name: [
            line.strip()
            for line in source.splitlines()
            if re.search(r"(?<!def )with_own_code\(", line)
        ]
        for name, source in sources.items()
    }
    assert {name: lines for name, lines in asks.items() if lines} == ASKS
    tally.add("sources searched for what runs files", tried=len(files), survived=len(files))


class Harm:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def harm(tmp_path: Path) -> Iterator[Path]:
    """What appears if code by others has been run."""
    mark = tmp_path / "harmed"
    yield mark
    assert not mark.exists()


def test_a_harmful_pickle_harms(tmp_path: Path) -> None:
    """Elsewhere: so that the tests below could fail."""
    pickle.loads(pickle.dumps(Harm(tmp_path / "harmed")))
    assert (tmp_path / "harmed").is_dir()


def test_pickled_weights_are_tensors_alone(tmp_path: Path, harm: Path, tally: Tally) -> None:
    transformers.LlamaConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    ).save_pretrained(tmp_path)
    torch.save({"model.norm.weight": Harm(harm)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="hold more than tensors, which is never loaded"):
        load_lm(str(tmp_path))
    tally.add("code and pickles by others")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_for_a_state_dict(protocol: int, tmp_path: Path, harm: Path, tally: Tally) -> None:
    old, new = tmp_path / "old.pt", tmp_path / "new.pt"
    old.write_bytes(pickle.dumps({"encoder.weight": Harm(harm)}, protocol))
    torch.save({"encoder.weight": Harm(harm)}, new, pickle_protocol=max(protocol, 2))
    for file in (old, new):
        with pytest.raises(ReferenceFileError, match="expected a state dict"):
            read_state_dict(file)
    tally.add("code and pickles by others", tried=2, survived=2)


# names that lead outside

OUTSIDE = ("../out", "/tmp/out", "a/b", "..", ".", "", "a\0b", "a\x1b[2J", "a\nb", "a\u202eb")


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_runs_name_is_the_name_of_a_folder(name: str, tmp_path: Path, tally: Tally) -> None:
    """It is also that of its contexts and of its place in the report."""
    run = make_run(tmp_path / "run", sae_config("topk"))
    write_json(run / CONFIG, read_json(run / CONFIG) | {"name": name})
    for read in (read_config, load_run):
        with pytest.raises(RunError, match=r"config\.json.*expected the name of a directory"):
            read(run)
    tally.add("paths that lead outside")


def test_links_are_not_followed_when_writing(tmp_path: Path, tally: Tally) -> None:
    """Of somebody else's folder: what a temporary file's name leads to stays as it is."""
    theirs, mine = tmp_path / "theirs", tmp_path / "mine"
    mine.write_text("mine")
    run = make_run(theirs, sae_config("topk"))
    links = [run / f"{name}.partial" for name in (CONFIG, METRICS, "sae.safetensors", "r.html")]
    links += [run / "c.replies.jsonl"]
    for link in links:
        link.symlink_to(mine)
    sae, config = load_run(run)
    write_json(run / CONFIG, config.to_dict())
    save_weights(run, sae)
    JsonLinesLogger(run, 0)
    build_report(ReportConfig(root=run, out=run / "r.html"))
    contexts = {"0": {"a": [dict.fromkeys(("row", "position", "first", "last"), 1)]}}
    contexts["0"]["a"][0] |= {"context": "a", "activation": 1.0}  # type: ignore[dict-item]
    record = {"kind": "contexts", "name": "x", "latent_context_map": contexts}
    write_json(run / "c.json", record)
    chat = ChatConfig(base_url="http://localhost:9", max_retries=0)
    with pytest.raises((OSError, ValueError)):
        interpret(run / "c.json", InterpretConfig(chat=chat))
    assert mine.read_text() == "mine"
    tally.add("paths that lead outside", tried=len(links), survived=len(links))


@pytest.mark.parametrize("path", ["/etc/hosts", "../mine.json", "out/../../mine.json"])
def test_a_pipelines_results_are_its_own(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    """Interpretations are written beside the contexts that `pipeline.json` names."""
    monkeypatch.chdir(tmp_path)
    Path("x.toml").write_text('out = "out"\n[[sae]]\nsae = "topk"\nk = 4\n')
    stage = {"options": {}, "inputs": {}, "outputs": {path: "0"}, "seconds": 1}
    Path("out").mkdir()
    write_json(Path("out/pipeline.json"), {"kind": "pipeline", "stages": {"contexts": stage}})
    pipeline = Pipeline(read_experiment(Path("x.toml")))
    with pytest.raises(ValueError, match=r"names .* as a result, which is neither in out nor"):
        pipeline.made_by("contexts")
    tally.add("paths that lead outside")


@pytest.mark.parametrize("name", ["x::https://example.org/y.csv", "x::file:/etc/passwd::.csv"])
def test_an_archive_names_no_address(name: str, tmp_path: Path, tally: Tally) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(name, "text\nhello\n")
    source = open_text(TextConfig(dataset=str(tmp_path / "a.zip")))
    with pytest.raises(TextError, match="expected a plain name"):
        list(source.documents())
    tally.add("paths that lead outside")


# secrets

PASSWORD = "hunter2hunter2"


@pytest.mark.parametrize("scheme", ["http://", "https://", "ftp://", "", "//"])
def test_a_password_in_an_address_is_refused_and_not_repeated(
    scheme: str, tmp_path: Path, tally: Tally
) -> None:
    (tmp_path / "c.json").write_text("{}")
    address = f"{scheme}user:{PASSWORD}@example.org/v1"
    result = routesae("interpret", tmp_path / "c.json", "--base-url", address)
    refused(result, "--base-url", "***@example.org")
    assert PASSWORD not in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.json"]
    tally.add("secrets looked for")
