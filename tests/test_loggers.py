"""Loggers: what they keep, over an interruption too, and what happens when they cannot."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from routesae_cache import loggers as module
from routesae_cache.checkpoint import RunConfig
from routesae_cache.loggers import (
    JsonLinesLogger,
    LogConfig,
    LoggerError,
    prepare_loggers,
    read_metrics,
    scalars,
)
from routesae_cache.train import TrainProgress, TrainResult, train
from routesae_cache.train_plan import TrainConfig
from stores.reader import StoreReader
from tests.pipeline_helpers import config, fail_at, run, topk
from tests.test_cli import refused, routesae

ROUTED = topk((1, 2, 3))
NAMES = ("routesae_k4_f64_s3", "topk_layer3_k4_f64_s3")


@pytest.fixture(scope="module")
def reader(tiny_model_dir: Path, tiny_corpus: Path, tmp_path_factory: Any) -> StoreReader:
    folder = tmp_path_factory.mktemp("l")
    return run(config(tiny_model_dir, tiny_corpus, folder / "s.zarr", tokens=2000))


@pytest.fixture(autouse=True)
def nobody_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights & Biases finds no account, and leaves nothing outside."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


def go(reader: StoreReader, out: Path, log: LogConfig, **options: Any) -> TrainResult:
    stopped = options.pop("stopped", lambda: False)
    progress = options.pop("progress", lambda state: None)
    settings = TrainConfig(out=out, batch_tokens=128, log_every=3, log=log, **options)
    return train(reader, [(ROUTED, 3), (topk(), 3)], settings, progress, stopped=stopped)


def stop_at(step: int) -> dict[str, Any]:
    """Options that stop a pass after a step."""
    steps: list[int] = []

    def progress(state: TrainProgress) -> None:
        steps.append(state.step)

    return {"progress": progress, "stopped": lambda: steps[-1] == step}


def test_json_lines_go_on_after_the_checkpoint(tmp_path: Path) -> None:
    lines = JsonLinesLogger(tmp_path, 0)
    numbers = dict.fromkeys(("loss", "nmse", "l0", "dead_share"), 0.5)
    for step in (1, 2, 3):
        lines.log({"step": step, "seconds": step / 2, **numbers})
    lines.finish("interrupted")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "seco')
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]
    resumed = JsonLinesLogger(tmp_path, 2)
    assert resumed.seconds == 1.0
    resumed.log({"step": 3, "seconds": 9, **numbers})
    assert [r["seconds"] for r in read_metrics(tmp_path)] == [0.5, 1.0, 9]
    assert read_metrics(tmp_path / "nothing") == []


def test_names_of_numbers() -> None:
    record = {"step": 1, "terms": {"l1": 0.5}, "layer_use": [0.25, 0.75]}
    flat = {"step": 1, "terms/l1": 0.5, "layer_use/7": 0.25, "layer_use/9": 0.75}
    assert scalars(record, (7, 9)) == flat


def wandb_records(folder: Path) -> list[Any]:
    """Protocol messages of an offline run, once its writer, a process of its own, is through."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        records = list(read_records(folder))
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        time.sleep(0.05)
    raise AssertionError(f"{folder} was not finished")


def read_records(folder: Path) -> Iterator[Any]:
    """Protocol messages of the one `.wandb` file in an offline run's directory.

    Its framing is that of LevelDB's log: blocks of 32 KiB, and in them pieces of records with a
    header of checksum (4 bytes), length (2) and kind (1 whole, 2 first, 3 middle, 4 last).
    """
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("*.wandb")
    content, block = path.read_bytes(), 32768
    position, record = 7, b""  # after the file's own header
    while position + 7 <= len(content):
        if block - position % block < 7:
            position += block - position % block
            continue
        length = int.from_bytes(content[position + 4 : position + 6], "little")
        kind = content[position + 6]
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield Record.FromString(record)
            record = b""


