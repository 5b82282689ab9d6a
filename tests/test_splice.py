"""Splicing, resuming and the head alone, on every tiny architecture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from routesae_cache.lm import LanguageModel, ModelIdentity
from routesae_cache.splicing.splice import head, resumable, resumed, spliced
from tests.conftest import ARCHITECTURES, BLOCKS, VOCAB

IDENTITY = ModelIdentity(name="tiny", revision=None, config_hash="", weights="", dtype="float32")
LAYERS = range(BLOCKS + 1)
# bloom's blocks return tuples; gemma2 caps its logits, cohere scales them
OTHERS = ("bloom", "gemma2", "cohere")


@pytest.fixture(params=[*ARCHITECTURES, *OTHERS], scope="module")
def lm(request: pytest.FixtureRequest, tiny_model: Callable[..., Any]) -> LanguageModel:
    return LanguageModel(tiny_model(request.param), IDENTITY)


@pytest.fixture(scope="module")
def llama(tiny_model: Callable[..., Any]) -> LanguageModel:
    return LanguageModel(tiny_model("llama"), IDENTITY)


@pytest.fixture(scope="module")
def ids_RT() -> Tensor:
    return torch.randint(VOCAB, (3, 11), generator=torch.Generator().manual_seed(1))


def traces(lm: LanguageModel) -> int:
    """Hooks and replaced forwards that are on the model's modules."""
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + ("forward" in vars(module))
        for module in lm.model.modules()
    )


def zero_at(row: int, position: int) -> Callable[[Tensor], Tensor]:
    def edit(x_RTD: Tensor) -> Tensor:
        edited_RTD = x_RTD.clone()
        edited_RTD[row, position] = 0
        return edited_RTD

    return edit


def test_the_exact_residual_changes_nothing(lm: LanguageModel, ids_RT: Tensor) -> None:
    expected_RTV = lm.logits(ids_RT)
    for layer, residual_RTD in zip(LAYERS, lm.residuals(ids_RT, LAYERS), strict=True):
        with spliced(lm, {layer: lambda _, x_RTD=residual_RTD: x_RTD.float().clone()}):
            assert torch.equal(lm.logits(ids_RT), expected_RTV), layer
    with spliced(lm, dict.fromkeys(LAYERS, torch.clone)):
        assert torch.equal(lm.logits(ids_RT), expected_RTV)


def test_zeros_change_what_comes_after_and_nothing_else(lm: LanguageModel, ids_RT: Tensor) -> None:
    before_RTV = lm.logits(ids_RT)
    for layer in LAYERS:
        with spliced(lm, {layer: zero_at(1, 4)}):
            after_RTV = lm.logits(ids_RT)
        changed_RT = (after_RTV - before_RTV).abs().amax(-1)
        assert changed_RT[1, 4] > 1e-2, layer
        # tokens after it see it through attention, but there is none after the last block
        assert (changed_RT[1, 5:] > 0).any() == (layer < BLOCKS)
        changed_RT[1, 4:] = 0
        assert not changed_RT.any(), layer


def test_several_layers_at_once(llama: LanguageModel, ids_RT: Tensor) -> None:
    with spliced(llama, {1: zero_at(0, 2), 3: zero_at(0, 7)}):
        both_RTV = llama.logits(ids_RT)
    with spliced(llama, {1: zero_at(0, 2)}):
        residual_RTD = llama.residuals(ids_RT, [3])[0].clone()
    residual_RTD[0, 7] = 0
    with spliced(llama, {3: lambda _: residual_RTD}):
        assert torch.equal(llama.logits(ids_RT), both_RTV)


@pytest.mark.parametrize("where", ["an edit", "a block"])
def test_nothing_stays_after_an_error(where: str, llama: LanguageModel, ids_RT: Tensor) -> None:
    before = traces(llama)

    def fail(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    edit = fail if where == "an edit" else torch.clone
    handle = llama.blocks[3].register_forward_pre_hook(fail) if where == "a block" else None
    with (
        pytest.raises(RuntimeError, match="out of memory"),
        resumed(llama, 2, llama.residuals(ids_RT, [2])[0]),
        spliced(llama, {0: torch.clone, 2: edit}),
    ):
        llama.states(ids_RT)
    if handle is not None:
        handle.remove()
    assert traces(llama) == before


def test_layers_beyond_the_model(llama: LanguageModel, ids_RT: Tensor) -> None:
    for layer in (-1, BLOCKS + 1):
        with pytest.raises(ValueError, match=f"layers 0-{BLOCKS}"), spliced(llama, {layer: id}):
            pass
        with pytest.raises(ValueError, match=f"layers 0-{BLOCKS}"):
            llama.states(ids_RT, [layer])
    assert traces(llama) == 0


def test_a_resumed_pass_is_the_rest_of_a_whole_one(lm: LanguageModel, ids_RT: Tensor) -> None:
    residuals, final_RTD = lm.states(ids_RT, LAYERS)
    assert len(lm.output_forms.extras) == BLOCKS
    ran: list[int] = []
    first = [lm.blocks[i].mlp for i in range(BLOCKS)]
    handles = [
        module.register_forward_hook(lambda *_, i=i: ran.append(i))
        for i, module in enumerate(first)
    ]
    for layer in LAYERS:
        ran.clear()
        with resumed(lm, layer, residuals[layer]):
            assert torch.equal(lm.states(ids_RT).final_RTD, final_RTD)
        assert ran == list(range(layer, BLOCKS))
        with resumed(lm, layer, residuals[layer]), spliced(lm, {layer: zero_at(2, 3)}):
            resumed_RTD = lm.states(ids_RT).final_RTD
        with spliced(lm, {layer: zero_at(2, 3)}):
            assert torch.equal(lm.states(ids_RT).final_RTD, resumed_RTD)
        assert resumable(lm, layer)
    for handle in handles:
        handle.remove()


def test_what_skips_the_residual_stream_is_noticed(llama: LanguageModel) -> None:
    """As in models whose later blocks use keys and values of earlier ones."""
    seen: dict[str, Tensor] = {}

    def save(_: Any, args: Any) -> None:
        seen["x"] = args[0]

    def use(_: Any, __: Any, output: Tensor) -> Tensor:
        return output + seen["x"]

    handles = [
        llama.blocks[1].mlp.register_forward_pre_hook(save),
        llama.blocks[3].mlp.register_forward_hook(use),
    ]
    assert [resumable(llama, layer) for layer in LAYERS] == [True, True, False, False, True]
    handles.append(llama.blocks[3].mlp.register_forward_hook(lambda *_: seen.pop("x")))
    assert resumable(llama, 1)
    assert not resumable(llama, 2)  # a KeyError in the resumed pass
    for handle in handles:
        handle.remove()


def test_the_head_of_the_states_is_the_logits(lm: LanguageModel, ids_RT: Tensor) -> None:
    expected_NV = lm.logits(ids_RT).flatten(0, 1)
    residuals, final_RTD = lm.states(ids_RT, [2, 0])
    final_ND = final_RTD.flatten(0, 1)
    torch.testing.assert_close(head(lm, final_ND), expected_NV, rtol=0, atol=1e-5)
    part = slice(5, 20)
    torch.testing.assert_close(head(lm, final_ND[part]), expected_NV[part], rtol=0, atol=1e-5)
    for layer, residual_RTD in zip([2, 0], residuals, strict=True):
        assert torch.equal(residual_RTD, lm.residuals(ids_RT, [layer])[0])
    assert traces(lm) == 0
