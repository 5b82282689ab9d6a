"""Every command that loads a model or a tokenizer: their own code is run where it is asked for."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import pytest
import torch
from typer.testing import Result

from cli.options import chosen_model
from routesae_cache.forecast import model_sizes
from routesae_cache.lm import load_lm
from routesae_cache.tokens import load_tokenizer
from routesae_cache.train import train
from routesae_cache.train_plan import TrainConfig
from stores.reader import StoreReader
from tests.command_helpers import refused, routesae
from tests.faults.jobs import EXPERIMENT, SWEEP_TABLES, harvest_arguments
from tests.faults.tally import Tally
from tests.own_code import OwnCode, make_own, modules_in
from tests.pipeline_helpers import array_files, topk

FLAG = "--trust-remote-code"
SPLICED = "[evaluate]\nspliced = true\nrows = 2\n"
IDS = torch.arange(8)[None]


class Setting(NamedTuple):
    """A model with code of its own, and what was made of it by its leave."""

    own: OwnCode
    corpus: Path
    run: Path


@pytest.fixture(scope="module")
def setting(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    tiny_corpus: Path,
) -> Iterator[Setting]:
    folder = tmp_path_factory.mktemp("own")
    with modules_in(folder / "modules"), pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        own = make_own(folder / "own-llama", tiny_model("llama"), tiny_tokenizer)
        done = routesae(*harvest_arguments(own.folder, tiny_corpus), FLAG)
        assert done.exit_code == 0, done.output
        options = TrainConfig(out=folder / "runs", batch_tokens=64, epochs=1)
        (run,) = train(StoreReader(folder / "s.zarr"), [(topk((3,)), 1)], options).folders
        own.ran()
        yield Setting(own, tiny_corpus, run)


def arguments(setting: Setting) -> dict[str, list[object]]:
    """A command line for each command that loads a model or its tokenizer."""
    model, run = ["--model", setting.own.folder], setting.run
    again = harvest_arguments(setting.own.folder, setting.corpus, tokens=500)
    again[again.index("s.zarr")] = "new.zarr"
    threshold = ["--threshold", 0.1]
    prompt = ["--prompt", "The router", "--max-new-tokens", 3, "--raw"]
    experiment = EXPERIMENT.format(model=setting.own.folder, dataset=setting.corpus)
    Path("e.toml").write_text(experiment + SPLICED + SWEEP_TABLES.format(epochs=1))
    return {
        "harvest": again,
        "one worker": [*again, "--worker", "0/1"],
        "estimate": [*again, "--dry-run"],
        "plan": ["plan", *model, "--sae", "topk:k=4", "--context", 16, "--gpu", "h100"],
        "evaluate": ["evaluate", "s.zarr", run, "--spliced", "--rows", 2, *model],
        "contexts": ["contexts", "s.zarr", run, "--out", "contexts", *threshold, *model],
        "steer": ["steer", run, "--store", "s.zarr", "--latent", 1, "--add", 9, *prompt, *model],
        "report": ["report", "runs", "--store", "s.zarr", "--out", "r.html", *model],
        "pipeline": ["pipeline", "e.toml"],
        "pipeline's estimate": ["pipeline", "e.toml", "--dry-run"],
    }


COMMANDS = [
    *("harvest", "one worker", "estimate", "plan", "evaluate", "contexts", "steer", "report"),
    *("pipeline", "pipeline's estimate"),
]


def allowing(command: list[object]) -> list[object]:
    """The same command, with leave to run the code."""
    if command[0] != "pipeline":
        return [*command, FLAG]
    file = Path("e.toml")
    file.write_text(file.read_text().replace("[harvest]", "[harvest]\ntrust_remote_code = true"))
    return command


def warnings(result: Result) -> int:
    words = " ".join(result.stderr.split())
    return words.count("Running the code that comes with the model own-llama (")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_runs_no_code_by_itself(name: str, setting: Setting, tally: Tally) -> None:
    command = arguments(setting)[name]
    before = set(array_files(Path()))
    refused(routesae(*command), "own-llama", "code of its own", FLAG, "--revision")
    assert not setting.own.ran()
    assert set(array_files(Path())) == before
    tally.add("code and pickles by others")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_runs_it_where_it_is_asked_for(name: str, setting: Setting) -> None:
    result = routesae(*allowing(arguments(setting)[name]))
    assert result.exit_code == 0, result.output
    assert warnings(result) == (4 if name == "pipeline" else 1)  # one a stage
    assert setting.own.ran()


@pytest.mark.parametrize("name", ["evaluate", "contexts", "steer"])
def test_a_store_does_not_say_whose_code_is_run(name: str, setting: Setting, tally: Tally) -> None:
    command = arguments(setting)[name]
    at = command.index("--model")
    del command[at : at + 2]
    refused(routesae(*command), "was made with the model 'own-llama'", "--model")
    refused(routesae(*command, FLAG), f"{FLAG} is about the model that --model names")
    assert not setting.own.ran()
    tally.add("code and pickles by others", tried=2, survived=2)


def test_the_code_is_that_of_the_commit(
    tmp_path: Path, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    """Of a hub model that was downloaded twice, with other code the second time."""
    downloaded = Path(huggingface_hub.constants.HF_HUB_CACHE) / "models--owner--own"
    first, second = "1" * 40, "2" * 40
    with modules_in(tmp_path / "modules"):
        for commit in (first, second):
            own = make_own(tmp_path / "own", tiny_model("llama"), tiny_tokenizer)
            own.rewrite(scale=int(commit[0]))
            shutil.move(own.folder, downloaded / "snapshots" / commit)
        (downloaded / "refs").mkdir()
        (downloaded / "refs" / "main").write_text(second)
        source = chosen_model("owner/own", first, True)
        assert model_sizes(source).n_layers == 4
        load_tokenizer(source)
        assert own.ran() == {"model", "parts", "words"}
        copies = [file for file in (tmp_path / "modules").rglob("*.py") if file.stat().st_size]
        assert {file.parent.name for file in copies} == {first}
        found = {
            revision: load_lm(chosen_model("owner/own", revision, True)).residuals(IDS, [0])[0]
            for revision in (first, second, None)
        }
        assert torch.equal(2 * found[first], found[second])
        assert torch.equal(found[None], found[second])
