"""Training: what a run leaves on disk, and that interruption changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from routesae_cache.checkpoint import RunConfig, RunError, load_run, read_config
from routesae_cache.saes.config import SaeConfig
from routesae_cache.saes.sae import Sae
from routesae_cache.train import TrainConfig, TrainProgress, run_name, train
from stores.reader import StoreReader
from tests.pipeline_helpers import config, fail_at, run, topk

ROUTED = topk((1, 2, 3), route_estimator="straight-through", init_bias="mean")


@pytest.fixture(scope="module")
def reader(tiny_model_dir: Path, tiny_corpus: Path, tmp_path_factory: Any) -> StoreReader:
    folder = tmp_path_factory.mktemp("t")
    return run(config(tiny_model_dir, tiny_corpus, folder / "s.zarr", tokens=2000))


def go(reader: StoreReader, out: Path, *saes: SaeConfig, **options: Any) -> Any:
    given = {"epochs": 2, "batch_tokens": 128, "log_every": 5} | options
    progress = given.pop("progress", lambda state: None)
    pairs = [(sae, 3) for sae in saes]
    return train(reader, pairs, TrainConfig(out=out, **given), progress)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "sae.safetensors")


def assert_same(first: Path, second: Path) -> None:
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_a_run_is_a_directory_that_says_all(reader: StoreReader, tmp_path: Path) -> None:
    result = go(reader, tmp_path / "runs", ROUTED)
    (folder,) = result.folders
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "metrics.jsonl",
        "sae.safetensors",
    ]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == result.tokens // 128 == 30
    assert lines[-1]["nmse"] < 0.95 * lines[0]["nmse"]
    assert lines[-1]["l0"] == 4
    assert sum(lines[-1]["layer_use"]) == pytest.approx(1)
    sae, run_config = load_run(folder)
    assert run_config.store_spec == reader.spec.to_dict()
    assert RunConfig.from_dict(json.loads(json.dumps(run_config.to_dict()))) == run_config
    torch.testing.assert_close(sae.direction_FD().norm(dim=-1), torch.ones(64))


def test_same_seed_same_result(reader: StoreReader, tmp_path: Path) -> None:
    first, second = (go(reader, tmp_path / name, ROUTED).folders[0] for name in "ab")
    assert_same(first, second)


@pytest.mark.parametrize("norm", ["token", "scalar", "none"])
def test_together_is_as_alone(norm: Any, reader: StoreReader, tmp_path: Path) -> None:
    saes = [topk((3,), norm=norm), ROUTED, topk((1,))]
    together = go(reader, tmp_path / "together", *saes).folders
    for sae, folder in zip(saes, together, strict=True):
        alone = go(reader, tmp_path / "alone", sae).folders[0]
        a, b = weights(alone), weights(folder)
        for name in a:  # layers on disk are normalised elsewhere, so the last bit may differ
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-3)


class Stop(BaseException):
    """Ends a pass from outside."""


@pytest.mark.parametrize("at", [1, 13, 29])
def test_interrupted_and_resumed_is_the_same(at: int, reader: StoreReader, tmp_path: Path) -> None:
    saes = (ROUTED, topk((3,)))
    whole = go(reader, tmp_path / "whole", *saes).folders

    def stop(state: TrainProgress) -> None:
        if state.step == at:
            raise Stop

    with pytest.raises(Stop):
        go(reader, tmp_path / "cut", *saes, progress=stop, checkpoint_seconds=0)
    resumed = go(reader, tmp_path / "cut", *saes, resume=True)
    assert resumed.tokens == (30 - at) * 128
    for a, b in zip(whole, resumed.folders, strict=True):
        assert_same(a, b)
        steps = [
            [
                json.loads(line)["step"]
                for line in (folder / "metrics.jsonl").read_text().splitlines()
            ]
            for folder in (a, b)
        ]
        assert steps[0] == steps[1]


def test_checkpoints_of_different_age(
    reader: StoreReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saes = (ROUTED, topk((3,)))
    whole = go(reader, tmp_path / "whole", *saes).folders
    with monkeypatch.context() as patch:  # killed between the two checkpoints of the fourth step
        from routesae_cache import train as module

        failing = fail_at(7, module.save_checkpoint, Stop())
        patch.setattr(module, "save_checkpoint", failing)
        with pytest.raises(Stop):
            go(reader, tmp_path / "cut", *saes, checkpoint_seconds=0)
    for a, b in zip(whole, go(reader, tmp_path / "cut", *saes, resume=True).folders, strict=True):
        assert_same(a, b)


def test_ended_runs_are_left_alone(reader: StoreReader, tmp_path: Path) -> None:
    (folder,) = go(reader, tmp_path, topk()).folders
    before = (folder / "sae.safetensors").stat().st_mtime_ns
    with pytest.raises(RunError, match="this run has ended"):
        go(reader, tmp_path, topk())
    assert go(reader, tmp_path, topk(), resume=True).tokens == 0
    assert (folder / "sae.safetensors").stat().st_mtime_ns == before
    with pytest.raises(RunError, match="epochs: the run has 2, asked for 1"):
        go(reader, tmp_path, topk(), resume=True, epochs=1)


def test_one_that_fails_does_not_stop_the_others(
    reader: StoreReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Sae.forward

    def forward(self: Sae, x_NLD: torch.Tensor) -> Any:
        output = original(self, x_NLD)
        bad = self.config.selector == "route" and int(self.step) >= 11
        return output._replace(loss=output.loss * float("nan")) if bad else output

    monkeypatch.setattr(Sae, "forward", forward)
    result = go(reader, tmp_path, ROUTED, topk())
    assert [state.status for state in result.runs] == ["failed", "done"]
    failed = json.loads((result.folders[0] / "failed.json").read_text())
    assert failed["step"] == 15
    assert "nan" in failed["reason"]
    with pytest.raises(RunError, match="has not ended"):
        load_run(result.folders[0])
    assert load_run(result.folders[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("coder.decoder"), "coder.decoder is missing"),
        (lambda t: t.update(extra=torch.ones(2)), "extra is not known"),
        (lambda t: t.update(step=torch.ones(3)), r"step: expected .*int64 \(\), found .*\(3,\)"),
    ],
)
def test_strict_loading(change: Any, message: str, reader: StoreReader, tmp_path: Path) -> None:
    (folder,) = go(reader, tmp_path, topk()).folders
    tensors = weights(folder)
    change(tensors)
    save_file(tensors, folder / "sae.safetensors")
    with pytest.raises(RunError, match=message):
        load_run(folder)


def test_damaged_runs(reader: StoreReader, tmp_path: Path) -> None:
    (folder,) = go(reader, tmp_path, topk()).folders
    (folder / "sae.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(RunError, match="is damaged"):
        load_run(folder)
    (folder / "config.json").write_text('{"name": 3}')
    with pytest.raises(RunError, match="missing or unknown keys"):
        read_config(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(RunError, match=r"config\.json"):
        read_config(folder)
    with pytest.raises(RunError, match=r"found no config\.json"):
        read_config(tmp_path / "nothing")


def test_a_folder_that_is_no_run_stays_as_it_is(reader: StoreReader, tmp_path: Path) -> None:
    folder = tmp_path / run_name(topk(), 3)
    folder.mkdir()
    (folder / "thesis.txt").write_text("precious")
    with pytest.raises(RunError, match="is not a run"):
        go(reader, tmp_path, topk(), resume=True)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_too_few_tokens_for_a_step(reader: StoreReader, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="do not fill one batch of 100000"):
        go(reader, tmp_path, topk(), batch_tokens=100_000)
    with pytest.raises(ValueError, match="asked for twice"):
        go(reader, tmp_path, topk(), topk())


def test_default_batch_is_the_papers_unless_the_store_is_small(reader: StoreReader) -> None:
    from routesae_cache.train import _batch_tokens

    assert _batch_tokens(100_000_000) == 32768
    assert _batch_tokens(2_000_000) == 1024
    assert _batch_tokens(100) == 256
