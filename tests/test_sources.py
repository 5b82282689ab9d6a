"""What a model's name is found to mean."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import errors

from routesae_cache import sources
from routesae_cache.presets import ModelPreset, ModelSizes, UnknownNameError, WheelFile
from routesae_cache.sources import ModelError, ModelSource, resolve_model


@pytest.fixture
def commits(monkeypatch: pytest.MonkeyPatch) -> None:
    def commit(kind: str, name: str, revision: str | None) -> str:
        return f"{name}@{revision}"

    monkeypatch.setattr(sources, "current_commit", commit)


def failing(failure: Exception) -> Any:
    def fail(*_: Any) -> Any:
        raise failure

    return fail


def test_a_folder(tiny_model_dir: Path) -> None:
    source = resolve_model(str(tiny_model_dir))
    assert source == ModelSource(name="tiny-llama", kind="folder", location=str(tiny_model_dir))


def test_a_preset_in_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "carrier_of_model").mkdir()
    file = tmp_path / "carrier_of_model" / "model.gguf"
    file.write_bytes(b"GGUF....")
    monkeypatch.syspath_prepend(tmp_path)
    wheel = WheelFile(distribution="carrier", package="carrier_of_model", path="model.gguf")
    monkeypatch.setattr(
        sources,
        "MODELS",
        {"told": ModelPreset(source=wheel, sizes=ModelSizes(1, 1, 1))},
    )
    assert resolve_model("told") == ModelSource(name="told", kind="gguf", location=str(file))
    assert resolve_model(str(file)).name == "model.gguf"


@pytest.mark.usefixtures("commits")
def test_the_hub() -> None:
    assert resolve_model("owner/model", revision="v1") == ModelSource(
        name="owner/model", kind="hub", location="owner/model", revision="owner/model@v1"
    )
    source = resolve_model("llama-3.2-1b")
    assert source.name == "llama-3.2-1b"
    assert source.location == "meta-llama/Llama-3.2-1B-Instruct"
    assert resolve_model("gpt2").kind == "hub"


def test_out_of_reach_what_was_downloaded_may_do() -> None:
    source = resolve_model("gpt2")
    assert source.cached_only
    assert source.revision is None


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (errors.GatedRepoError, "accept its licence at .*meta-llama/Llama-3.2-1B-Instruct"),
        (errors.RepositoryNotFoundError, "the hub has no model"),
        (errors.RevisionNotFoundError, "no such revision"),
    ],
)
def test_the_hub_says_no(kind: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    response = SimpleNamespace(headers={}, request=None, status_code=403)
    monkeypatch.setattr(sources, "current_commit", failing(kind("", response=response)))
    with pytest.raises(ModelError, match=message):
        resolve_model("llama-3.2-1b")


def test_other_errors_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "current_commit", failing(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        resolve_model("owner/model")


def test_paths_without_a_model(tmp_path: Path, tiny_model_dir: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "a.gguf").write_bytes(b"no")
    with pytest.raises(ModelError, match=r"a\.gguf is not a GGUF file"):
        resolve_model(str(tmp_path / "a.gguf"))
    with pytest.raises(UnknownNameError, match=r"llama-3\.2-1b, smollm2-135m"):
        resolve_model(str(tmp_path / "none.gguf"))
    with pytest.raises(ModelError, match="no revisions"):
        resolve_model(str(tiny_model_dir), revision="main")
