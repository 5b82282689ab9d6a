"""Sweep files: what they may say, and that those of the project can be used."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cli import training
from cli.stopping import stop_signals
from routesae_cache.runs import RunState, run_names
from routesae_cache.saes.config import SaeConfig
from routesae_cache.sweep import OWN_OPTIONS, Sweep, SweepError, complete, read_sweep
from routesae_cache.train import TrainProgress
from routesae_cache.train_plan import TrainConfig
from stores.codecs import Int8Codec
from stores.spec import StoreSpec
from tests.pipeline_helpers import config, run
from tests.test_cli import refused, routesae

SWEEPS = Path(__file__).parent.parent / "sweeps"


def read(folder: Path, text: str) -> Sweep:
    path = folder / "sweep.toml"
    path.write_text(text, encoding="utf-8")
    return read_sweep(path)


def store_spec(blocks: int, layers: tuple[int, ...], width: int) -> StoreSpec:
    return StoreSpec(
        model={"name": "m", "dtype": "float32", "weights": "0"},
        tokenizer={},
        text={"dataset": "t"},
        packing="joined",
        layers=layers,
        n_blocks=blocks,
        width=width,
        context=512,
        codec=Int8Codec(),
        batch_rows=1,
        chunk_rows=1,
        eval_target=1,
    )


def saes(sweep: Sweep, spec: StoreSpec) -> list[SaeConfig]:
    asked = complete(sweep.specs, spec, seed=sweep.train.get("seed", 42))
    assert len(set(run_names(asked))) == len(asked)
    TrainConfig(out=Path("x"), **sweep.train)
    return [each.sae for each in asked]


def test_the_papers_experiment() -> None:
    found = saes(read_sweep(SWEEPS / "paper.toml"), store_spec(16, tuple(range(4, 13)), 2048))
    assert read_sweep(SWEEPS / "paper.toml").train["batch_tokens"] == 32768
    swept = {kind: [] for kind in ("fixed+topk", "route+topk", "random+topk")}
    for sae in found:
        kind = f"{sae.selector}+{sae.coder}"
        swept.setdefault(kind, []).append(sae.k if sae.coder == "topk" else sae.sparsity_weight)
    ks = [48, 56, 64, 72]
    assert [swept[kind] for kind in list(swept)[:3]] == [ks, ks, ks]
    weights = {kind: len(values) for kind, values in swept.items() if kind not in list(swept)[:3]}
    assert weights == dict.fromkeys(("fixed+relu", "fixed+gated", "fixed+jumprelu", "all+relu"), 4)
    assert {sae.latents for sae in found} == {16384}
    assert {sae.layers for sae in found} == {(12,), tuple(range(4, 13))}
    assert {sae.init_bias for sae in found} == {"zero"}
    assert {sae.route_estimator for sae in found if sae.selector == "route"} == {"factor"}


def test_the_demos_experiment() -> None:
    found = saes(read_sweep(SWEEPS / "demo.toml"), store_spec(30, tuple(range(7, 23)), 576))
    kinds = {(sae.selector, sae.coder) for sae in found}
    assert {("route", "topk"), ("fixed", "topk"), ("random", "topk")} < kinds
    assert {("fixed", "relu"), ("fixed", "jumprelu")} < kinds


def test_lists_make_a_grid(tmp_path: Path) -> None:
    sweep = read(
        tmp_path,
        """
        [train]
        latents = 64
        batch-tokens = 256
        lr = 1e-3
        k = 8

        [[sae]]
        sae = ["topk", "routesae"]
        k = [2, 4]
        seed = [0, 1]

        [[sae]]
        sae = "batchtopk"
        layer = [2, "auto"]
        auxk = ["none", 16]

        [[sae]]
        sae = "route+topk"
        layers = "1-2"
        hard = false
        """,
    )
    assert sweep.train == {"batch_tokens": 256, "lr": 1e-3}
    asked = complete(sweep.specs, store_spec(4, (1, 2, 3), 16), seed=5)
    assert len(run_names(asked)) == 8 + 4 + 1
    first = [(each.sae.selector, each.sae.k, each.seed) for each in asked[:8]]
    grid = [(k, seed) for k in (2, 4) for seed in (0, 1)]
    assert first == [(selector, *point) for selector in ("fixed", "route") for point in grid]
    others = [(each.sae.layers, each.sae.k, each.sae.auxk, each.seed) for each in asked[8:12]]
    assert others == [((layer,), 8, auxk, 5) for layer in (2, 3) for auxk in (None, 16)]
    assert (asked[12].sae.layers, asked[12].sae.hard) == ((1, 2), False)
    assert {each.sae.latents for each in asked} == {64}
    assert {each.sae.init_bias for each in asked} == {"mean"}


def test_seeds_and_rates_of_the_pass_make_a_grid_too(tmp_path: Path) -> None:
    text = '[train]\nseed = [7, 8]\nlr = [1e-3, 2e-3]\n[[sae]]\nsae = "topk"\nk = 2\n'
    sweep = read(tmp_path, text)
    assert sweep.train == {"seed": 7, "lr": 1e-3}
    asked = complete(sweep.specs, store_spec(4, (1, 2, 3), 16), seed=7)
    assert {(each.seed, each.lr) for each in asked} == {
        (s, r) for s in (7, 8) for r in (1e-3, 2e-3)
    }
    assert run_names(asked)[1] in (
        "topk_layer3_k2_lr0.002_f128_s7",
        "topk_layer3_k2_lr0.001_f128_s8",
    )


TOPK = '[[sae]]\nsae = "topk"\nk = 2\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["tables [[sae]]", "none"]),
        ("sae = []", ["tables [[sae]]", "none"]),
        ("[train]\nepochs = 1", ["tables [[sae]]", "none"]),
        ('[sae]\nsae = "topk"', ["tables [[sae]]", "'topk'"]),
        ("sae = 3", ["tables [[sae]]", "3"]),
        ('sae = ["topk"]', ["tables [[sae]]"]),
        ("[sweep]\n" + TOPK, ["unknown sweep", "[train]", "[[sae]]"]),
        ("train = 3\n" + TOPK, ["expected a table [train]", "3"]),
        ("[train]\nepoch = 1\n" + TOPK, ["[train]", "'epoch'", "epochs", "preset", "latents"]),
        ("[train]\nout = 'x'\n" + TOPK, ["[train]", "unknown option 'out'"]),
        ("[train]\nepochs = 1.5\n" + TOPK, ["[train]", "epochs", "whole number", "1.5"]),
        ("[train]\nepochs = true\n" + TOPK, ["epochs", "whole number", "True"]),
        ("[train]\nepochs = '3'\n" + TOPK, ["epochs", "'3'", "without quotes"]),
        ("[train]\nepochs = [1, 2]\n" + TOPK, ["epochs", "whole number", "[1, 2]"]),
        ("[train]\nepochs = 0\n" + TOPK, ["epochs", "from 1 on", "0"]),
        ("[train]\nseed = -1\n" + TOPK, ["seed", "from 0 on", "-1"]),
        ("[train]\nseed = []\n" + TOPK, ["seed", "[]"]),
        ("[train]\nlr = nan\n" + TOPK, ["lr", "positive", "nan"]),
        ("[train]\nlr = true\n" + TOPK, ["lr", "positive", "True"]),
        ("[train]\ntokens = 1979-05-27\n" + TOPK, ["tokens", "whole number"]),
        ("[train]\npreset = 'theirs'\n" + TOPK, ["preset", "default, paper", "theirs"]),
        ("[train]\npreset = ['paper']\n" + TOPK, ["preset", "default, paper"]),
        ("[train]\nsparsity_weight = 3\n" + TOPK, ["sparsity_weight", "none of topk"]),
        ("[train]\nnorm = 'batch'\n" + TOPK, ["norm", "token, scalar, none", "batch"]),
        (TOPK + "[[sae]]\nk = 3", ["number 2", 'sae = "topk"', "none"]),
        ("[[sae]]\nsae = 3", ["number 1", 'sae = "topk"', "3"]),
        ("[[sae]]\nsae = []", ["number 1", "[]"]),
        ("[[sae]]\nsae = 'rutesae'", ["number 1", "'rutesae'", "routesae"]),
        (TOPK + "q = 2", ["number 1 (topk)", "'q'", "layer, latents, k"]),
        (TOPK + "layers = '1-2'", ["(topk)", "takes layer, not layers"]),
        ("[[sae]]\nsae = 'topk'\nk = '32'", ["(topk)", "k takes no text", "'32'"]),
        ("[[sae]]\nsae = 'topk'\nk = [2, '3']", ["k takes no text", "'3'"]),
        ("[[sae]]\nsae = 'topk'\nk = []", ["empty list"]),
        ("[[sae]]\nsae = 'topk'\nk = 2.5", ["k takes a whole number", "2.5"]),
        ("[[sae]]\nsae = 'topk'\nk = {a = 1}", ["k takes a whole number"]),
        (TOPK + "seed = 1.5", ["seed", "whole number", "1.5"]),
        ("[[sae]]\nsae = 'topk'", ["(topk)", "needs k"]),
        ("[[sae]]\nsae = 'topk'\nk = 9\nlatents = 8", ["k=9", "latents=8"]),
        ("[[sae]", ["expected TOML", "line 1"]),
        ("k = 1\nk = 2", ["expected TOML"]),
    ],
)
def test_mistakes_are_named(text: str, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(SweepError) as caught:
        read(tmp_path, text)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "sweep.toml"))
    assert all(word in message for word in words), message


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match="no such file"):
        read_sweep(tmp_path / "no.toml")
    with pytest.raises(SweepError, match="no such file"):
        read_sweep(tmp_path)
    (tmp_path / "latin.toml").write_bytes("# für\n".encode("latin-1") + TOPK.encode())
    with pytest.raises(SweepError, match="expected text in UTF-8"):
        read_sweep(tmp_path / "latin.toml")


@pytest.mark.parametrize("value", ["x", "1.5", "-1", "", "²", True, None])
def test_what_a_seed_is(value: Any) -> None:
    assert OWN_OPTIONS["seed"]("12") == OWN_OPTIONS["seed"](12) == 12
    with pytest.raises(ValueError, match="seed takes a whole number"):
        OWN_OPTIONS["seed"](value)


@pytest.fixture(scope="module")
def store(tiny_model_dir: Path, tiny_corpus: Path, tmp_path_factory: Any) -> Path:
    path = tmp_path_factory.mktemp("sweep") / "s.zarr"
    run(config(tiny_model_dir, tiny_corpus, path, tokens=2000))
    return path


SMALL = """
[train]
latents = 64
batch_tokens = 128
norm = "scalar"