def history(folder: Path) -> list[dict[str, Any]]:
    """What was logged, in order."""
    found = []
    for record in wandb_records(folder):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            keys = {item.key or "/".join(item.nested_key): item.value_json for item in items}
            found.append({key: json.loads(value) for key, value in keys.items()})
    return found


OFFLINE = LogConfig(
    to=("wandb",), wandb_project="p", wandb_name="x-{run}", wandb_group="g", wandb_mode="offline"
)


def test_wandb_offline_holds_what_was_logged(reader: StoreReader, tmp_path: Path) -> None:
    result = go(reader, tmp_path / "runs", OFFLINE)
    assert [folder.name for folder in result.folders] == list(NAMES)
    for folder in result.folders:
        (offline,) = (folder / "wandb").glob("offline-run-*")
        lines = [line for line in history(offline) if "nmse" in line]
        expected = [scalars(record, (1, 2, 3)) for record in read_metrics(folder)]
        assert len(expected) == 5
        for line, want in zip(lines, expected, strict=True):
            assert {key: line[key] for key in want} == pytest.approx(want)
        records = wandb_records(offline)
        assert records[-1].exit.exit_code == 0
        described = [r.run for r in records if r.WhichOneof("record_type") == "run"]
        assert described[0].project == "p"
        assert described[0].display_name == f"x-{folder.name}"
        assert described[0].run_group == "g"
        given = {item.key: json.loads(item.value_json) for item in described[0].config.update}
        assert given["sae"]["k"] == 4
        assert given["store_spec"] == reader.spec.to_dict()
    routed, fixed = result.folders
    tables = list((routed / "wandb").rglob("*.table.json"))
    use = read_metrics(routed)[-1]["layer_use"]
    rows = [[f"{layer:02}", share] for layer, share in zip((1, 2, 3), use, strict=True)]
    assert rows in [json.loads(path.read_text())["data"] for path in tables]
    assert not list((fixed / "wandb").rglob("*.table.json"))


def test_a_resumed_run_stays_the_same_run(reader: StoreReader, tmp_path: Path) -> None:
    log = LogConfig(to=("wandb", "tensorboard"), wandb_mode="offline")
    go(reader, tmp_path, log, **stop_at(7))
    result = go(reader, tmp_path, log, resume=True)
    for folder in result.folders:
        runs = sorted((folder / "wandb").glob("offline-run-*"))
        (one,) = {path.name.split("-")[3] for path in runs}  # a "-1" may follow within a second
        assert one == json.loads((folder / "wandb.json").read_text())["id"]
        logged = [[h["step"] for h in history(path) if "nmse" in h] for path in runs]
        assert sorted(logged) == [[3, 6], [9, 12, 15]]
        assert sorted(wandb_records(path)[-1].exit.exit_code for path in runs) == [0, 1]
        assert events(folder, "nmse") == [(r["step"], r["nmse"]) for r in read_metrics(folder)]
    assert len({json.loads((f / "wandb.json").read_text())["id"] for f in result.folders}) == 2


