"""From names to architectures: the one table, and the grammar of `--sae`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

from routesae_cache.saes.coders import Coder, GatedCoder, JumpReluCoder, ReluCoder
from routesae_cache.saes.config import (
    APPLIES_TO,
    CoderKind,
    SaeConfig,
    SelectorKind,
    applies,
    field_types,
)
from routesae_cache.saes.sae import Sae
from routesae_cache.saes.selectors import (
    AllSelector,
    EverySelector,
    FixedSelector,
    RandomSelector,
    RouteSelector,
    Selector,
)
from routesae_cache.saes.topk import BatchTopKCoder, MatryoshkaCoder, TopKCoder

SELECTORS: dict[SelectorKind, type[Selector]] = {
    "fixed": FixedSelector,
    "route": RouteSelector,
    "random": RandomSelector,
    "every": EverySelector,
    "all": AllSelector,
}
CODERS: dict[CoderKind, type[Coder]] = {
    "relu": ReluCoder,
    "gated": GatedCoder,
    "topk": TopKCoder,
    "batchtopk": BatchTopKCoder,
    "jumprelu": JumpReluCoder,
    "matryoshka": MatryoshkaCoder,
}
NAMES: dict[str, tuple[SelectorKind, CoderKind]] = {
    "vanilla": ("fixed", "relu"),
    "gated": ("fixed", "gated"),
    "topk": ("fixed", "topk"),
    "batchtopk": ("fixed", "batchtopk"),
    "jumprelu": ("fixed", "jumprelu"),
    "matryoshka": ("fixed", "matryoshka"),
    "routesae": ("route", "topk"),
    "random": ("random", "topk"),
    "mlsae": ("every", "topk"),
    "crosscoder": ("all", "relu"),
}
SELECTOR_WORDS: dict[str, SelectorKind] = {
    "crosscoder" if kind == "all" else kind: kind for kind in SELECTORS
}
CODER_WORDS: dict[str, CoderKind] = {kind: kind for kind in CODERS}

PRESETS: dict[str, dict[str, Any]] = {
    "default": {
        "init_bias": "mean",
        "route_estimator": "straight-through",
        "gated_aux": "paper",
        "crosscoder_bias": True,
        "initial_threshold": 1.0,
        "bandwidth": 0.1,
    },
    "paper": {
        "init_bias": "zero",
        "auxk": 0,
        "route_estimator": "factor",
        "gated_aux": "authors",
        "crosscoder_bias": False,
    },
}
"""Values of options that nobody gave, where they apply: ours, and the RouteSAE paper's."""

LATENTS_PER_CHANNEL = 8
_LAYER_OPTIONS = ("layer", "layers")
_CHOSEN_BY_NAME = ("selector", "coder", "layers")


def resolve_name(name: str) -> tuple[SelectorKind, CoderKind]:
    """Selector and coder of a name such as `routesae`, or of the general form `route+jumprelu`.

    Raises:
        ValueError: for an unknown name, listing what there is.
    """
    if name in NAMES:
        return NAMES[name]
    selector, plus, coder = name.partition("+")
    if plus and selector in SELECTOR_WORDS and coder in CODER_WORDS:
        return SELECTOR_WORDS[selector], CODER_WORDS[coder]
    raise ValueError(
        f"unknown SAE {name!r}; there are {', '.join(NAMES)}, and SELECTOR+CODER with the "
        f"selectors {', '.join(SELECTOR_WORDS)} and the coders {', '.join(CODERS)}"
    )


def short_name(selector: SelectorKind, coder: CoderKind) -> str:
    """The inverse of `resolve_name`: one of `NAMES` where there is one, else the general form."""
    for name, kinds in NAMES.items():
        if kinds == (selector, coder):
            return name
    return f"{'crosscoder' if selector == 'all' else selector}+{coder}"


def build_sae(config: SaeConfig, width: int, seed: int) -> Sae:
    """The module for a configuration; the same seed gives the same weights.

    Args:
        width: of a residual.
    """
    generator = torch.Generator().manual_seed(seed)
    selector = SELECTORS[config.selector](config, width, generator=generator)
    coder = CODERS[config.coder](config, width, stacked=selector.stacked, generator=generator)
    return Sae(config, width, selector, coder)


