"""Every byte of a run's files and of contexts damaged: an error with a name, or the same values."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from routesae_cache.checkpoint import (
    CHECKPOINT,
    CONFIG,
    METRICS,
    WEIGHTS,
    RunConfig,
    RunError,
    load_checkpoint,
    load_run,
    save_checkpoint,
    save_weights,
)
from routesae_cache.contexts.activation_files import activation_file, read_activations
from routesae_cache.contexts.mining import Activations
from routesae_cache.contexts.records import write_record
from routesae_cache.interpretation.chat import Reply
from routesae_cache.interpretation.excerpts import read_excerpts
from routesae_cache.interpretation.prices import Usage
from routesae_cache.interpretation.prompts import ask_for_explanation
from routesae_cache.interpretation.replies import ReplyLog
from routesae_cache.json_files import read_json, write_json
from routesae_cache.loggers import JsonLinesLogger, read_metrics
from routesae_cache.optim import build_optimizer
from routesae_cache.saes.config import SaeConfig
from routesae_cache.saes.registry import build_sae
from tests.faults.damage import Damage, cuts, done, flips, no_hang
from tests.faults.tally import Tally
from tests.store_helpers import store_spec

SAE = SaeConfig(selector="route", coder="topk", layers=(1, 2), latents=3, k=1)
WIDTH = 2
WORDS = {"0": {"a": [{"context": "an <ACTIVATED>a</ACTIVATED>", "activation": 2.5}]}}


def config(folder: Path) -> RunConfig:
    return RunConfig(
        name=folder.name,
        sae=SAE,
        width=WIDTH,
        seed=1,
        order_seed=1,
        lr=1e-3,
        batch_tokens=32,
        total_steps=3,
        epochs=1,
        store="no.zarr",
        store_spec=store_spec(width=WIDTH, layers=(1, 2)).to_dict(),
        mean_square=1.5,
        chunks=2,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that also has a checkpoint, and three lines of metrics."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    folder.mkdir()
    write_json(folder / CONFIG, config(folder).to_dict())
    sae = build_sae(SAE, WIDTH, 1)
    save_weights(folder, sae)
    optimizer = build_optimizer(sae.parameters(), 1e-3)
    sae(torch.ones(4, 2, WIDTH)).loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    save_checkpoint(folder, sae, optimizer, 3)
    lines = JsonLinesLogger(folder, 0)
    numbers = dict.fromkeys(("loss", "nmse", "l0", "dead_share", "seconds"), 0.25)
    for step in (1, 2, 3):
        lines.log({"step": step, **numbers, "layer_use": [0.5, 0.5]})
    return folder


def tensors(of: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in of.items()}


def loaded(run: Path) -> Any:
    sae, found = load_run(run)
    return tensors(sae.state_dict()), found.to_dict()


def resumed(run: Path) -> Any:
    sae = build_sae(SAE, WIDTH, 2)
    optimizer = build_optimizer(sae.parameters(), 1e-3)
    step = load_checkpoint(run, sae, optimizer)
    state = {index: tensors(each) for index, each in optimizer.state_dict()["state"].items()}
    return step, tensors(sae.state_dict()), state


def check(
    damages: Iterable[Damage],
    read: Callable[[], Any],
    errors: type[Exception],
    harmless: Callable[[Any, Any], bool] = lambda found, expected: bool(found == expected),
) -> int:
    """Each is refused with an error that names the file, or harmless; returns how many."""
    expected = read()
    tried, wrong, refused = 0, list[str](), 0
    with no_hang(300):
        for damage in damages:
            tried += 1
            with done(damage):
                try:
                    if not harmless(read(), expected):
                        wrong.append(f"{damage.what}: other values are read")
                except errors as error:
                    refused += 1
                    if damage.file.name not in str(error) and str(damage.file.parent) not in str(
                        error
                    ):
                        wrong.append(f"{damage.what}: {error}")
    assert not wrong, "\n".join(wrong)
    assert refused
    assert read() == expected
    return tried


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_runs_config_and_weights(run: Path, name: str, tally: Tally) -> None:
    damages = itertools.chain(flips(run / name), cuts(run / name, every=7))
    tried = check(damages, lambda: loaded(run), RunError)
    tally.add("run: a byte of config or weights", tried=tried, survived=tried)


def test_a_checkpoint(run: Path, tally: Tally) -> None:
    path = run / CHECKPOINT
    # without one, training begins anew: nothing is read that is wrong
    damages = (d for d in (*flips(path), *cuts(path, every=7)) if d.content is not None)
    tried = check(damages, lambda: resumed(run), RunError)
    tally.add("run: a byte of a checkpoint", tried=tried, survived=tried)


@pytest.mark.parametrize("name", [WEIGHTS, CHECKPOINT])
def test_files_of_another_run(run: Path, name: str, tmp_path: Path, tally: Tally) -> None:
    """Of the same shape, so that nothing else tells."""
    other = shutil.copytree(run, tmp_path / "other")
    record = read_json(other / CONFIG)
    changes = ({"seed": 2}, {"lr": 2e-3}, {"epochs": 2}, {"sae": record["sae"] | {"k": 2}})
    for change in changes:
        write_json(other / CONFIG, record | change)
        with pytest.raises(RunError, match=f"{name} is another run's"):
            (loaded if name == WEIGHTS else resumed)(other)
    write_json(other / CONFIG, record | {"name": "renamed", "store": "elsewhere.zarr"})
    assert resumed(other) == resumed(run)
    tally.add("run: a file of another run", tried=len(changes), survived=len(changes))


def begins(found: list[Any], expected: list[Any]) -> bool:
    """All lines, or those before the last, which a kill may have cut off; no number changed."""
    known = [{key: line.get(key) for key in expected[0]} for line in found]
    return known == expected[: len(known)] and len(expected) - len(known) <= 1


def test_metrics(run: Path, tally: Tally) -> None:
    path = run / METRICS
    content = path.read_bytes()
    last = content[:-1].rindex(b"\n") + 1
    later = (Damage(path, content[:n], f"cut to {n}") for n in range(last, len(content)))
    tried = check((*flips(path), *later), lambda: read_metrics(run), RunError, begins)
    tally.add("run: a byte of metrics.jsonl", tried=tried, survived=tried)


def test_contexts(tmp_path: Path, tally: Tally) -> None:
    path = tmp_path / "contexts.json"
    place = {"row": 3, "position": 4, "layer": 2, "first": 1, "last": 6}
    words = {"0": {"a": [WORDS["0"]["a"][0] | place]}, "2": {"b": [WORDS["0"]["a"][0] | place]}}
    head = {"kind": "contexts", "name": "tiny", "summary": {"layer_share": {1: 0.5}}}
    maps = {"latents": [(0, {"max": 2.5}), (2, {"max": 1e-3})], "latent_context_map": words.items()}
    write_record(path, head, maps)

    def read() -> Any:
        return read_excerpts(path, sample=2, seed=1, hold_out=False), read_json(path)["latents"]

    damages = (d for d in (*flips(path), *cuts(path, every=7)) if d.content is not None)
    tried = check(damages, read, ValueError)
    tally.add("contexts: a byte of the JSON file", tried=tried, survived=tried)


def test_replies(tmp_path: Path, tally: Tally) -> None:
    path = tmp_path / "x.replies.jsonl"
    questions = [ask_for_explanation(latent, ()) for latent in (0, 1)]
    with ReplyLog(path, "m") as log:
        for question in questions:
            reply = Reply(text="word", finish="stop", reply_format="json", usage=Usage(1, 2))
            log.add(question, reply)

    def read() -> list[list[Reply]]:
        log = ReplyLog(path, "m")
        return [list(log.to(question)) for question in questions]

    def some(found: Any, expected: Any) -> bool:
        """What is lost is asked again."""
        return all(one in ([], both) for one, both in zip(found, expected, strict=True))

    tried = check(flips(path), read, ValueError, some)
    tally.add("contexts: a byte of the replies", tried=tried, survived=tried)


def test_activations(tmp_path: Path, tally: Tally) -> None:
    path = tmp_path / "x" / "activations.parquet"
    n = 50
    found = Activations(
        np.arange(n),
        np.arange(n) % 3,
        np.linspace(1, 2, n, dtype=np.float32),
        np.full(n, 2, np.int16),
        np.zeros(n, np.int64),
    )
    with activation_file(path, 16) as file:
        file.add(found)

    def read() -> Any:
        return [[column.tolist() for column in part] for part in read_activations(path)]

    expected, tried, unnoticed = read(), 0, 0
    for damage in itertools.chain(flips(path), cuts(path, every=7)):
        tried += 1
        with no_hang(60), done(damage):
            try:
                unnoticed += read() != expected
            except ValueError:
                continue
    # parquet has checksums of its pages, none of their headers and of the file's end
    assert unnoticed < tried / 50
    tally.add("contexts: a byte of the parquet file", tried=tried, survived=tried - unnoticed)
