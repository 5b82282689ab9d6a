"""Steering: generation with latents of an SAE changed at every token, beside generation without.

As in RouteSAE (Shi et al. 2025), a latent is changed at the layer where a token is read; here that
goes for the prompt and for every generated token, and the router chooses among the layers that it
was trained on.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from routesae_cache.lm import LanguageModel
from routesae_cache.splicing.splice import Edit, spliced
from routesae_cache.steering.changes import ChangedLatents
from routesae_cache.steering.dialogues import Prompt, prompt_ids
from routesae_cache.tokens import Tokenizer


@dataclass(frozen=True, kw_only=True)
class SteerConfig:
    """How to generate."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    """0 takes the likeliest token each time."""
    seed: int = 42
    """Of the sampling; each prompt has random numbers of its own, the same for both texts."""
    raw: bool = False
    """Leave the tokenizer's chat template out."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"expected at least 1 new token, found {self.max_new_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"expected a temperature of 0 or above, found {self.temperature}")


class Continuation(NamedTuple):
    """How a model goes on with a prompt."""

    tokens: tuple[int, ...]
    text: str
    """The tokens' text, special ones left out."""
    finish: Literal["end", "length"]
    """Whether the model ended it, or the number of tokens asked for."""
    layers: tuple[int, ...] | None
    """Where each token was read and changed; None where that is no single layer, or nowhere."""


@dataclass(frozen=True, kw_only=True)
class Steered:
    """A prompt and how the model goes on with it, left alone and steered."""

    prompt: Prompt
    given: str
    """The prompt as the model was given it, special tokens included."""
    given_tokens: int
    original: Continuation
    steered: Continuation
    differ_at: int | None
    """The number of the first token that differs, from 0; None where none does."""
    same_text: str
    """What both texts begin with, up to that token."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON object."""
        original = self.original._asdict()
        del original["layers"]
        return {
            "source": self.prompt.source,
            "prompt": self.given,
            "prompt_tokens": self.given_tokens,
            "differ_at": self.differ_at,
            "original": original,
            "steered": self.steered._asdict(),
        }


class Reader:
    """A language model that takes in tokens, a piece at a time, with latents changed at each.

    A piece is read as it is behind the pieces before it, which were changed. The first position of
    a row is left alone: no SAE was trained on it.

    Args:
        latents: None changes nothing.
    """

    def __init__(self, lm: LanguageModel, latents: ChangedLatents | None) -> None:
        self._lm, self._latents = lm, latents
        self._cache: Any = None
        self._begun = False

    @torch.inference_mode()
    def take(self, ids: Sequence[int]) -> tuple[Tensor, list[int] | None]:
        """The logits (V,) of the token after these, and the layer where each of these was read.

        The latter leaves the first position of the row out, and is None where nothing is changed
        or that at several layers.
        """
        ids_RT = torch.tensor([ids])
        start = 0 if self._begun else 1
        edits: dict[int, Edit] = {}
        layers: list[int] | None = None
        if self._latents is not None and len(ids) > start:
            prepare = self._in_one_pass if self._latents.reads_layers_apart else self._in_two_passes
            edits, layers = prepare(self._latents, ids_RT, start)
        with spliced(self._lm, edits):
            logits_RV, self._cache = self._lm.extend(ids_RT, self._cache)
        self._begun = True
        return logits_RV[0], layers

    def _in_one_pass(self, latents: ChangedLatents, ids_RT: Tensor, start: int) -> _Edits:
        layers = latents.layers_changed
        edits = {layer: _adding(partial(latents.added_at, layer), start) for layer in layers}
        return edits, [*layers] * (ids_RT.shape[1] - start) if len(layers) == 1 else None

    def _in_two_passes(self, latents: ChangedLatents, ids_RT: Tensor, start: int) -> _Edits:
        residuals = self._lm.residuals_behind(ids_RT, latents.layers_read, self._cache)
        added_NLD, index_N = latents.delta(torch.stack([x[0, start:] for x in residuals], 1))
        added = dict(zip(latents.layers_read, added_NLD.unbind(1), strict=True))
        layers = latents.layers_changed
        edits = {layer: _adding(_always(added[layer]), start) for layer in layers}
        if index_N is not None:
            return edits, [latents.layers_read[index] for index in index_N.tolist()]
        return edits, [*layers] * len(added_NLD) if len(layers) == 1 else None


_Edits = tuple[dict[int, Edit], list[int] | None]
"""What is done at each layer, and where each token was read."""