@dataclass(frozen=True, kw_only=True)
class SaeSpec:
    """One SAE as asked for, before a store's layers and width complete it."""

    selector: SelectorKind
    coder: CoderKind
    options: Mapping[str, Any]
    """Fields of `SaeConfig`, apart from selector, coder and layers."""
    layers: Literal["auto", "all"] | tuple[int, ...]
    """Given layers, the store's `auto` layer, or `all` of them."""
    train: Mapping[str, Any]
    """Options of its own that belong to training, such as a seed."""

    def config(self, *, store_layers: Sequence[int], auto_layer: int, width: int) -> SaeConfig:
        """Complete the specification from a store.

        Args:
            store_layers: the layers there are.
            auto_layer: what `layer=auto` stands for.
            width: of a residual; latents default to 8 times it.

        Raises:
            ValueError: if the store lacks a layer, or options contradict each other.
        """
        named = {"auto": (auto_layer,), "all": tuple(store_layers)}
        layers = named[self.layers] if isinstance(self.layers, str) else self.layers
        if lacking := [layer for layer in layers if layer not in store_layers]:
            raise ValueError(f"the store has the layers {list(store_layers)}, not {lacking}")
        options = {"latents": LATENTS_PER_CHANNEL * width, **self.options}
        return SaeConfig(selector=self.selector, coder=self.coder, layers=layers, **options)


def parse_sae(
    text: str,
    *,
    defaults: Mapping[str, Any] = {},
    train_options: Mapping[str, Callable[[str], Any]] = {},
) -> list[SaeSpec]:
    """Read `name` or `name:option=value,…`; an option with several values makes a grid.

    `routesae:k=32,48,64` is three SAEs; `topk:k=32,layer=22` is one. A part without `=` is one more
    value of the option before it.

    Args:
        defaults: options used where they apply and are not given, `layer` and `layers` among them.
        train_options: further options that a specification may carry, each with what reads it.

    Raises:
        ValueError: for unknown names or options (listing the known ones), options that do not
            apply, or values that cannot be read.
    """
    name, _, tail = text.partition(":")
    options: dict[str, list[Any]] = {}
    key = ""
    for part in tail.split(",") if tail else []:
        before, equals, after = part.partition("=")
        if equals:
            key, value = before.strip().replace("-", "_"), after
            if key in options:
                raise ValueError(f"{text!r} gives {key} twice; several values go after one {key}=")
            options[key] = []
        else:
            value = before
        if not key or not value.strip():
            raise ValueError(f"{text!r}: expected name:option=value,…; could not read {part!r}")
        options[key].append(value.strip())
    return expand(name.strip(), options, defaults=defaults, train_options=train_options)


def expand(
    name: str,
    options: Mapping[str, Any],
    *,
    defaults: Mapping[str, Any] = {},
    train_options: Mapping[str, Callable[[str], Any]] = {},
) -> list[SaeSpec]:
    """The specifications of a name and its options, lists making a grid; see `parse_sae`."""
    selector, coder = resolve_name(name)
    own = {key.replace("-", "_"): value for key, value in options.items()}
    _check_known(name, own, selector, coder, train_options)
    merged = {key: v for key, v in defaults.items() if _applies(key, selector, coder)} | own
    grid = [
        [(key, _read(key, value, train_options)) for value in _listed(values)]
        for key, values in merged.items()
    ]
    return [
        _spec(selector, coder, dict(point), train_options) for point in itertools.product(*grid)
    ]


