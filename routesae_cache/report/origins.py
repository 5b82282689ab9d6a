"""The store, the tokenizer and the model behind the results, where they are at hand."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from routesae_cache.lm import LanguageModel
from routesae_cache.origin import origin_lm, origin_tokenizer
from routesae_cache.report.discover import FoundRun
from routesae_cache.report.table import Missing
from routesae_cache.report.text import TokenText
from routesae_cache.sources import ModelError, ModelSource
from stores.errors import StoreError
from stores.place import Place
from stores.places import Where, find_place
from stores.reader import StoreReader

logger = logging.getLogger(__name__)

NO_STORE = "The store is not at hand; say where it is with --store."


def open_store(given: Where | None, root: Path, runs: Sequence[FoundRun]) -> StoreReader | None:
    """The store asked for, otherwise the one that most of the results name, if it is there.

    StoreError where the store asked for cannot be opened.
    """
    if given is not None:
        return StoreReader(given)
    named = Counter(
        store
        for run in runs
        for store in (
            run.contexts.record["store"] if run.contexts else None,
            run.evaluation["store"] if run.evaluation else None,
            run.config.store,
        )
        if store is not None
    )
    for name, _ in named.most_common():
        try:
            if (path := _located(name, root)) is not None:
                return StoreReader(path)
        except StoreError as error:
            logger.warning("%s", error)
    return None


def open_text(
    reader: StoreReader | None, model: str | ModelSource | None, missing: list[Missing]
) -> TokenText | None:
    """The store's tokenizer; where it is not at hand, `missing` is told.

    ModelError where the one asked for is not there or is another one.
    """
    title = "Text from the store, shaded token by token"
    if reader is None:
        missing.append(Missing(title, NO_STORE))
        return None
    try:
        return TokenText(origin_tokenizer(reader.spec, model=model))
    except ModelError as error:
        if model is not None:
            raise
        missing.append(Missing(title, f"{error}."))
        return None


def open_model(
    reader: StoreReader, model: str | ModelSource | None, device: str, missing: list[Missing]
) -> LanguageModel | None:
    """The store's model, for its output embedding; otherwise as `open_text`."""
    try:
        return origin_lm(reader.spec, model=model, device=device)
    except ModelError as error:
        if model is not None:
            raise
        missing.append(Missing("Tokens that a latent promotes and suppresses", f"{error}."))
        return None


def same_store(run: FoundRun, reader: StoreReader | None, root: Path) -> bool:
    """Whether a run's contexts are of this store; one that has been moved is taken to be it."""
    if reader is None or run.contexts is None:
        return False
    named = _located(run.contexts.record["store"], root)
    return named is None or named == reader.path


def _located(given: str, root: Path) -> Place | None:
    """A store that a result names, as it is or from one of the folder's parents."""
    resolved = root.resolve()
    return find_place(given, (Path.cwd(), resolved, *resolved.parents))
