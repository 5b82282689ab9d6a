"""Residual streams against transformers' own hidden states; loading, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import errors
from torch import Tensor, nn

from routesae_cache import lm as lm_module
from routesae_cache.lm import (
    LanguageModel,
    ModelError,
    ModelIdentity,
    ModelShape,
    load_lm,
    model_shape,
    quiet,
    resolve_model,
)
from tests.conftest import ARCHITECTURES, BLOCKS, VOCAB, WIDTH

IDENTITY = ModelIdentity(name="tiny", revision=None, config_hash="", weights="", dtype="float32")


@pytest.fixture(params=ARCHITECTURES, scope="module")
def lm(request: pytest.FixtureRequest, tiny_model: Callable[..., Any]) -> LanguageModel:
    return LanguageModel(tiny_model(request.param), IDENTITY)


@pytest.fixture(scope="module")
def ids_RT() -> Tensor:
    return torch.randint(VOCAB, (3, 17), generator=torch.Generator().manual_seed(1))


def final_norm(lm: LanguageModel) -> nn.Module:
    decoder = lm.model.get_decoder()
    (norm,) = (
        getattr(decoder, name)
        for name in ("norm", "ln_f", "final_layer_norm")
        if hasattr(decoder, name)
    )
    assert isinstance(norm, nn.Module)
    return norm


def hooks(lm: LanguageModel) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in lm.model.modules()
    )


def test_residuals_are_the_hidden_states(lm: LanguageModel, ids_RT: Tensor) -> None:
    before = hooks(lm)
    residuals = lm.residuals(ids_RT.int(), range(BLOCKS + 1))
    assert hooks(lm) == before
    with torch.inference_mode():
        expected = lm.model(ids_RT, output_hidden_states=True).hidden_states
        last_RTD = final_norm(lm)(residuals[-1])
    assert len(residuals) == len(expected) == BLOCKS + 1
    for residual_RTD, hidden_RTD in zip([*residuals[:-1], last_RTD], expected, strict=True):
        torch.testing.assert_close(residual_RTD, hidden_RTD, rtol=0, atol=1e-6)
    assert (residuals[-1] - expected[-1]).abs().max() > 0.1


def test_layers_come_in_the_order_asked(lm: LanguageModel, ids_RT: Tensor) -> None:
    every = lm.residuals(ids_RT, range(BLOCKS + 1))
    asked = [3, 0, 2, 3]
    for layer, residual_RTD in zip(asked, lm.residuals(ids_RT, asked), strict=True):
        assert torch.equal(residual_RTD, every[layer])


@pytest.mark.parametrize("deepest", range(BLOCKS + 1))
def test_nothing_runs_after_the_deepest_layer(
    lm: LanguageModel, ids_RT: Tensor, deepest: int
) -> None:
    ran: list[str] = []
    watched = {f"block {i}": block for i, block in enumerate(lm.blocks)}
    watched |= {"norm": final_norm(lm), "head": lm.model.get_output_embeddings()}
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
        for name, module in watched.items()
    ]
    lm.residuals(ids_RT, [0, deepest])
    assert ran == [f"block {i}" for i in range(max(deepest, 1))]
    ran.clear()
    lm.logits(ids_RT)  # the next pass is a whole one
    assert ran == list(watched)
    for handle in handles:
        handle.remove()


def test_a_block_that_returns_a_tuple(lm: LanguageModel, ids_RT: Tensor) -> None:
    expected_RTD = lm.residuals(ids_RT, [BLOCKS])[0]

    def into_tuple(_: nn.Module, __: Any, output: Tensor) -> tuple[Tensor, None]:
        return output, None

    handle = lm.blocks[-1].register_forward_hook(into_tuple)
    assert torch.equal(lm.residuals(ids_RT, [BLOCKS])[0], expected_RTD)
    handle.remove()


def test_hooks_are_gone_after_an_error(lm: LanguageModel, ids_RT: Tensor) -> None:
    before = hooks(lm)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    handle = lm.blocks[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        lm.residuals(ids_RT, [0, 1, 4])
    handle.remove()
    assert hooks(lm) == before


@pytest.mark.parametrize("layers", [[-1], [0, BLOCKS + 1]])
def test_layers_beyond_the_model(lm: LanguageModel, ids_RT: Tensor, layers: list[int]) -> None:
    with pytest.raises(ValueError, match=f"layers 0-{BLOCKS}"):
        lm.residuals(ids_RT, layers)


def test_padding_at_the_end_changes_nothing_before_it(lm: LanguageModel, ids_RT: Tensor) -> None:
    padded_RT = ids_RT.clone()
    padded_RT[:, 9:] = 0
    for a_RTD, b_RTD in zip(
        lm.residuals(ids_RT, [1, BLOCKS]), lm.residuals(padded_RT, [1, BLOCKS]), strict=True
    ):
        torch.testing.assert_close(a_RTD[:, :9], b_RTD[:, :9], rtol=0, atol=1e-5)
        assert not torch.allclose(a_RTD[:, 9:], b_RTD[:, 9:], atol=1e-2)


def test_logits(lm: LanguageModel, ids_RT: Tensor) -> None:
    logits_RTV = lm.logits(ids_RT)
    assert logits_RTV.shape == (3, 17, VOCAB)
    with torch.inference_mode():
        last_RTD = final_norm(lm)(lm.residuals(ids_RT, [BLOCKS])[0])
        expected_RTV = lm.model.get_output_embeddings()(last_RTD)
    torch.testing.assert_close(logits_RTV, expected_RTV, rtol=0, atol=1e-5)


def test_sizes(lm: LanguageModel) -> None:
    assert lm.shape == ModelShape(n_layers=BLOCKS, width=WIDTH, vocab_size=VOCAB, context_limit=128)
    assert len(lm.blocks) == lm.n_layers


def test_loading_a_folder(tiny_model_dir: Path, tiny_model: Any, ids_RT: Tensor) -> None:
    lm = load_lm(str(tiny_model_dir), dtype="float32", attention="eager")
    expected = LanguageModel(tiny_model("llama"), IDENTITY)
    torch.testing.assert_close(lm.logits(ids_RT), expected.logits(ids_RT), rtol=0, atol=1e-5)
    assert lm.identity.name == "tiny-llama"
    assert lm.identity.revision is None
    assert lm.model.config._attn_implementation == "eager"
    assert not lm.model.training
    assert model_shape(resolve_model(str(tiny_model_dir))) == lm.shape


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_residuals_have_the_type_asked_for(dtype: Any, tiny_model_dir: Path) -> None:
    lm = load_lm(str(tiny_model_dir), dtype=dtype)
    assert lm.dtype == lm.residuals(torch.zeros(1, 3), [2])[0].dtype == getattr(torch, dtype)
    assert lm.identity.dtype == dtype


def test_the_same_folder_is_the_same_model(tiny_model_dir: Path) -> None:
    first, second = (load_lm(str(tiny_model_dir)).identity for _ in range(2))
    assert first == second
    assert ModelIdentity.from_dict(json.loads(json.dumps(first.to_dict()))) == first


def test_damaged_and_missing_weights(tiny_model: Any, tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": BLOCKS + 1}))
    with pytest.raises(ModelError, match=rf"missing or of another shape: model\.layers\.{BLOCKS}"):
        load_lm(str(tmp_path))

    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": VOCAB + 1}))
    with pytest.raises(ModelError, match=r"embed_tokens\.weight"):
        load_lm(str(tmp_path))

    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ModelError, match=r"are damaged .*remove or replace"):
        load_lm(str(tmp_path))


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    transformers.T5Config(num_layers=1, d_model=8).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"encoder-decoder model \(t5\)"):
        load_lm(str(tmp_path))
    with pytest.raises(ModelError, match="encoder-decoder"):
        model_shape(resolve_model(str(tmp_path)))


def test_a_model_that_sees_what_is_to_come_is_refused(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        initializer_range=0.2,
    )
    with quiet():
        transformers.BertLMHeadModel(config).save_pretrained(tmp_path)
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(ModelError, match="lets a token see those after it"):
            load_lm(str(tmp_path), dtype=dtype)


def test_quiet_puts_things_back() -> None:
    log = transformers.utils.logging
    before = log.get_verbosity(), log.is_progress_bar_enabled()
    with quiet():
        assert not log.is_progress_bar_enabled()
    assert (log.get_verbosity(), log.is_progress_bar_enabled()) == before


def answer(status: int) -> Any:
    return SimpleNamespace(headers={}, status_code=status, request=None)


@pytest.fixture
def on_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub says of every model that it is there."""
    monkeypatch.setattr("routesae_cache.sources.current_commit", lambda *_: "c0ffee")


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (errors.LocalEntryNotFoundError("not downloaded"), "could not be reached"),
        (errors.GatedRepoError("", response=answer(403)), "accept its licence"),
        (errors.RepositoryNotFoundError("", response=answer(404)), "the hub has no model"),
    ],
)
@pytest.mark.usefixtures("on_hub")
def test_the_hubs_failures_while_loading(
    failure: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        try:
            raise failure
        except Exception as error:  # as transformers wraps them
            raise OSError("cannot load it") from error

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    monkeypatch.setattr(transformers.PreTrainedConfig, "get_config_dict", lambda **_: ({}, {}))
    with pytest.raises(ModelError, match=message):
        load_lm("owner/model")
    with pytest.raises(ModelError, match=message):
        model_shape(resolve_model("llama-3.2-1b"))


def test_a_hub_out_of_reach_and_nothing_downloaded() -> None:
    with pytest.raises(ModelError, match=r"could not be reached .*smollm2-135m"):
        load_lm("owner/never-downloaded")


@pytest.mark.usefixtures("on_hub")
def test_the_hubs_commit_is_what_is_loaded() -> None:
    where = lm_module.pretrained(resolve_model("owner/model"))
    assert where == {
        "pretrained_model_name_or_path": "owner/model",
        "revision": "c0ffee",
        "local_files_only": False,
        "trust_remote_code": False,
    }
