"""Exports: what the other libraries would compute from them is what the run computes."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from cli.app import app
from routesae_cache.checkpoint import RunError, load_run
from routesae_cache.interchange.export import ExportConfig, ExportError, ExportResult, export_run
from routesae_cache.interchange.formats import FORMATS
from routesae_cache.interchange.verify import TOLERANCE
from routesae_cache.json_files import read_json, write_json
from routesae_cache.losses import denormalise_token, normalise_token
from routesae_cache.saes.config import SaeConfig
from routesae_cache.saes.sae import Sae
from routesae_cache.train import train
from routesae_cache.train_plan import TrainConfig
from tests import interchange_helpers as theirs
from tests.interchange_helpers import LATENTS, MEAN_SQUARE, WIDTH, make_run, sae_config
from tests.pipeline_helpers import config as harvest_config
from tests.pipeline_helpers import run as harvest

CODERS = ("relu", "gated", "topk", "batchtopk", "jumprelu", "matryoshka")


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other libraries, as far as verifying goes."""
    for name, load in (("saelens", theirs.saelens), ("sparsify", theirs.sparsify)):
        installed = dataclasses.replace(FORMATS[name], load=load, module="json")
        monkeypatch.setitem(FORMATS, name, installed)


def export(run: Path, out: Path, name: str = "saelens", **options: Any) -> ExportResult:
    return export_run(run, ExportConfig(format=name, out=out, **options))


def residuals(count: int, seed: int = 0) -> Tensor:
    """Means, sizes and an outlier channel as models have them."""
    generator = torch.Generator().manual_seed(seed)
    x_ND = 12 * torch.randn(count, WIDTH, generator=generator) + 3
    x_ND[:, 5] *= 20
    return x_ND


def own(run: Path, x_ND: Tensor) -> Tensor:
    """The run's reconstruction of one layer's residuals, in the model's scale, in float64."""
    sae, config = load_run(run)
    sae = sae.double()
    x_ND = x_ND.double()
    if config.sae.norm == "token":
        n_ND, mean_N1, std_N1 = normalise_token(x_ND)
    else:
        factor = MEAN_SQUARE**0.5 if config.sae.norm == "scalar" else 1.0
        n_ND, mean_N1, std_N1 = x_ND / factor, torch.zeros(1), torch.full((1,), factor)
    latents = sae.coder.active(n_ND)
    return denormalise_token(sae.coder.decode(latents), mean_N1, std_N1).detach()


def assert_close(found_ND: Tensor, wanted_ND: Tensor, x_ND: Tensor) -> None:
    assert ((found_ND - wanted_ND).abs() / x_ND.double().std(-1, keepdim=True)).max() < 1e-5


