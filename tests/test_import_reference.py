"""Checkpoints of the RouteSAE authors' code: the imported run computes what they compute."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from routesae_cache.checkpoint import load_run
from routesae_cache.interchange.export import ExportConfig, export_run
from routesae_cache.interchange.reference import (
    ImportConfig,
    ReferenceFileError,
    import_reference,
    read_state_dict,
)
from tests.command_helpers import routesae
from tests.conftest import WIDTH
from tests.pipeline_helpers import config as harvest_config
from tests.pipeline_helpers import run as harvest

LATENTS, K, LAYERS = 48, 4, (1, 2, 3)
StateDict = dict[str, Tensor]


@pytest.fixture(scope="module")
def store(tiny_model_dir: Path, tiny_corpus: Path, tmp_path_factory: Any) -> Path:
    """Layers 1 to 3 of a model with 4 blocks, which is the range of the paper."""
    folder = tmp_path_factory.mktemp("reference")
    return harvest(harvest_config(tiny_model_dir, tiny_corpus, folder / "s.zarr")).path


def random_tensor(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator) / shape[-1] ** 0.5


def state_dict(kind: str) -> StateDict:
    """A state dict as the authors' class of that name has it."""
    if kind == "crosscoder":
        state = {"latent_bias": random_tensor(LATENTS)}
        for i in range(len(LAYERS)):
            state[f"encoder.{i}.weight"] = random_tensor(LATENTS, WIDTH) * (i + 1)
            state[f"decoder.{i}.weight"] = random_tensor(WIDTH, LATENTS) / (i + 1)
        return state
    state = {
        "pre_bias": random_tensor(WIDTH),
        "encoder.weight": random_tensor(LATENTS, WIDTH),
        "decoder.weight": random_tensor(WIDTH, LATENTS),
    }
    biases = ("gate_bias", "mag_bias", "r_mag") if kind == "gated" else ("latent_bias",)
    state |= {name: random_tensor(LATENTS) * (i + 1) for i, name in enumerate(biases)}
    if kind == "jumprelu":
        state["threshold"] = random_tensor(LATENTS).abs()
    if kind == "routesae":
        state = {f"sae.{name}": tensor for name, tensor in state.items()}
        state["router.weight"] = random_tensor(len(LAYERS), WIDTH)
    return state


def topk(value_NF: Tensor) -> Tensor:
    best = value_NF.topk(K)
    return torch.zeros_like(value_NF).scatter(-1, best.indices, best.values)


def coded(kind: str, state: StateDict, x_ND: Tensor) -> Tensor:
    """A single-layer SAE of the paper, from its formulas."""
    product_NF = (x_ND - state["pre_bias"]) @ state["encoder.weight"].T
    if kind == "gated":
        opened_NF = product_NF + state["gate_bias"] > 0
        z_NF = opened_NF * torch.relu(product_NF * state["r_mag"].exp() + state["mag_bias"])
    else:
        pre_NF = product_NF + state["latent_bias"]
        z_NF = {
            "vanilla": lambda: torch.relu(pre_NF),
            "topk": lambda: topk(pre_NF),
            "jumprelu": lambda: pre_NF * (pre_NF > state["threshold"]),
        }[kind]()
    return z_NF @ state["decoder.weight"].T + state["pre_bias"]


def routed(state: StateDict, x_NLD: Tensor, aggregate: str, soft: bool) -> Tensor:
    pooled_ND = x_NLD.sum(1) if aggregate == "sum" else x_NLD.mean(1)
    p_NL = torch.softmax(pooled_ND @ state["router.weight"].T, -1)
    if not soft:
        p_NL = torch.where(p_NL == p_NL.amax(-1, keepdim=True), p_NL, 0.0)
    inner = {name[4:]: tensor for name, tensor in state.items() if name.startswith("sae.")}
    return coded("topk", inner, torch.einsum("nl,nld->nd", p_NL, x_NLD))


def crosscoded(state: StateDict, x_NLD: Tensor) -> Tensor:
    layers = range(len(LAYERS))
    pre_NF = sum(x_NLD[:, i] @ state[f"encoder.{i}.weight"].T for i in layers)
    z_NF = torch.relu(pre_NF + state["latent_bias"])
    return torch.stack([z_NF @ state[f"decoder.{i}.weight"].T for i in layers], dim=1)


def saved(folder: Path, state: Any) -> Path:
    path = folder / "checkpoint.pt"
    torch.save(state, path)
    return path


def imported(folder: Path, store: Path, sae: str, state: Any, **options: Any) -> Path:
    """The run made of a state dict."""
    out = folder / "run"
    config = ImportConfig(file=saved(folder, state), sae=sae, store=store, out=out, options=options)
    import_reference(config)
    return out


