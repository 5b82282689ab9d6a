"""Which SAEs a pass trains: sweep files, and specifications completed by a store.

A sweep file is TOML. `[train]` holds what one would give `routesae train` as options, each
`[[sae]]` what one would give one `--sae`: a name and options of its own. A list makes a grid.
An experiment's file is one, too: what it says of the other stages is passed over.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from routesae_cache.layers import default_layer
from routesae_cache.runs import Asked
from routesae_cache.saes.config import field_types
from routesae_cache.saes.registry import (
    CODERS,
    PRESETS,
    SELECTORS,
    SaeSpec,
    expand,
    known_options,
    resolve_name,
)
from stores.spec import StoreSpec

Table = Mapping[str, Any]
EXPERIMENT_KEYS = (
    "out",
    "store",
    "harvest",
    "evaluate",
    "contexts",
    "interpret",
    "report",
)
"""What an experiment's file has beside the tables of a sweep."""


class SweepError(ValueError):
    """A sweep file that cannot be used; the message names the file, the table and the key."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What a sweep file asks for, before a store completes it."""

    specs: tuple[SaeSpec, ...]
    train: Table
    """Fields of `TrainConfig`."""


def read_sweep(path: Path) -> Sweep:
    """Read and check a sweep file.

    `seed` and `lr` of `[train]` are those of the SAEs that give none; where `seed` is a list, its
    first is also that of the order of the tokens.

    Raises:
        SweepError: for what is no such file, and for keys or values that mean nothing.
    """
    tables = load_toml(path)
    with _naming(str(path)):
        if unknown := sorted(set(tables) - {"train", "sae", *EXPERIMENT_KEYS}):
            raise ValueError(
                f"unknown {', '.join(unknown)}; there are [train] and [[sae]], and for "
                f"experiments {', '.join(EXPERIMENT_KEYS)}"
            )
        common, saes = tables.get("train", {}), tables.get("sae", [])
        if not isinstance(common, dict):
            raise ValueError(f"expected a table [train]; got train = {common!r}")
        if not isinstance(saes, list) or not saes or not all(isinstance(s, dict) for s in saes):
            raise ValueError(
                "expected one or more tables [[sae]], each with a name such as "
                f'sae = "topk" and options; got {saes or "none"}'
            )
    places = [f"{path}, [[sae]] number {number}" for number in range(1, len(saes) + 1)]
    names: list[list[str]] = []
    for place, table in zip(places, saes, strict=True):
        with _naming(place):
            names.append(_names(table))
    with _naming(f"{path}, [train]"):
        train, defaults = _read_train(common, [name for each in names for name in each])
    specs: list[SaeSpec] = []
    for place, own, table in zip(places, names, saes, strict=True):
        options = {key: value for key, value in table.items() if key != "sae"}
        for name in own:
            with _naming(f"{place} ({name})"):
                _check_texts(options)
                specs += expand(name, options, defaults=defaults, train_options=OWN_OPTIONS)
    return Sweep(specs=tuple(specs), train=train)


def complete(specs: Sequence[SaeSpec], store: StoreSpec, *, seed: int) -> list[Asked]:
    """Specifications with the store's layers and width.

    Args:
        seed: of those that carry none.

    Raises:
        ValueError: for layers that the store lacks and options that contradict each other.
    """
    auto_layer = default_layer(store.n_blocks)
    return [
        Asked(
            spec.config(store_layers=store.layers, auto_layer=auto_layer, width=store.width),
            spec.train.get("seed", seed),
            spec.train.get("lr"),
        )
        for spec in specs
    ]


def _whole(option: str, smallest: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        text = str(value)
        if not text.isdecimal() or int(text) < smallest:
            raise ValueError(f"{option} takes a whole number from {smallest} on; got {value!r}")
        return int(text)

    return read


def _positive(option: str) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not 0 < number < math.inf:
            raise ValueError(f"{option} takes a positive number; got {value!r}")
        return number

    return read


OWN_OPTIONS: Mapping[str, Callable[[Any], Any]] = {"seed": _whole("seed", 0), "lr": _positive("lr")}
"""Options of training that a specification may carry, each with what reads it, text or typed."""

_TRAIN_OPTIONS: Mapping[str, Callable[[Any], Any]] = {
    "epochs": _whole("epochs", 1),
    "tokens": _whole("tokens", 1),
    "batch_tokens": _whole("batch_tokens", 1),
    "log_every": _whole("log_every", 1),
    "checkpoint_seconds": _positive("checkpoint_seconds"),
    **OWN_OPTIONS,
}


def load_toml(path: Path) -> dict[str, Any]:
    """A TOML file's tables; SweepError for what is none."""
    if not path.is_file():
        raise SweepError(f"{path}: expected a TOML file, there is no such file")
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise SweepError(f"{path}: expected text in UTF-8; {error}") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise SweepError(f"{path}: expected TOML; {error}") from error


@contextmanager
def _naming(place: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise SweepError(f"{place}: {error}") from error


def _names(table: Table) -> list[str]:
    names = table.get("sae", [])
    names = names if isinstance(names, list) else [names]
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f'expected a name such as sae = "topk"; got {table.get("sae", "none")!r}')
    for name in names:
        resolve_name(name)
    return names


def _read_train(table: Table, names: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `TrainConfig` takes, and options for those SAEs that do not give their own."""
    given = {key.replace("-", "_"): value for key, value in table.items()}
    _check_texts(given)
    preset = given.pop("preset", "default")
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ValueError(f"preset is one of {', '.join(PRESETS)}; got {preset!r}")
    train: dict[str, Any] = {}
    defaults: dict[str, Any] = dict(PRESETS[preset])
    for key, value in given.items():
        if key in OWN_OPTIONS and isinstance(value, list) and value:
            defaults[key] = value
            train[key] = OWN_OPTIONS[key](value[0])
        elif key in _TRAIN_OPTIONS:
            train[key] = _TRAIN_OPTIONS[key](value)
        else:
            _check_common(key, names)
            defaults[key] = value
    return train, defaults


def _check_common(option: str, names: Sequence[str]) -> None:
    """An option for all SAEs has to be one, and to mean something for one of these."""
    kinds = [(selector, coder) for selector in SELECTORS for coder in CODERS]
    known = dict.fromkeys(option for kind in kinds for option in known_options(*kind))
    if option not in known:
        raise ValueError(
            f"unknown option {option!r}; there are preset, {', '.join(_TRAIN_OPTIONS)}, and for "
            f"the SAEs {', '.join(known)}"
        )
    if not any(option in known_options(*resolve_name(name)) for name in names):
        raise ValueError(f"{option} applies to none of {', '.join(names)}: leave it out")


def _check_texts(options: Table) -> None:
    """The command line knows texts alone; here a number is to be written as one."""
    kinds = {name: set(found) for name, found in field_types().items()}
    numeric = {name for name, found in kinds.items() if found & {int, float, bool}}
    for key, values in options.items():
        for value in values if isinstance(values, list) else [values]:
            name = key.replace("-", "_")
            none = type(None) in kinds.get(name, ()) and value == "none"
            if isinstance(value, str) and name in {*numeric, *_TRAIN_OPTIONS} and not none:
                raise ValueError(f"{key} takes no text; got {value!r}, write it without quotes")