@pytest.mark.parametrize("norm", ["token", "scalar", "none"])
@pytest.mark.parametrize("coder", CODERS)
def test_saelens_computes_what_the_run_does(coder: str, norm: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", sae_config(coder, norm=norm))
    export(run, tmp_path / "out")
    x_ND = residuals(200)
    wanted_ND = own(run, x_ND)
    assert (wanted_ND - x_ND).std() > 1  # it is no identity
    assert_close(theirs.saelens(tmp_path / "out")(x_ND), wanted_ND, x_ND)


@pytest.mark.parametrize("norm", ["scalar", "none"])
def test_sparsify_computes_what_the_run_does(norm: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", sae_config("topk", norm=norm))
    export(run, tmp_path / "out", "sparsify")
    x_ND = residuals(200)
    assert_close(theirs.sparsify(tmp_path / "out")(x_ND), own(run, x_ND), x_ND)


@pytest.mark.parametrize(
    ("coder", "architecture", "names"),
    [
        ("relu", "standard", {"b_enc"}),
        ("gated", "gated", {"b_gate", "b_mag", "r_mag"}),
        ("topk", "topk", {"b_enc"}),
        ("jumprelu", "jumprelu", {"b_enc", "threshold"}),
        ("batchtopk", "jumprelu", {"b_enc", "threshold"}),
        ("matryoshka", "jumprelu", {"b_enc", "threshold"}),
    ],
)
def test_saelens_directory(coder: str, architecture: str, names: set[str], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", sae_config(coder))
    export(run, tmp_path / "out", model="meta/tiny")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"cfg.json", "sae_weights.safetensors", "README.md"}
    tensors = load_file(tmp_path / "out" / "sae_weights.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    shared = {"W_enc": (WIDTH, LATENTS), "W_dec": (LATENTS, WIDTH), "b_dec": (WIDTH,)}
    assert shapes == shared | dict.fromkeys(names, (LATENTS,))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    config = json.loads((tmp_path / "out" / "cfg.json").read_text())
    metadata = config.pop("metadata")
    expected = {
        "architecture": architecture,
        "d_in": WIDTH,
        "d_sae": LATENTS,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "layer_norm",
        "reshape_activations": "none",
    }
    topk = {"k": 8, "rescale_acts_by_decoder_norm": False} if coder == "topk" else {}
    assert config == expected | topk
    assert metadata == {
        "sae_lens_version": "6.0.0",
        "sae_lens_training_version": None,
        "model_name": "meta/tiny",
        "hook_name": "blocks.2.hook_resid_post",
        "hook_head_index": None,
        "context_size": 128,
        "prepend_bos": True,
        "dataset_path": "letters",
        "run": "run",
    }


def test_unscaled_weights_are_the_runs_own(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", sae_config("topk"))
    export(run, tmp_path / "out")
    ours = load_file(run / "sae.safetensors")
    tensors = load_file(tmp_path / "out" / "sae_weights.safetensors")
    assert torch.equal(tensors["W_enc"], ours["coder.encoder"].T)
    assert torch.equal(tensors["W_dec"], ours["coder.decoder"])
    assert torch.equal(tensors["b_dec"], ours["coder.pre_bias"])
    assert torch.equal(tensors["b_enc"], ours["coder.latent_bias"])


def test_sparsify_directory(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", sae_config("topk", norm="scalar"))
    export(run, tmp_path / "out", "sparsify")
    with safe_open(tmp_path / "out" / "sae.safetensors", framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert shapes == {
        "encoder.weight": (LATENTS, WIDTH),
        "encoder.bias": (LATENTS,),
        "W_dec": (LATENTS, WIDTH),
        "b_dec": (WIDTH,),
    }
    assert json.loads((tmp_path / "out" / "cfg.json").read_text()) == {
        "activation": "topk",
        "expansion_factor": 3,
        "normalize_decoder": False,
        "num_latents": LATENTS,
        "k": 8,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": WIDTH,
    }


def test_a_folded_factor_leaves_latents_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", sae_config("relu", norm="scalar"))
    export(run, tmp_path / "out")
    p = load_file(tmp_path / "out" / "sae_weights.safetensors")
    x_ND = residuals(50)
    found_NF = torch.relu((x_ND - p["b_dec"]) @ p["W_enc"] + p["b_enc"])
    sae, _ = load_run(run)
    wanted_NF = sae.coder.candidates(x_ND / MEAN_SQUARE**0.5).detach()
    assert (wanted_NF > 0).any()
    torch.testing.assert_close(found_NF, wanted_NF, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("selector", ["route", "random", "every"])
def test_a_shared_coder_is_exported_for_each_layer(selector: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", sae_config("jumprelu", selector))
    result = export(run, tmp_path / "out")
    assert result.layers == (0, 2, 5)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"layer_0", "layer_2", "layer_5", "README.md"}
    hooks, weights, x_ND = [], set(), residuals(50)
    for layer in result.layers:
        folder = tmp_path / "out" / f"layer_{layer}"
        hooks.append(json.loads((folder / "cfg.json").read_text())["metadata"]["hook_name"])
        weights.add((folder / "sae_weights.safetensors").read_bytes())
        assert_close(theirs.saelens(folder)(x_ND), own(run, x_ND), x_ND)
    assert hooks == [
        "blocks.0.hook_resid_pre",
        "blocks.1.hook_resid_post",
        "blocks.4.hook_resid_post",
    ]
    assert len(weights) == 1
    page = (tmp_path / "out" / "README.md").read_text()
    assert "| 2 (after block 1) | `blocks.1.hook_resid_post` | `layer_2` |" in page
    assert "| 0 (embedding) | `blocks.0.hook_resid_pre` | `layer_0` |" in page
    assert ("**Which layer.**" in page) == (selector != "every")


def halve_negative(sae: Sae) -> None:
    sae.coder.state_dict()["threshold"][: LATENTS // 2] = -0.1


@pytest.mark.parametrize(
    ("sae", "present", "absent"),
    [
        (sae_config("topk"), ["Epsilon", "Latents below 0"], ["factor", "Which layer"]),
        (sae_config("topk", "route"), ["router's factor", "Which layer"], ["Thresholds"]),
        (
            sae_config("relu", "route", route_estimator="straight-through"),
            ["Which layer"],
            ["factor", "below 0"],
        ),
        (sae_config("jumprelu"), ["48 of 96 thresholds are below 0"], ["Latents below 0"]),
        (sae_config("topk", encode_dtype="bfloat16"), ["Selection in bfloat16"], []),
        (sae_config("gated", norm="scalar"), ["Nothing but rounding", "sqrt(150)"], ["Epsilon"]),
    ],
)
def test_the_readme_says_what_is_lost(
    sae: SaeConfig, present: list[str], absent: list[str], tmp_path: Path
) -> None:
    change = halve_negative if sae.coder == "jumprelu" else lambda _: None
    result = export(make_run(tmp_path / "run", sae, change), tmp_path / "out")
    page = (tmp_path / "out" / "README.md").read_text()
    assert all(words in page for words in present), page
    assert not any(words in page for words in absent), page
    assert all(limit in page for limit in result.limits)
    assert "## Measured" not in page


@pytest.mark.parametrize(
    ("sae", "name", "words"),
    [
        (sae_config("relu", "all"), "saelens", ["crosscoder", "3 layers at once"]),
        (sae_config("topk", "route", hard=False), "saelens", ["softly", "hard routing"]),
        (sae_config("topk"), "sparsify", ["--norm token", "--norm scalar", "cannot be folded"]),
        (sae_config("relu", norm="none"), "sparsify", ["TopK alone", "relu"]),
        (sae_config("batchtopk", norm="none"), "sparsify", ["TopK alone", "batchtopk"]),
        (sae_config("topk"), "dictionary", ["'dictionary'", "saelens, sparsify"]),
    ],
)
def test_what_cannot_be_exported(
    sae: SaeConfig, name: str, words: list[str], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", sae)
    pattern = "".join(f"(?=.*{re.escape(word)})" for word in words)
    with pytest.raises(ValueError, match=pattern):
        export(run, tmp_path / "out", name)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_refusals_leave_things_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", sae_config("topk"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="there already"):
        export(run, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    missing = dataclasses.replace(FORMATS["saelens"], module="no_such_module")
    monkeypatch.setitem(FORMATS, "saelens", missing)
    with pytest.raises(ExportError, match="pip install sae-lens"):
        export(run, tmp_path / "out", verify=True)
    with pytest.raises(ValueError, match="add --verify"):
        export(run, tmp_path / "out", store=tmp_path)
    with pytest.raises(ValueError, match="at least 1"):
        export(run, tmp_path / "out", tokens=0)
    with pytest.raises(RunError, match="expected a run"):
        export(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_export_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", sae_config("topk"))

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(FORMATS, "saelens", dataclasses.replace(FORMATS["saelens"], write=stop))
    with pytest.raises(KeyboardInterrupt):
        export(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("selector", ["fixed", "every", "random"])
@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.usefixtures("peers")
def test_verifying_finds_only_rounding(coder: str, selector: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", sae_config(coder, selector))
    result = export(run, tmp_path / "out", verify=True, tokens=200)
    assert result.ok
    assert result.origin == "made-up residuals"
    layers = 1 if selector == "fixed" else 3
    assert [d.layer for d in result.differences] == list(result.layers)
    read = sum(d.read.count for d in result.differences)
    assert read == (200 if selector == "random" else 200 * layers)
    for d in result.differences:
        assert d.compared == 200
        assert d.exact_count > 150
        assert d.exact is not None
        assert 0 < d.exact < TOLERANCE / 3  # the reference is float64, so it is not 0
        assert d.read.nmse_run == pytest.approx(d.read.nmse_export, abs=1e-3)
    page = (tmp_path / "out" / "README.md").read_text()
    assert f"{result.differences[0].exact_count} of 200" in page
    assert "## Measured\n\nOn made-up residuals" in page


@pytest.mark.usefixtures("peers")
def test_verifying_sparsify(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", sae_config("topk", norm="scalar"))
    result = export(run, tmp_path / "out", "sparsify", verify=True)
    assert result.ok
    assert result.differences[0].read.largest is not None
    assert result.differences[0].read.largest < TOLERANCE


@pytest.mark.parametrize("coder", CODERS)
def test_verifying_finds_wrong_weights(
    coder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(folder: Path) -> Callable[[Tensor], Tensor]:
        reconstruct = theirs.saelens(folder)
        return lambda x_ND: reconstruct(x_ND) * 1.001

    changed = dataclasses.replace(FORMATS["saelens"], load=damaged, module="json")
    monkeypatch.setitem(FORMATS, "saelens", changed)
    run = make_run(tmp_path / "run", sae_config(coder))
    result = export(run, tmp_path / "out", verify=True)
    assert not result.ok
    assert result.differences[0].exact_count > 0


@pytest.mark.usefixtures("peers")
def test_what_is_touched_is_counted_and_measured(tmp_path: Path) -> None:
    def low(sae: Sae) -> None:
        sae.coder.state_dict()["latent_bias"].sub_(0.5)

    many = sae_config("topk", k=20)
    (d,) = export(make_run(tmp_path / "a", many, low), tmp_path / "b", verify=True).differences
    assert d.touched["a latent below 0"] > 100
    assert d.exact_count >= 1024 - sum(d.touched.values())
    assert d.ok
    assert d.read.largest is not None
    assert d.read.largest > 100 * TOLERANCE

    negative = make_run(tmp_path / "c", sae_config("jumprelu"), halve_negative)
    result = export(negative, tmp_path / "d", verify=True)
    assert result.differences[0].touched["a latent below 0"] > 900
    assert result.ok
    assert result.differences[0].read.largest is not None
    assert result.differences[0].read.largest > 100 * TOLERANCE


@pytest.mark.usefixtures("peers")
def test_choices_that_hang_on_rounding_are_counted(tmp_path: Path) -> None:
    def tie(sae: Sae) -> None:
        """Every latent has a twin, so that k odd cuts a pair in two."""
        for name in ("encoder", "decoder", "latent_bias"):
            tensor = sae.coder.state_dict()[name]
            tensor[1::2] = tensor[::2]

    run = make_run(tmp_path / "a", sae_config("topk", k=7), tie)
    (d,) = export(run, tmp_path / "b", verify=True).differences
    assert d.touched["a choice within rounding"] == 1024
    assert (d.exact, d.predicted, d.ok) == (None, None, False)

    def at_threshold(sae: Sae) -> None:
        """Some latents are constant, and sit where they jump."""
        state = sae.coder.state_dict()
        state["encoder"][:3] = 0
        state["latent_bias"][:3] = state["threshold"].expand(LATENTS)[:3]

    for coder in ("jumprelu", "batchtopk"):
        run = make_run(tmp_path / coder, sae_config(coder), at_threshold)
        (d,) = export(run, tmp_path / f"{coder}-out", verify=True).differences
        assert d.touched["a choice within rounding"] == 1024

    def at_gate(sae: Sae) -> None:
        state = sae.coder.state_dict()
        state["encoder"][:3] = 0
        state["gate_bias"][:3] = 0
        state["mag_bias"][:3] = 1

    run = make_run(tmp_path / "gated", sae_config("gated"), at_gate)
    (d,) = export(run, tmp_path / "gated-out", verify=True).differences
    assert d.touched["a choice within rounding"] == 1024


@pytest.mark.usefixtures("peers")
def test_the_routers_factor_is_measured_apart(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", sae_config("topk", "route"))
    result = export(run, tmp_path / "out", verify=True)
    assert result.ok
    assert sum(d.read.count for d in result.differences) == 1024
    for d in result.differences:
        if d.read.count:
            assert d.read.gate is not None
            assert 1 / 3 < d.read.gate < 1
            assert d.read.largest is not None
            assert d.read.largest > 100 * TOLERANCE


@pytest.mark.usefixtures("peers")
def test_epsilon_is_measured_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Residuals so small that 1e-5 counts."""
    run = make_run(tmp_path / "run", sae_config("relu"))
    write_json(run / "config.json", read_json(run / "config.json") | {"mean_square": 1e-6})
    (d,) = export(run, tmp_path / "out", verify=True).differences
    assert d.ok
    assert d.read.largest is not None
    assert d.read.largest > 10 * TOLERANCE


@pytest.fixture(scope="module")
def trained(tiny_model_dir: Path, tiny_corpus: Path, tmp_path_factory: Any) -> tuple[Path, Path]:
    """A store and a routed run trained from it."""
    folder = tmp_path_factory.mktemp("interchange")
    reader = harvest(harvest_config(tiny_model_dir, tiny_corpus, folder / "s.zarr"))
    sae = SaeConfig(selector="route", coder="topk", layers=(1, 2, 3), latents=64, k=4)
    result = train(reader, [(sae, 3)], TrainConfig(out=folder / "runs", batch_tokens=64))
    return reader.path, result.folders[0]


@pytest.mark.usefixtures("peers")
def test_verifying_on_the_runs_own_store(trained: tuple[Path, Path], tmp_path: Path) -> None:
    store, run = trained
    result = export(run, tmp_path / "out", verify=True)
    assert result.ok
    assert result.origin == f"the eval split of {store.name}"
    metadata = json.loads((tmp_path / "out" / "layer_2" / "cfg.json").read_text())["metadata"]
    assert (metadata["model_name"], metadata["context_size"]) == ("tiny-llama", 16)
    assert (metadata["dataset_path"], metadata["prepend_bos"]) == ("tiny.jsonl", True)
    other = make_run(tmp_path / "other", sae_config("topk"))
    with pytest.raises(ValueError, match="another model"):
        export(other, tmp_path / "no", verify=True, store=store)


@pytest.mark.usefixtures("peers")
def test_export_command(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def routesae(*arguments: object) -> Any:
        return CliRunner().invoke(app, ["export", *(str(argument) for argument in arguments)])

    store, run = trained
    plain = ("--format", "saelens", "--out")
    result = routesae(run, *plain, tmp_path / "a")
    assert result.exit_code == 0, result.output
    assert "3 layers" in result.stdout
    assert "README.md" in " ".join(result.stdout.split())
    result = routesae(run, *plain, tmp_path / "b", "--verify", "--store", store)
    assert result.exit_code == 0, result.output
    assert "layer 2 (after block 1)" in result.stdout
    result = routesae(run, *plain, tmp_path / "b")
    assert result.exit_code == 2
    assert "there already" in " ".join(result.stderr.split())
    result = routesae(run, "--format", "sparsify", "--out", tmp_path / "c")
    assert result.exit_code == 2
    assert "--norm scalar" in " ".join(result.stderr.split())
    wrong = dataclasses.replace(FORMATS["saelens"], load=lambda _: lambda x_ND: 0 * x_ND)
    monkeypatch.setitem(FORMATS, "saelens", wrong)
    result = routesae(run, *plain, tmp_path / "d", "--verify")
    assert result.exit_code == 1
    assert "above 0.0001 at layer 1 (after block 0)" in " ".join(result.stderr.split())