[[sae]]
sae = "routesae"
k = [2, 4]

[[sae]]
sae = "vanilla"
layer = 3
sparsity_weight = 0.1
"""


def test_sweep_and_train_do_the_same(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(SMALL)
    result = routesae("sweep", store, "small.toml")
    assert result.exit_code == 0, result.output
    names = ["routesae_k2_scalar_f64_s42", "routesae_k4_scalar_f64_s42"]
    names.append("vanilla_layer3_l1-0.1_scalar_f64_s42")
    swept = tmp_path / "runs" / "small"
    assert sorted(path.name for path in swept.iterdir()) == names
    assert all(name in result.stdout for name in (*names, "NMSE", "L0", "dead", "done"))
    words = "Training 3 SAEs with 12.8 thousand parameters from layers 1-3: 15 steps of 128 tokens"
    assert words in result.stderr
    assert f"Measure: routesae evaluate {store} runs/small/" in result.stdout
    given = ["--latents", 64, "--batch-tokens", 128, "--norm", "scalar", "--out", "trained"]
    routed, vanilla = "routesae:k=2,4", "vanilla:layer=3,sparsity_weight=0.1"
    trained = routesae("train", store, "--sae", routed, "--sae", vanilla, *given)
    assert trained.exit_code == 0, trained.output
    for name in names:
        mine, theirs = (f / name / "sae.safetensors" for f in (swept, tmp_path / "trained"))
        assert mine.read_bytes() == theirs.read_bytes()
    again = routesae("sweep", store, "small.toml", "--resume")
    assert again.exit_code == 0
    assert "tokens in" not in again.output


def test_mistakes_come_before_any_work(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    (tmp_path / "bad.toml").write_text(SMALL.replace("layer = 3", "layer = 9"))
    refused(routesae("sweep", store, tmp_path / "bad.toml", "--out", out), "[9]", "[1, 2, 3]")
    (tmp_path / "bad.toml").write_text(SMALL + "q = 1")
    words = ("bad.toml", "number 2 (vanilla)", "'q'", "sparsity_weight")
    refused(routesae("sweep", store, tmp_path / "bad.toml", "--out", out), *words)
    (tmp_path / "bad.toml").write_text(SMALL + SMALL.partition("[[sae]]")[2].join(["[[sae]]", ""]))
    refused(routesae("sweep", store, tmp_path / "bad.toml", "--out", out), "asked for twice")
    refused(routesae("sweep", store, tmp_path / "no.toml", "--out", out), "no such file")
    assert not out.exists()


def test_a_failed_run_is_reported(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from routesae_cache.saes.sae import Sae

    original = Sae.forward

    def forward(self: Sae, x_NLD: Any) -> Any:
        output = original(self, x_NLD)
        bad = self.config.coder == "relu"
        return output._replace(loss=output.loss * float("inf")) if bad else output

    monkeypatch.setattr(Sae, "forward", forward)
    (tmp_path / "small.toml").write_text(SMALL)
    result = routesae("sweep", store, tmp_path / "small.toml", "--out", tmp_path / "runs")
    assert result.exit_code == 1
    assert "failed" in result.stdout
    assert "the loss was inf at step 1" in result.stderr
    assert len(list((tmp_path / "runs").glob("*/sae.safetensors"))) == 2


LONG = ["--sae", "routesae", "--sae", "topk:layer=3", "--k", 4, "--latents", 64]
LONG += ["--epochs", 10, "--batch-tokens", 16]


@pytest.fixture(scope="module")
def uninterrupted(store: Path, tmp_path_factory: Any) -> Path:
    out: Path = tmp_path_factory.mktemp("whole")
    result = routesae("train", store, *LONG, "--out", out)
    assert result.exit_code == 0, result.output
    return out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_loses_nothing(
    number: signal.Signals, store: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    arguments = ["train", store, *LONG, "--out", tmp_path]
    command = [sys.executable, "-m", "cli.app", *map(str, arguments)]
    process = subprocess.Popen(
        command, cwd=SWEEPS.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("*/metrics.jsonl"))) < 2 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    while not all(path.stat().st_size for path in tmp_path.glob("*/metrics.jsonl")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert "--resume" in err
    assert "Traceback" not in err
    assert out.count("interrupted") == 2
    assert len(list(tmp_path.glob("*/checkpoint.safetensors"))) == 2
    assert not list(tmp_path.glob("*/sae.safetensors"))
    resumed = routesae(*arguments, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert "of them taken" in resumed.stderr
    for whole in uninterrupted.iterdir():
        cut = tmp_path / whole.name
        assert (cut / "sae.safetensors").read_bytes() == (whole / "sae.safetensors").read_bytes()
        steps = [
            [json.loads(line)["step"] for line in (f / "metrics.jsonl").read_text().splitlines()]
            for f in (whole, cut)
        ]
        assert steps[0] == steps[1]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT as a terminal's programs have it; those in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_the_second_signal_acts_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_signals() as stopped:
        assert not stopped()
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_terminal_shows_a_bar_and_a_line_for_each_sae(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr(training, "err", screen)
    runs = [RunState("one", "training", 5, 0.5, 0.25, 4.0, 0.125), RunState("two", "training")]
    with training._display(lambda: True) as display:
        display.update(TrainProgress(5, 10, 640, runs))
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "50%" in shown
    assert "Stopping after this step" in shown
    assert re.search(r"one\s+training\s+5\s+0\.5000\s+0\.2500\s+4\.0\s+12\.5%", shown)
    assert re.search(r"two\s+training\s+-", shown)