def reconstruction(run: Path, x_NLD: Tensor) -> Tensor:
    sae, config = load_run(run)
    return sae.inference(x_NLD[:, [LAYERS.index(l) for l in config.sae.layers]]).reconstruction_MD


@pytest.fixture
def x_NLD() -> Tensor:
    return torch.randn(64, len(LAYERS), WIDTH, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("kind", ["vanilla", "gated", "topk", "jumprelu"])
def test_single_layer_saes(kind: str, store: Path, tmp_path: Path, x_NLD: Tensor) -> None:
    state = state_dict(kind)
    run = imported(tmp_path, store, f"{kind}:k={K}" if kind == "topk" else kind, state)
    assert load_run(run)[1].sae.layers == (3,)  # three quarters up, the paper's
    wanted_ND = coded(kind, state, x_NLD[:, 2])
    torch.testing.assert_close(reconstruction(run, x_NLD), wanted_ND, atol=1e-5, rtol=1e-5)


def test_another_layer(store: Path, tmp_path: Path, x_NLD: Tensor) -> None:
    state = state_dict("topk")
    run = imported(tmp_path, store, "topk", state, k=K, layer="1")
    wanted_ND = coded("topk", state, x_NLD[:, 0])
    torch.testing.assert_close(reconstruction(run, x_NLD), wanted_ND, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("aggregate", ["sum", "mean"])
@pytest.mark.parametrize("soft", [False, True])
def test_routesae(soft: bool, aggregate: str, store: Path, tmp_path: Path, x_NLD: Tensor) -> None:
    state = state_dict("routesae")
    options = {"k": K, "aggregate": aggregate} | ({"hard": False} if soft else {})
    run = imported(tmp_path, store, "routesae", state, **options)
    wanted_ND = routed(state, x_NLD, aggregate, soft)
    torch.testing.assert_close(reconstruction(run, x_NLD), wanted_ND, atol=1e-5, rtol=1e-5)


def test_crosscoder(store: Path, tmp_path: Path, x_NLD: Tensor) -> None:
    state = state_dict("crosscoder")
    run = imported(tmp_path, store, "crosscoder", state)
    wanted_MD = crosscoded(state, x_NLD).flatten(0, 1)
    torch.testing.assert_close(reconstruction(run, x_NLD), wanted_MD, atol=1e-5, rtol=1e-5)


def test_one_coder_on_every_layer(store: Path, tmp_path: Path, x_NLD: Tensor) -> None:
    state = state_dict("topk")
    run = imported(tmp_path, store, "mlsae", state, k=K)
    wanted_MD = coded("topk", state, x_NLD.flatten(0, 1))
    torch.testing.assert_close(reconstruction(run, x_NLD), wanted_MD, atol=1e-5, rtol=1e-5)


def test_what_the_run_records(store: Path, tmp_path: Path) -> None:
    run = imported(tmp_path, store, "routesae", state_dict("routesae"), k=K)
    assert sorted(path.name for path in run.iterdir()) == ["config.json", "sae.safetensors"]
    record = json.loads((run / "config.json").read_text())
    assert (record["name"], record["width"], record["total_steps"]) == ("run", WIDTH, 0)
    sae = record["sae"]
    assert (sae["norm"], sae["route_estimator"], sae["auxk"]) == ("token", "factor", 0)
    assert (sae["layers"], sae["latents"], sae["k"]) == ([1, 2, 3], LATENTS, K)
    assert record["mean_square"] > 0
    assert record["store_spec"]["model"]["name"] == "tiny-llama"


def test_half_precision_is_widened(store: Path, tmp_path: Path) -> None:
    state = {name: tensor.bfloat16() for name, tensor in state_dict("topk").items()}
    run = imported(tmp_path, store, "topk", state, k=K)
    weights = load_file(run / "sae.safetensors")
    assert torch.equal(weights["coder.encoder"], state["encoder.weight"].float())


def test_imported_weights_come_out_of_an_export(store: Path, tmp_path: Path) -> None:
    state = state_dict("topk")
    run = imported(tmp_path, store, "topk", state, k=K)
    export_run(run, ExportConfig(format="saelens", out=tmp_path / "out"))
    exported = load_file(tmp_path / "out" / "sae_weights.safetensors")
    assert torch.equal(exported["W_enc"], state["encoder.weight"].T)
    assert torch.equal(exported["W_dec"], state["decoder.weight"].T)
    assert torch.equal(exported["b_dec"], state["pre_bias"])
    assert torch.equal(exported["b_enc"], state["latent_bias"])


def without(name: str) -> Callable[[StateDict], StateDict]:
    return lambda state: {key: tensor for key, tensor in state.items() if key != name}


@pytest.mark.parametrize(
    ("sae", "kind", "change", "words"),
    [
        ("topk:k=4", "topk", without("pre_bias"), ["pre_bias is missing"]),
        ("topk:k=4", "jumprelu", dict, ["threshold is not known"]),
        ("jumprelu", "topk", dict, ["threshold is missing"]),
        ("topk:k=4", "routesae", dict, ["encoder.weight is missing", "router.weight is not known"]),
        ("routesae:k=4", "topk", dict, ["router.weight is missing", "sae.pre_bias is missing"]),
        ("crosscoder", "crosscoder", without("decoder.1.weight"), ["decoder.1.weight is missing"]),
        ("crosscoder", "topk", dict, ["encoder.0.weight is missing"]),
        ("topk", "topk", dict, ["needs k"]),
        ("vanilla:k=4", "vanilla", dict, ["k does not apply to vanilla"]),
        ("topk:k=4,8", "topk", dict, ["2 SAEs"]),
        ("topk:k=4,layer=9", "topk", dict, ["[9]", "[1, 2, 3]"]),
        ("batchtopk:k=4", "topk", dict, ["relu, gated, topk, jumprelu", "batchtopk"]),
        ("sparsenet", "topk", dict, ["sparsenet", "routesae"]),
        (
            "routesae:k=4,layers=1-2",
            "routesae",
            dict,
            ["router.weight: expected (2, 32), found (3, 32)", "--layers"],
        ),
        (
            "crosscoder:layers=1-2",
            "crosscoder",
            dict,
            ["encoder.2.weight: expected no such layer, found (48, 32)"],
        ),
        (
            "topk:k=4",
            "topk",
            lambda state: state | {"encoder.weight": state["encoder.weight"].T},
            ["encoder.weight: expected (48, 32), found (32, 48)"],
        ),
        (
            "topk:k=4",
            "topk",
            lambda state: state | {"latent_bias": state["latent_bias"][:40]},
            ["encoder.weight: expected (40, 32), found (48, 32)"],
        ),
    ],
)
def test_what_does_not_fit(
    sae: str, kind: str, change: Any, words: list[str], store: Path, tmp_path: Path
) -> None:
    pattern = "".join(f"(?=.*{re.escape(word)})" for word in words)
    with pytest.raises(ValueError, match=pattern):
        imported(tmp_path, store, sae, change(state_dict(kind)))
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".pt"] == []


class Loud:
    """An object that would do something when unpickled."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("loud"),)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.ones(2)], "found list"),
        ({"encoder.weight": 3}, "others: encoder.weight"),
        ({"encoder.weight": torch.ones(2, dtype=torch.int64)}, "others: encoder.weight"),
        ({"model": {"encoder.weight": torch.ones(2)}}, "others: model"),
        ({"encoder.weight": Loud()}, "tensors and nothing else"),
    ],
)
def test_files_that_are_no_state_dicts(
    content: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ReferenceFileError, match=words):
        read_state_dict(saved(tmp_path, content))
    assert not Path("loud").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_files(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save(state_dict("topk"), path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    assert read_state_dict(path).keys() == state_dict("topk").keys()
    lengths = {0, 1, 7, len(whole) // 3, len(whole) // 2, len(whole) - 9}
    for part in (*(whole[:length] for length in lengths), b"no checkpoint", whole[5:]):
        path.write_bytes(part)
        with pytest.raises(ReferenceFileError, match="damaged"):
            read_state_dict(path)


def test_the_command_makes_what_evaluate_accepts(store: Path, tmp_path: Path) -> None:
    file = saved(tmp_path, state_dict("routesae"))
    out = tmp_path / "runs" / "authors"
    command = ["import-reference", file, "--sae", "routesae", "--store", store, "--out", out]
    result = routesae(*command, "--k", K)
    assert result.exit_code == 0, result.output
    assert "layers 1-3" in result.stdout
    result = routesae("evaluate", store, out, "--json", tmp_path / "e.json")
    assert result.exit_code == 0, result.output
    (record,) = json.loads((tmp_path / "e.json").read_text())["results"]
    assert (record["name"], record["l0"]) == ("authors", K)
    again = routesae(*command, "--k", K)
    assert again.exit_code == 2
    assert "there already" in " ".join(again.stderr.split())


def test_the_command_refuses(store: Path, tmp_path: Path) -> None:
    file = saved(tmp_path, state_dict("topk"))
    options = ("--store", store, "--out", tmp_path / "run", "--sae")
    for arguments, word in (
        ((file, *options, "topk"), "needs k"),
        ((tmp_path / "no.pt", *options, "topk"), "no.pt"),
        ((file, *options, "gated"), "gate_bias is missing"),
        ((file, *options, "vanilla", "--k", 4), "does not apply"),
    ):
        result = routesae("import-reference", *arguments)
        assert result.exit_code == 2, result.output
        assert word in " ".join(result.stderr.split())
        assert "Traceback" not in result.output
    assert not (tmp_path / "run").exists()