def steer(
    lm: LanguageModel,
    tokenizer: Tokenizer,
    latents: ChangedLatents,
    prompts: Sequence[Prompt],
    config: SteerConfig,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Steered]:
    """Have a model go on with each prompt twice: left alone, and steered.

    Args:
        lm: the model whose residuals the SAE reads, on the SAE's device.
        tokenizer: the model's.
        progress: told `(done, total)` in tokens.

    Raises:
        ValueError: before anything is generated, for a prompt without tokens, and for one that
            does not fit the model together with the new tokens; later, for changes so large that
            the model's arithmetic overflows.
    """
    ids_of = [prompt_ids(prompt, tokenizer, raw=config.raw) for prompt in prompts]
    _check_length(lm, prompts, ids_of, config.max_new_tokens)
    end_ids = lm.end_ids | {tokenizer.hf.eos_token_id}
    done, total = 0, 2 * len(prompts) * config.max_new_tokens
    results: list[Steered] = []
    for prompt, ids in zip(prompts, ids_of, strict=True):
        both: list[Continuation] = []
        for reader in (Reader(lm, None), Reader(lm, latents)):
            made: list[_Made] = []
            for new in _generate(reader, ids, config, end_ids):
                made.append(new)
                progress(done + len(made), total)
            done += config.max_new_tokens
            progress(done, total)
            both.append(_continuation(made, tokenizer, end_ids))
        results.append(_compared(prompt, ids, tokenizer, *both))
    return results


class _Made(NamedTuple):
    """A generated token."""

    token: int
    layer: int | None


def _generate(
    reader: Reader, ids: Sequence[int], config: SteerConfig, end_ids: frozenset[int]
) -> Iterator[_Made]:
    choose = _chooser(config, ids)
    logits_V, _ = reader.take(ids)
    for _ in range(config.max_new_tokens):
        if logits_V.isnan().any():
            raise ValueError("the model's logits are no numbers any more; change latents by less")
        token = choose(logits_V)
        logits_V, layers = reader.take([token])
        yield _Made(token, None if layers is None else layers[0])
        if token in end_ids:
            return


def _chooser(config: SteerConfig, ids: Sequence[int]) -> Callable[[Tensor], int]:
    """What picks the next token; its random numbers come from the seed and the prompt alone."""
    if config.temperature == 0:
        return lambda logits_V: int(logits_V.argmax())
    digest = hashlib.sha256(f"{config.seed} {list(ids)}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))

    def draw(logits_V: Tensor) -> int:
        # the largest of the logits with Gumbel noise is a draw from their softmax
        gumbel_V = -torch.empty(len(logits_V)).exponential_(generator=generator).log()
        return int((logits_V.float().cpu() + config.temperature * gumbel_V).argmax())

    return draw


def _continuation(
    made: Sequence[_Made], tokenizer: Tokenizer, end_ids: frozenset[int]
) -> Continuation:
    tokens = tuple(new.token for new in made)
    layers = tuple(new.layer for new in made if new.layer is not None)
    return Continuation(
        tokens,
        _decode(tokenizer, tokens),
        "end" if tokens[-1] in end_ids else "length",
        layers or None,
    )


def _compared(
    prompt: Prompt,
    ids: Sequence[int],
    tokenizer: Tokenizer,
    original: Continuation,
    steered: Continuation,
) -> Steered:
    differ_at = _first_difference(original.tokens, steered.tokens)
    # a token may be a part of a character: then the texts differ before the tokens do
    texts_differ_at = _first_difference(original.text, steered.text)
    begin = _decode(tokenizer, original.tokens[:differ_at])
    return Steered(
        prompt=prompt,
        given=tokenizer.hf.decode(ids),
        given_tokens=len(ids),
        original=original,
        steered=steered,
        differ_at=differ_at,
        same_text=original.text[:texts_differ_at][: len(begin)],
    )


def _first_difference(left: Sequence[object], right: Sequence[object]) -> int | None:
    pairs = enumerate(itertools.zip_longest(left, right))
    return next((i for i, (one, other) in pairs if one != other), None)


def _decode(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    text: str = tokenizer.hf.decode(
        tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text


def _adding(added: Callable[[Tensor], Tensor], start: int) -> Edit:
    """An edit that adds what `added` makes of (N, D) to every position from `start` on."""

    def edit(x_RTD: Tensor) -> Tensor:
        x_ND = x_RTD[0, start:]
        changed_ND = (x_ND.float() + added(x_ND)).to(x_ND.dtype)
        return torch.cat([x_RTD[0, :start], changed_ND])[None]

    return edit


def _always(added_ND: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda _: added_ND


def _check_length(
    lm: LanguageModel, prompts: Sequence[Prompt], ids_of: Sequence[Sequence[int]], new: int
) -> None:
    limit = lm.context_limit
    for prompt, ids in zip(prompts, ids_of, strict=True):
        if limit is not None and len(ids) + new > limit:
            raise ValueError(
                f"{prompt.source}: expected at most the model's {limit} tokens, found {len(ids)} "
                f"and {new} new ones; shorten the prompt or ask for fewer new ones"
            )
