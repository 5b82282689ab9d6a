"""`--nproc` as a user runs it: stopped by Ctrl-C, by the death of a process, and gone on with."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from routesae_cache.checkpoint import read_config
from tests.command_helpers import routesae
from tests.pipeline_helpers import config, run

SAE = ["--sae", "topk:layer=3", "--k", 4, "--latents", 64]
SIZES = ["--epochs", 4, "--batch-tokens", 32, "--device", "cpu", "--nproc", 2]


@pytest.fixture(scope="module")
def store(tiny_model_dir: Path, tiny_corpus: Path, tmp_path_factory: Any) -> Path:
    path = tmp_path_factory.mktemp("nproc") / "s.zarr"
    run(config(tiny_model_dir, tiny_corpus, path, tokens=2000))
    return path


def once_it_trains(folder: Path, act: Callable[[], None]) -> threading.Thread:
    """Do something when a first line of metrics is there."""

    def watch() -> None:
        while not any(path.stat().st_size for path in folder.glob("*/metrics.jsonl")):
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_interrupted_and_gone_on_with_by_one(
    store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    once_it_trains(tmp_path, lambda: os.kill(os.getpid(), signal.SIGINT))
    result = routesae("train", store, *SAE, *SIZES, "--out", tmp_path)
    said = capfd.readouterr()
    assert result.exit_code == 130, said.err
    assert result.output == ""  # the leading process speaks
    assert said.err.count("Training 1 SAE with") == said.err.count("Stopped.") == 1
    assert said.out.count(" interrupted ") == 1
    assert "Traceback" not in said.err
    (folder,) = tmp_path.iterdir()
    with safe_open(folder / "checkpoint.safetensors", "pt") as file:
        step = int(file.metadata()["step"])
    resumed = routesae("train", store, *SAE, *SIZES[:-2], "--out", tmp_path, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert f"{step:,} of them taken" in resumed.stderr
    assert read_config(folder).streams == 2


def test_killed_and_gone_on_with_by_two(
    store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def kill_the_second() -> None:
        (second,) = [p for p in multiprocessing.active_children() if p.name.endswith("1")]
        second.kill()

    once_it_trains(tmp_path, kill_the_second)
    result = routesae("train", store, *SAE, *SIZES, "--out", tmp_path)
    said = capfd.readouterr()
    assert result.exit_code == 1, said.err
    assert "process 1 of 0 to 1 was killed by SIGKILL" in result.stderr
    assert said.err.count("another of the 2 processes has ended") == 1
    assert "Traceback" not in said.err
    assert not list(tmp_path.glob("*/sae.safetensors"))
    resumed = routesae("train", store, *SAE, *SIZES, "--out", tmp_path, "--resume")
    assert resumed.exit_code == 0, capfd.readouterr().err
    assert len(list(tmp_path.glob("*/sae.safetensors"))) == 1
    again = routesae("train", store, *SAE, *SIZES, "--out", tmp_path)
    assert again.exit_code == 2
    assert capfd.readouterr().err.count("this run has ended") == 1