def events(folder: Path, name: str) -> list[tuple[int, Any]]:
    """Steps and values of one scalar."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    return [(e.step, pytest.approx(e.value)) for e in accumulator.Scalars(name)]


def test_tensorboard_holds_what_was_logged(reader: StoreReader, tmp_path: Path) -> None:
    result = go(reader, tmp_path, LogConfig(to=("tensorboard",)))
    for folder in result.folders:
        records = read_metrics(folder)
        for name in ("loss", "l0", "seconds"):
            assert events(folder, name) == [(r["step"], r[name]) for r in records]
    routed = result.folders[0]
    uses = [(r["step"], r["layer_use"][1]) for r in read_metrics(routed)]
    assert events(routed, "layer_use/2") == uses


def test_a_lost_checkpoints_steps_are_hidden(reader: StoreReader, tmp_path: Path) -> None:
    class Stop(BaseException):
        pass

    def stop(state: TrainProgress) -> None:
        if state.step == 10:
            raise Stop

    log = LogConfig(to=("tensorboard",))
    with pytest.raises(Stop):  # without a checkpoint: all ten steps are lost
        go(reader, tmp_path, log, progress=stop)
    for folder in go(reader, tmp_path, log, resume=True).folders:
        assert events(folder, "nmse")[-5:] == [(r["step"], r["nmse"]) for r in read_metrics(folder)]


def test_what_is_not_installed_or_not_known(
    reader: StoreReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="no logger mlflow; there are wandb, tensorboard"):
        LogConfig(to=("mlflow",))
    with pytest.raises(ValueError, match="one of online, offline, disabled, found 'on'"):
        LogConfig(wandb_mode="on")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"2 runs would all be called 'same'; put \{run\}"):
        prepare_loggers(LogConfig(to=("wandb",), wandb_name="same"), 2)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    for name in ("wandb", "tensorboard"):
        with pytest.raises(ValueError, match=rf"pip install 'routesae-cache\[{name}\]'"):
            go(reader, tmp_path / "runs", LogConfig(to=(name,)))
    assert not (tmp_path / "runs").exists()


def test_nobody_logged_in(reader: StoreReader, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"No API key configured.*--wandb-mode offline"):
        go(reader, tmp_path / "runs", LogConfig(to=("wandb",), wandb_mode="online"))
    assert not (tmp_path / "runs").exists()


class Breaking:
    """A logger that stops working."""

    finished: ClassVar[list[str]] = []

    def __init__(self, folder: Path, config: RunConfig, step: int) -> None:
        self.fails = config.sae.selector == "fixed"

    def log(self, record: Any) -> None:
        if self.fails and record["step"] >= 6:
            raise LoggerError("the network is gone")

    def finish(self, status: str) -> None:
        self.finished.append(status)


def test_a_failure_is_not_swallowed_and_loses_nothing(
    reader: StoreReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOGGERS", {"breaking": lambda config: Breaking})
    with pytest.raises(LoggerError, match="the network is gone"):
        go(reader, tmp_path / "cut", LogConfig(to=("breaking",)))
    assert Breaking.finished == ["training", "training"]
    whole = go(reader, tmp_path / "whole", LogConfig())
    resumed = go(reader, tmp_path / "cut", LogConfig(), resume=True)
    assert resumed.tokens == 9 * 128
    for a, b in zip(whole.folders, resumed.folders, strict=True):
        assert (a / "sae.safetensors").read_bytes() == (b / "sae.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["wandb.Error", "ConnectionResetError"])
def test_wandbs_own_failure_is_named(
    kind: str, reader: StoreReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    error = wandb.Error("lost") if kind == "wandb.Error" else ConnectionResetError("lost")
    monkeypatch.setattr(wandb.Run, "log", fail_at(3, wandb.Run.log, error))
    with pytest.raises(LoggerError, match="wandb: lost; --resume goes on"):
        go(reader, tmp_path, OFFLINE)
    assert len(list(tmp_path.glob("*/checkpoint.safetensors"))) == 2


def test_options_of_the_commands(reader: StoreReader, tmp_path: Path) -> None:
    command = ["train", reader.path, "--sae", "topk:layer=3,k=4,latents=64", "--out", tmp_path]
    refused(routesae(*command, "--log", "mlflow"), "no logger mlflow", "wandb, tensorboard")
    refused(routesae(*command, "--wandb-project", "p"), "--wandb-project", "--log wandb")
    wandb = ["--log", "wandb", "--wandb-mode", "offline", "--wandb-name", "mine"]
    result = routesae(*command, "--log", "tensorboard", *wandb)
    assert result.exit_code == 0, result.output
    (folder,) = (path for path in tmp_path.iterdir() if path.name.startswith("topk"))
    assert list((folder / "tensorboard").iterdir())
    assert "wandb sync" in result.stderr
    (offline,) = (folder / "wandb").glob("offline-run-*")
    assert [line["step"] for line in history(offline)] == [r["step"] for r in read_metrics(folder)]
