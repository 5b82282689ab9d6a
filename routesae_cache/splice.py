"""A forward pass with the residual stream changed at chosen layers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from routesae_cache.lm import LanguageModel

Edit = Callable[[Tensor], Tensor]
"""From a layer's residuals (R, T, D) to the ones that go on in their place."""


@contextlib.contextmanager
def spliced(lm: LanguageModel, edits: Mapping[int, Edit]) -> Iterator[None]:
    """Run edits on the residual stream in every forward pass of the model inside the block.

    Args:
        edits: for each layer what replaces its residuals; T counts the positions of that pass
            alone, where a cache holds the earlier ones.

    Raises:
        ValueError: for a layer that the model does not have.
    """
    if beyond := [layer for layer in edits if not 0 <= layer <= lm.n_layers]:
        raise ValueError(f"the model has the layers 0-{lm.n_layers}, asked for {beyond}")
    with contextlib.ExitStack() as hooks:
        for layer, edit in edits.items():
            if layer == 0:
                handle = lm.blocks[0].register_forward_pre_hook(_before(edit), with_kwargs=True)
            else:
                handle = lm.blocks[layer - 1].register_forward_hook(_after(edit))
            hooks.callback(handle.remove)
        yield


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
