"""The model and the tokenizer that a store came from, and no other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast, get_args

from routesae_cache.lm import Dtype, LanguageModel, load_lm
from routesae_cache.sources import ModelError, ModelSource, resolve_model
from routesae_cache.tokens import Tokenizer, load_tokenizer
from stores.spec import StoreSpec

_SAME = ("config_hash", "weights", "dtype")


def origin_lm(
    spec: StoreSpec, *, model: str | ModelSource | None = None, device: str = "cpu"
) -> LanguageModel:
    """Load the model that a store's residuals came from, in the dtype of its forward pass.

    Args:
        model: where it is now, as `load_lm` takes it; by default the name the store has. A local
            folder is recorded by its last part alone, and has to be given, and so has one whose
            own code may be run: a store does not decide on that.

    Raises:
        ModelError: if there is no such model, or it is another one.
    """
    dtype = cast(Dtype, spec.model["dtype"])
    if dtype not in get_args(Dtype):
        raise ModelError(
            f"the store says that its model computed in {dtype!r}; expected one of "
            f"{', '.join(get_args(Dtype))}"
        )
    with _hint(spec, model):
        source = _source(spec, model)
        lm = load_lm(source, dtype=dtype, device=device)
    found = lm.identity.to_dict()
    if differences := [key for key in _SAME if found[key] != spec.model.get(key)]:
        raise _another("model", source, differences, spec.model, found)
    return lm


def origin_tokenizer(spec: StoreSpec, *, model: str | ModelSource | None = None) -> Tokenizer:
    """Load the tokenizer that a store's tokens came from; as `origin_lm`."""
    with _hint(spec, model):
        source = _source(spec, model)
        tokenizer = load_tokenizer(source)
    found = tokenizer.identity()
    if differences := [key for key in found if found[key] != spec.tokenizer.get(key)]:
        raise _another("tokenizer", source, differences, spec.tokenizer, found)
    return tokenizer


def _source(spec: StoreSpec, model: str | ModelSource | None) -> ModelSource:
    if model is not None:
        return resolve_model(model)
    return resolve_model(spec.model["name"], revision=spec.model.get("revision"))


@contextmanager
def _hint(spec: StoreSpec, model: str | ModelSource | None) -> Iterator[None]:
    """Say what to do where the name in the store is not enough."""
    try:
        yield
    except ValueError as error:
        if model is not None:
            raise
        name = spec.model["name"]
        raise ModelError(
            f"the store was made with the model {name!r}, which cannot be loaded by that name; "
            f"say with --model where it is now. ({error})"
        ) from error


def _another(
    what: str,
    source: ModelSource,
    differences: list[str],
    expected: dict[str, Any],
    found: dict[str, Any],
) -> ModelError:
    lines = (f"{key}: expected {expected.get(key)!r}, found {found[key]!r}" for key in differences)
    return ModelError(
        f"{source.location} is not the {what} that the store came from; " + "; ".join(lines)
    )