def parse_saes(
    texts: Iterable[str],
    *,
    options: Mapping[str, Any],
    preset: str,
    train_options: Mapping[str, Callable[[str], Any]] = {},
) -> list[SaeSpec]:
    """Several `--sae` with options common to them, over a preset's defaults.

    Args:
        options: given for all of them; each is used by those to which it applies.
        preset: a key of `PRESETS`.

    Raises:
        ValueError: as `parse_sae`, and where a common option applies to none of them.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; there are {', '.join(PRESETS)}")
    texts = list(texts)
    kinds = [resolve_name(text.partition(":")[0].strip()) for text in texts]
    for key, value in options.items():
        if not any(_applies(key, selector, coder) for selector, coder in kinds):
            raise ValueError(f"{key}={value} does not apply to {', '.join(texts)}: leave it out")
    defaults = {**PRESETS[preset], **options}
    return [
        spec
        for text in texts
        for spec in parse_sae(text, defaults=defaults, train_options=train_options)
    ]


def known_options(selector: str, coder: str) -> list[str]:
    """The options that a specification of this selector and coder may carry."""
    names = [field.name for field in fields(SaeConfig) if field.name not in _CHOSEN_BY_NAME]
    layer = "layer" if selector == "fixed" else "layers"
    return [layer, *(n for n in names if applies(n, selector=selector, coder=coder))]


def _applies(option: str, selector: str, coder: str) -> bool:
    if option in _LAYER_OPTIONS:
        return option == ("layer" if selector == "fixed" else "layers")
    return applies(option, selector=selector, coder=coder)


def _check_known(
    name: str, options: Iterable[str], selector: str, coder: str, train_options: Iterable[str]
) -> None:
    known = [*known_options(selector, coder), *train_options]
    for option in options:
        if option in known:
            continue
        if option in APPLIES_TO:
            axis, kinds = APPLIES_TO[option]
            why = f"{option} does not apply to {name}: it is for the {axis}s {', '.join(kinds)}"
        elif option in _LAYER_OPTIONS:
            why = f"{name} takes {known[0]}, not {option}"
        else:
            why = f"{name} has no option {option!r}"
        raise ValueError(f"{why}; its options are {', '.join(known)}")


def _spec(
    selector: SelectorKind, coder: CoderKind, point: dict[str, Any], train_options: Iterable[str]
) -> SaeSpec:
    layers = point.pop("layer", "auto") if selector == "fixed" else point.pop("layers", "all")
    train = {key: point.pop(key) for key in train_options if key in point}
    trial = (0,) if isinstance(layers, str) else layers
    fewest = max(point.get("k") or 1, sum(point.get("group_sizes") or ()))
    enough = {"latents": fewest, **point}
    SaeConfig(selector=selector, coder=coder, layers=trial, **enough)  # errors before any work
    return SaeSpec(selector=selector, coder=coder, options=point, layers=layers, train=train)


def _listed(values: Any) -> list[Any]:
    if not isinstance(values, list):
        return [values]
    if not values:
        raise ValueError("an option was given an empty list of values")
    return values


def _read(option: str, value: Any, train_options: Mapping[str, Callable[[str], Any]]) -> Any:
    """An option's value from what was written, text or already typed."""
    if option in train_options:
        return train_options[option](value)
    if option == "layer":
        return value if value == "auto" else (_number(option, value, int),)
    if option == "layers":
        return value if value == "all" else _tuple(option, value)
    kinds = field_types()[option]
    if value in kinds:
        return value
    if isinstance(value, str) and value.lower() == "none" and type(None) in kinds:
        return None
    if bool in kinds:
        return _truth(option, value)
    for kind in (int, float):
        if kind in kinds:
            return _number(option, value, kind)
    if tuple in kinds:
        return _tuple(option, value)
    raise ValueError(f"{option} is one of {', '.join(map(str, kinds))}; got {value!r}")


def _number(option: str, value: Any, kind: type) -> Any:
    try:
        number = kind(value)
    except (TypeError, ValueError):
        number = None
    if number is None or isinstance(value, bool) or (kind is int and str(number) != str(value)):
        word = "a whole number" if kind is int else "a number"
        raise ValueError(f"{option} takes {word}; got {value!r}")
    return number


def _truth(option: str, value: Any) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    word = str(value).lower()
    if word not in words:
        raise ValueError(f"{option} takes true or false; got {value!r}")
    return words[word]


def _tuple(option: str, value: Any) -> tuple[int, ...]:
    """`7-22` (both ends included) or `4+8+12`."""
    if isinstance(value, tuple):
        return value
    first, dash, last = str(value).partition("-")
    if dash:
        return tuple(range(_number(option, first, int), _number(option, last, int) + 1))
    return tuple(_number(option, part, int) for part in str(value).split("+"))
