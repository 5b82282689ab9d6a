"""Experiments' files: what they may say, and what they may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from routesae_cache.experiment import ExperimentError, read_experiment
from routesae_cache.sweep import SweepError
from stores.places import as_place

SAE = '[[sae]]\nsae = "topk"\nk = 4\n'


def written(folder: Path, text: str) -> Path:
    path = folder / "e.toml"
    path.write_text(text, "utf-8")
    return path


def test_another_harvest_makes_another_store(tmp_path: Path) -> None:
    def store(harvest: str) -> Path:
        text = f'out = "o"\n[harvest]\n{harvest}\n{SAE}'
        return Path(read_experiment(written(tmp_path, text)).store)

    first = store("tokens = 100\ncontext = 16")
    assert first.parent == Path("o")
    assert store("context = 16\ntokens = 200") == first  # extends it
    assert store("tokens = 100\ncontext = 32") != first


def test_a_named_store_is_shared(tmp_path: Path) -> None:
    path = written(tmp_path, f'out = "o"\nstore = "runs/x.zarr"\n{SAE}')
    assert read_experiment(path).store == as_place("runs/x.zarr")


def test_saes_of_another_file(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.toml"
    sweep.write_text(SAE)
    path = written(tmp_path, f'out = "o"\nsweep = "{sweep}"\n')
    experiment = read_experiment(path)
    assert experiment.sweep_file == sweep
    assert len(experiment.sweep.specs) == 1
    assert experiment.options["train"]["sae"] == [{"sae": "topk", "k": 4}]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (SAE, "where results go"),
        (f"out = 3\n{SAE}", "expected a path"),
        ('out = "o"\n', r"\[\[sae\]\]"),
        (f'out = "o"\nharvest = 1\n{SAE}', r"a table \[harvest\]"),
        (f'out = "o"\nmine = 1\n{SAE}', "unknown mine"),
        (f'out = "o"\nsweep = "other.toml"\n{SAE}', "give one"),
        ("out = ", "expected TOML"),
    ],
)
def test_refusals(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises((ExperimentError, SweepError), match=words):
        read_experiment(written(tmp_path, text))
