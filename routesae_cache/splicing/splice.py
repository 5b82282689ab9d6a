"""A forward pass with the residual stream changed at chosen layers, or begun in the middle."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from routesae_cache.lm import LanguageModel

Edit = Callable[[Tensor], Tensor]
"""From a layer's residuals (R, T, D) to the ones that go on in their place."""

# what a decoder may stumble over if something that earlier blocks leave for later ones is missing
_MISSING = (AttributeError, LookupError, TypeError, ValueError, RuntimeError)


@contextlib.contextmanager
def spliced(lm: LanguageModel, edits: Mapping[int, Edit]) -> Iterator[None]:
    """Run edits on the residual stream in every forward pass of the model inside the block.

    Args:
        edits: for each layer what replaces its residuals; T counts the positions of that pass
            alone, where a cache holds the earlier ones.

    Raises:
        ValueError: for a layer that the model does not have.
    """
    lm.check_layers(edits)
    with contextlib.ExitStack() as hooks:
        for layer, edit in edits.items():
            if layer == 0:
                handle = lm.blocks[0].register_forward_pre_hook(_before(edit), with_kwargs=True)
            else:
                handle = lm.blocks[layer - 1].register_forward_hook(_after(edit))
            hooks.callback(handle.remove)
        yield


@contextlib.contextmanager
def resumed(lm: LanguageModel, layer: int, residual_RTD: Tensor) -> Iterator[None]:
    """Have the forward passes inside the block begin at a layer: no block before it runs.

    Whatever the model derives from the ids and their number, such as positions and masks, is
    computed as ever. Only where `resumable` says so is it the same pass.

    Args:
        residual_RTD: the layer's residuals, from a pass over the same ids; it is not changed.

    Raises:
        ValueError: for a layer that the model does not have.
    """
    lm.check_layers([layer])
    with contextlib.ExitStack() as stubs:
        for block, extras in zip(lm.blocks[:layer], lm.output_forms.extras, strict=False):
            output = residual_RTD if extras is None else (residual_RTD, *[None] * extras)
            stubs.enter_context(_replaced_forward(block, output))
        yield


def resumable(lm: LanguageModel, layer: int) -> bool:
    """Whether a pass resumed at a layer ends as a whole one does, bit for bit.

    Tried on a few tokens. It does not where later blocks use more of earlier ones than the
    residual stream, such as keys and values.
    """
    ids_RT, others_RT = (torch.arange(32).view(2, 2, 8) % lm.vocab_size).unbind()
    (residual_RTD,), final_RTD = lm.states(ids_RT, [layer])
    lm.states(others_RT)  # so that nothing the model may keep to itself is of the same tokens
    try:
        with resumed(lm, layer, residual_RTD):
            return torch.equal(lm.states(ids_RT).final_RTD, final_RTD)
    except _MISSING:
        return False


def head(lm: LanguageModel, final_ND: Tensor) -> Tensor:
    """The next-token logits (N, V) of what `lm.states` says enters the head.

    They take the model's own path, with whatever it does around its matrix: scaling, soft caps. So
    the head of the states of a pass is the pass's logits.
    """
    output = lm.output_forms.decoder(last_hidden_state=final_ND[None])
    with _replaced_forward(lm.model.get_decoder(), output):
        return lm.logits(torch.zeros(1, len(final_ND)))[0]


@contextlib.contextmanager
def _replaced_forward(module: nn.Module, output: Any) -> Iterator[None]:
    """Have a module return this instead of computing; its hooks run as ever."""
    before = vars(module).get("forward")
    module.forward = lambda *_, **__: output
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _before(edit: Edit) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (edit(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": edit(kwargs["hidden_states"])}

    return hook


def _after(edit: Edit) -> Any:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return edit(output)
        return (edit(output[0]), *output[1:])

    return hook
