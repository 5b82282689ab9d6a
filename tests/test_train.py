"""Training: what a run leaves on disk, and that interruption changes nothing."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from routesae_cache.checkpoint import RunConfig, RunError, load_run, read_config
from routesae_cache.json_files import write_json
from routesae_cache.prefix import extent
from routesae_cache.runs import Asked, run_name, run_names
from routesae_cache.saes.config import SaeConfig
from routesae_cache.saes.sae import Sae
from routesae_cache.train import TrainProgress, train
from routesae_cache.train_plan import TrainConfig, TrainStart
from stores.reader import StoreReader
from tests.pipeline_helpers import config, fail_at, run, topk

ROUTED = topk((1, 2, 3), route_estimator="straight-through", init_bias="mean")


@pytest.fixture(scope="module")
def reader(tiny_model_dir: Path, tiny_corpus: Path, tmp_path_factory: Any) -> StoreReader:
    folder = tmp_path_factory.mktemp("t")
    return run(config(tiny_model_dir, tiny_corpus, folder / "s.zarr", tokens=2000))


HOOKS = {"progress", "on_start", "stopped", "only"}


def go(reader: StoreReader, out: Path, *saes: SaeConfig, **options: Any) -> Any:
    given = {"epochs": 2, "batch_tokens": 128, "log_every": 5} | options
    hooks = {name: given.pop(name) for name in HOOKS & given.keys()}
    return train(reader, [(sae, 3) for sae in saes], TrainConfig(out=out, **given), **hooks)


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
    older = {key: value for key, value in run_config.to_dict().items() if key != "streams"}
    assert RunConfig.from_dict(older) == run_config
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


@pytest.mark.parametrize("norm", ["token", "scalar"])
def test_some_of_a_pass_get_its_very_numbers(
    norm: Any, reader: StoreReader, tmp_path: Path
) -> None:
    """Whatever layers are read beside theirs; `test_together_is_as_alone` is less strict."""
    saes = [topk((3,), norm=norm), ROUTED, topk((1,)), topk((1,), k=5), topk((2, 3), k=4)]
    together = go(reader, tmp_path / "together", *saes).folders
    for only in ([2], [0, 4], [1, 3]):
        found = go(reader, tmp_path / "parts", *saes, only=only)
        assert [folder.name for folder in found.folders] == [together[i].name for i in only]
        for index, folder in zip(only, found.folders, strict=True):
            assert_same(together[index], folder)


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
        from routesae_cache import runs as module

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
    bad = infinite_when(lambda sae: sae.config.selector == "route" and int(sae.step) >= 11)
    monkeypatch.setattr(Sae, "forward", bad)
    result = go(reader, tmp_path, ROUTED, topk())
    assert [state.status for state in result.runs] == ["failed", "done"]
    failed = json.loads((result.folders[0] / "failed.json").read_text())
    assert failed["step"] == 15
    assert "inf" in failed["reason"] or "nan" in failed["reason"]
    with pytest.raises(RunError, match="has not ended"):
        load_run(result.folders[0])
    assert load_run(result.folders[1])


def test_what_failed_is_left_alone(
    reader: StoreReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Sae, "forward", infinite_when(lambda sae: sae.config.selector == "route"))
        failed = go(reader, tmp_path, ROUTED).runs[0]
    resumed = go(reader, tmp_path, ROUTED, topk(), resume=True)
    assert [state.status for state in resumed.runs] == ["failed", "done"]
    assert str(resumed.runs[0]) == str(failed)
    assert failed.step == 5
    with pytest.raises(RunError, match="this run failed"):
        go(reader, tmp_path, ROUTED)


def infinite_when(bad: Callable[[Sae], bool]) -> Any:
    """`Sae.forward` with a loss that is not finite for some SAEs."""
    original = Sae.forward

    def forward(self: Sae, x_NLD: torch.Tensor) -> Any:
        output = original(self, x_NLD)
        return output._replace(loss=output.loss * float("inf")) if bad(self) else output

    return forward


def test_a_checkpoint_is_never_of_a_failed_run(
    reader: StoreReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = infinite_when(lambda sae: int(sae.step) >= 11)
    monkeypatch.setattr(Sae, "forward", bad)
    go(reader, tmp_path, topk(), checkpoint_seconds=0)
    with safe_open(tmp_path / run_name(topk(), 3) / "checkpoint.safetensors", "pt") as file:
        assert file.metadata()["step"] == "11"


def test_stopped_between_two_steps(reader: StoreReader, tmp_path: Path) -> None:
    saes = (ROUTED, topk((3,)))
    whole = go(reader, tmp_path / "whole", *saes)
    assert not whole.interrupted
    steps: list[int] = []

    def progress(state: TrainProgress) -> None:
        steps.append(state.step)

    cut = go(reader, tmp_path / "cut", *saes, progress=progress, stopped=lambda: steps[-1] == 7)
    assert cut.interrupted
    assert cut.tokens == 7 * 128
    assert steps == list(range(1, 8))
    assert [state.status for state in cut.runs] == ["interrupted"] * 2
    for folder in cut.folders:
        with safe_open(folder / "checkpoint.safetensors", "pt") as file:
            assert file.metadata()["step"] == "7"
    starts: list[TrainStart] = []
    resumed = go(reader, tmp_path / "cut", *saes, resume=True, on_start=starts.append)
    assert resumed.tokens == 23 * 128
    parameters = 2 * (2 * 64 * 32 + 64 + 32) + 3 * 32
    split = extent(reader.spec, len(reader.chunks("train")))
    assert starts == [TrainStart(2, parameters, 7, 30, 128, (1, 2, 3), split, split)]
    for a, b in zip(whole.folders, resumed.folders, strict=True):
        assert_same(a, b)


def test_settings_written_by_an_earlier_version_stay(reader: StoreReader, tmp_path: Path) -> None:
    """Other keys than those of today; the checkpoint has a checksum of them."""
    (folder,) = go(reader, tmp_path, topk()).folders
    (cut,) = go(reader, tmp_path / "cut", topk(), stopped=lambda: True).folders
    for path in (cut / "config.json", cut / "checkpoint.safetensors"):
        path.unlink()
    settings = read_config(folder).to_dict()
    del settings["chunks"]
    write_json(cut / "config.json", settings)
    written = (cut / "config.json").read_bytes()
    go(reader, tmp_path / "cut", topk(), resume=True, stopped=lambda: True)
    go(reader, tmp_path / "cut", topk(), resume=True)
    assert (cut / "config.json").read_bytes() == written
    assert_same(folder, cut)


def test_what_a_killed_process_left_is_removed(reader: StoreReader, tmp_path: Path) -> None:
    saes = [topk(), topk(k=8)]
    (ended,) = go(reader, tmp_path, *saes, only=[0]).folders
    (cut,) = go(reader, tmp_path, *saes, only=[1], stopped=lambda: True).folders
    (ended / "checkpoint.safetensors").write_bytes(b"not removed yet")
    for folder in (ended, cut):
        (folder / ".tmpAb12Cd").touch()  # as safetensors calls what it writes to
        (folder / "metrics.jsonl.partial").touch()
    go(reader, tmp_path, *saes, resume=True)
    for folder in (ended, cut):
        names = {file.name for file in folder.iterdir()}
        assert names == {"config.json", "metrics.jsonl", "sae.safetensors"}


def test_stopped_after_the_last_step_is_done(reader: StoreReader, tmp_path: Path) -> None:
    result = go(reader, tmp_path, topk(), epochs=1, batch_tokens=1920, stopped=lambda: True)
    assert [state.status for state in result.runs] == ["done"]
    assert not result.interrupted


@pytest.mark.parametrize(
    ("asked", "layers"),
    [([(2,)], {2}), ([(1,), (3,)], {1, 3}), ([(1, 2, 3), (3,), (2,)], {1, 2, 3})],
)
def test_only_what_is_needed_is_read_and_once(
    asked: Any, layers: Any, reader: StoreReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "s.zarr"
    shutil.copytree(reader.path, store)
    for layer in {1, 2, 3} - layers:  # whatever touched these would fail
        for chunks in store.glob(f"residuals/{layer}/*/c"):
            shutil.rmtree(chunks)
    reads: Counter[tuple[int, int]] = Counter()
    original = StoreReader.codes

    def codes(self: StoreReader, chunk: int, positions: Any, *rest: Any) -> Any:
        reads.update((chunk, self.spec.layers[position]) for position in positions)
        return original(self, chunk, positions, *rest)

    monkeypatch.setattr(StoreReader, "codes", codes)
    go(StoreReader(store), tmp_path / "runs", *[topk(one) for one in asked], epochs=1)
    assert reads == {(chunk, layer): 1 for chunk in reader.chunks("train") for layer in layers}


def test_each_has_its_own_rate_and_seed(reader: StoreReader, tmp_path: Path) -> None:
    asked = [Asked(topk(), 3), Asked(topk(), 4), Asked(topk(), 3, 1e-3)]
    settings = TrainConfig(out=tmp_path, batch_tokens=128, log_every=5, lr=2e-3)
    result = train(reader, asked, settings)
    found = [(c.seed, c.lr) for c in map(read_config, result.folders)]
    assert found == [(3, 2e-3), (4, 2e-3), (3, 1e-3)]
    first = [json.loads((f / "metrics.jsonl").read_text().splitlines()[0]) for f in result.folders]
    assert [line["lr"] for line in first] == [2e-3, 2e-3, 1e-3]
    assert len({line["nmse"] for line in first}) == 3


def test_names_tell_runs_apart() -> None:
    penalised = topk(coder="relu", k=None, sparsity_weight=0.5)
    assert run_name(penalised, 1) == "vanilla_layer3_l1-0.5_f64_s1"
    assert run_name(topk(norm="scalar"), 1, 1e-3) == "topk_layer3_k4_scalar_lr0.001_f64_s1"
    saes = [ROUTED, topk((1, 2), auxk=8), topk((1, 2), auxk=0), topk()]
    names = run_names([Asked(sae, 3) for sae in saes])
    base = "routesae_k4_f64_s3"
    assert names[1] == (f"{base}_layers-1+2_init-bias-zero_auxk-8_route-estimator-factor")
    assert names[0].startswith(f"{base}_layers-1+2+3_init-bias-mean_auxk-none")
    assert names[2:] == [names[1].replace("auxk-8", "auxk-0"), "topk_layer3_k4_f64_s3"]


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
    from routesae_cache.train_plan import _batch_tokens

    assert _batch_tokens(100_000_000) == 32768
    assert _batch_tokens(2_000_000) == 1024
    assert _batch_tokens(100) == 256
