"""Code that comes with a model is run where that was asked for, and nowhere else."""

from __future__ import annotations

import dataclasses
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from cli.options import chosen_model
from cli.pipeline import _Stages
from routesae_cache import ray_cluster, ray_harvest
from routesae_cache.experiment import read_experiment
from routesae_cache.forecast import model_sizes
from routesae_cache.harvest_plan import plan_harvest
from routesae_cache.lm import load_lm, model_shape, with_own_code
from routesae_cache.origin import origin_lm, origin_tokenizer
from routesae_cache.pipeline import Pipeline
from routesae_cache.ray_cluster import RayConfig
from routesae_cache.sources import ModelError, ModelSource, resolve_model
from routesae_cache.tokens import load_tokenizer
from stores.errors import SpecMismatchError
from stores.reader import StoreReader
from tests.command_helpers import refused, routesae
from tests.own_code import OwnCode, change, make_own, modules_in
from tests.pipeline_helpers import config, run

FLAG, SKIP = "--trust-remote-code", "--skip-refused"
HARVEST = ("--tokens", 300, "--eval-tokens", 60, "--context", 16, "--chunk-rows", 4)
EVERYTHING = {"model", "parts", "words"}
IDS = torch.arange(8)[None]


@pytest.fixture
def own(tmp_path: Path, tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> Iterator[OwnCode]:
    with modules_in(tmp_path / "modules"):
        yield make_own(tmp_path / "own-llama", tiny_model("llama"), tiny_tokenizer)


def allowed(own: OwnCode) -> ModelSource:
    return with_own_code(resolve_model(str(own.folder)))


def test_a_harvest_has_to_be_allowed(own: OwnCode, tiny_corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.zarr"
    asked = ["harvest", "--model", own.folder, "--dataset", tiny_corpus, "--out", out, *HARVEST]
    asked += ["--layers", "1-3", "--dtype", "float32", "--device", "cpu"]
    for how in ([], ["--dry-run"], ["--worker", "0/1"]):
        refused(
            routesae(*asked, *how), "'own-llama' comes with code of its own", FLAG, "--revision"
        )
    assert not own.ran()
    assert not out.exists()

    done = routesae(*asked, FLAG)
    assert done.exit_code == 0, done.output
    warning = f"Running the code that comes with the model own-llama ({own.folder}): it can do"
    shown = "".join(done.stderr.split())  # a long path is broken over lines
    assert shown.count("".join(warning.split())) == 1
    assert own.ran() == EVERYTHING

    # the store does not pass the permission on
    spec = StoreReader(out).spec
    for find in (origin_lm, origin_tokenizer):
        with pytest.raises(ModelError, match=f"comes with code of its own.*{FLAG}"):
            find(spec, model=str(own.folder))
    refused(routesae(*asked, "--tokens", 500), FLAG)
    assert not own.ran()
    assert origin_lm(spec, model=allowed(own)).identity.to_dict() == spec.model
    assert origin_tokenizer(spec, model=allowed(own)).identity() == spec.tokenizer


def test_other_code_is_another_model(own: OwnCode, tiny_corpus: Path, tmp_path: Path) -> None:
    def harvest(**changes: Any) -> StoreReader:
        wanted = config(own.folder, tiny_corpus, tmp_path / "s.zarr", **changes)
        return run(dataclasses.replace(wanted, model=allowed(own)))

    spec = harvest().spec
    own.ran()
    moved = shutil.copytree(own.folder, tmp_path / "moved")
    assert origin_lm(spec, model=with_own_code(resolve_model(str(moved))))
    own.rewrite(scale=3)
    with pytest.raises(SpecMismatchError, match="config_hash"):
        harvest(tokens=600)
    with pytest.raises(ModelError, match="is not the model that the store came from; config_hash"):
        origin_lm(spec, model=allowed(own))


def test_a_tokenizers_code_alone(own: OwnCode, tiny_model: Callable[..., Any]) -> None:
    tiny_model("llama").save_pretrained(own.folder)
    assert (
        load_lm(str(own.folder)).identity.config_hash == load_lm(allowed(own)).identity.config_hash
    )
    assert not own.ran()
    with pytest.raises(ModelError, match=FLAG):
        load_tokenizer(str(own.folder))
    assert not own.ran()
    assert load_tokenizer(allowed(own)).hf.__class__.__name__ == "OwnTokenizer"
    assert own.ran() == {"words"}


def test_a_models_code_alone(own: OwnCode, tiny_tokenizer: Any) -> None:
    tiny_tokenizer.save_pretrained(own.folder)
    load_tokenizer(str(own.folder))
    for load in (load_lm, lambda name: model_shape(resolve_model(name)), model_sizes):
        with pytest.raises(ModelError, match=FLAG):
            load(str(own.folder))
    assert not own.ran()
    assert model_sizes(allowed(own)).width == 32
    assert own.ran() == {"model", "parts"}


def test_a_causal_model_of_its_own_for_a_known_configuration(own: OwnCode) -> None:
    """Nobody is asked at the terminal, either."""
    transformers.DistilBertConfig(n_layers=2).save_pretrained(own.folder)
    change(own.folder / "config.json", auto_map={"AutoModelForCausalLM": "model.OwnForCausalLM"})
    with pytest.raises(ModelError, match=FLAG):
        model_sizes(str(own.folder))
    assert not own.ran()


def test_no_code_no_warning(
    tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    for path in (tiny_model_dir, tmp_path / "m.gguf"):
        source = resolve_model(str(path))
        assert chosen_model(str(path), None, True) == source
        assert not source.own_code
    assert not caplog.records


def test_of_the_hub_the_commit_is_named(
    own: OwnCode, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("routesae_cache.sources.current_commit", lambda *_: "c0ffee")
    where = {"pretrained_model_name_or_path": str(own.folder), "trust_remote_code": False}
    monkeypatch.setattr("routesae_cache.lm.pretrained", lambda _: where)
    source = chosen_model("owner/model", "v1", True)
    assert source.own_code  # type: ignore[union-attr]
    assert chosen_model("owner/model", "v1", False) == dataclasses.replace(source, own_code=False)
    assert caplog.messages == [
        "Running the code that comes with the model owner/model (owner/model, revision c0ffee): "
        "it can do whatever you can"
    ]
    assert not own.ran()


def test_code_of_another_repository(own: OwnCode) -> None:
    file = own.folder / "tokenizer_config.json"
    file.write_text(file.read_text().replace("words.Own", "somebody/else--words.Own"))
    with pytest.raises(ModelError, match=r"another repository .*somebody/else--words"):
        allowed(own)


def test_code_that_needs_something_else(own: OwnCode) -> None:
    (own.folder / "parts.py").write_text("import no_such_package\n")
    with pytest.raises(ModelError, match=r"cannot be loaded here: .*no_such_package"):
        load_lm(allowed(own))


def test_a_configuration_with_other_names(own: OwnCode) -> None:
    (own.folder / "model.py").write_text(
        "from transformers import PreTrainedConfig\nclass OwnConfig(PreTrainedConfig): ...\n"
    )
    file = own.folder / "config.json"
    file.write_text(file.read_text().replace('"hidden_size"', '"breadth"'))
    with pytest.raises(ModelError, match=r"OwnConfig.* has no hidden_size"):
        model_shape(allowed(own))


def test_a_model_with_less_around_it(tiny_model_dir: Path) -> None:
    """Than those of transformers have: what its code was written for may be older."""
    lm = load_lm(str(tiny_model_dir), dtype="float32")
    expected, _ = lm.extend(IDS)
    forward = lm.model.forward

    def older(input_ids: Any, past_key_values: Any = None, use_cache: bool = True) -> Any:
        return forward(input_ids, past_key_values=past_key_values, use_cache=use_cache)

    lm.model.forward, lm.model.generation_config = older, None
    torch.testing.assert_close(lm.extend(IDS)[0], expected)
    lm.model.config.eos_token_id = 2
    assert lm.end_ids == {2}


@pytest.mark.parametrize(
    ("given", "option"), [((None, None, True), FLAG), ((None, "v1", False), "--revision")]
)
def test_the_model_has_to_be_named(given: tuple[Any, Any, bool], option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} is about the model that --model names"):
        chosen_model(*given)


def test_what_a_worker_on_ray_is_given(
    own: OwnCode, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets the permission, and nothing that cannot be unpickled without the code."""
    sent: list[bytes] = []

    @contextmanager
    def pool(_: RayConfig, make: Callable[[], Any], **__: Any) -> Iterator[Any]:
        sent.append(pickle.dumps(make))
        raise Sent
        yield

    monkeypatch.setattr(ray_harvest, "pool", pool)
    monkeypatch.setattr(ray_cluster, "import_ray", lambda: None)  # it need not be installed
    wanted = config(own.folder, tiny_corpus, tmp_path / "s.zarr", device="cpu")
    plan = plan_harvest(dataclasses.replace(wanted, model=allowed(own)), here=False)
    with pytest.raises(Sent):
        ray_harvest.harvest_on_ray(plan, RayConfig(address="local", workers=1))
    own.ran()
    make = pickle.loads(sent[0])
    assert not own.ran()
    make()
    assert own.ran() == {"model", "parts"}


class Sent(Exception):
    """Far enough."""


PIPELINE = """
out = "out"
[harvest]
{harvest}
[evaluate]
spliced = true
[contexts]
{contexts}
[report]
trust-remote-code = false
[[sae]]
sae = "topk"
k = 4
"""
NAMED = ["--model", "a/b", "--revision", "c0ffee"]


@pytest.mark.parametrize(
    ("harvest", "contexts", "expected"),
    [
        (
            'model = "a/b"\nrevision = "c0ffee"\ntrust_remote_code = true',
            "",
            {"harvest": [*NAMED, FLAG], "evaluate": [*NAMED, FLAG], "contexts": [*NAMED, FLAG]}
            | {"report": NAMED},
        ),
        (
            'model = "a/b"\ntrust_remote_code = true',
            'model = "c/d"',
            {"contexts": ["--model", "c/d"]},
        ),
        ('model = "a/b"\nrevision = "c0ffee"', "", {"harvest": NAMED, "contexts": []}),
    ],
)
def test_a_pipeline_allows_it_for_the_model_that_its_file_names(
    harvest: str, contexts: str, expected: dict[Any, list[str]], tmp_path: Path
) -> None:
    file = tmp_path / "e.toml"
    file.write_text(PIPELINE.format(harvest=harvest, contexts=contexts))
    stages = _Stages(Pipeline(read_experiment(file)))
    stages.check_options()
    for stage, words in expected.items():
        found = [word for word in stages._given(stage) if word not in ("--spliced", SKIP)]
        assert found == words, stage
