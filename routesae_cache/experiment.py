"""An experiment: one TOML file that says what every stage is to do.

`out` and `store` say where; `[harvest]`, `[evaluate]`, `[contexts]`, `[interpret]` and `[report]`
hold the options of the command of that name. `[train]` and `[[sae]]` are those of a sweep, in the
same file or in the one that `sweep` names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from routesae_cache.sweep import EXPERIMENT_KEYS, Sweep, load_toml, read_sweep
from stores.place import Place
from stores.places import as_place

Stage = Literal["harvest", "train", "evaluate", "contexts", "interpret", "report"]
STAGES: tuple[Stage, ...] = get_args(Stage)
Options = Mapping[str, Any]

_EXTENDED = ("tokens",)  # more of it extends a store
_KEY_LENGTH = 8


class ExperimentError(ValueError):
    """An experiment's file that cannot be used; the message names it and the key."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What an experiment's file asks for."""

    path: Path
    sweep_file: Path
    """The file with `[train]` and `[[sae]]`."""
    out: Path
    """Folder for everything but a store that is named."""
    store: Place
    sweep: Sweep
    options: Mapping[Stage, Options]
    """Of each stage; `train` has the tables `train` and `sae` as they are written."""
    interprets: bool
    """The file has `[interpret]`."""

    @property
    def saes(self) -> Path:
        """Folder of the runs."""
        return self.out / "saes"

    @property
    def evaluation(self) -> Path:
        return self.out / "evaluation.json"

    @property
    def contexts(self) -> Path:
        """Folder of the contexts and interpretations."""
        return self.out / "contexts"

    @property
    def report(self) -> Path:
        return self.out / "report.html"


def read_experiment(path: Path) -> Experiment:
    """Read and check an experiment's file, but for options whose meaning the commands know.

    Without `store`, its name has a key of the harvest's options, so that other options make
    another store and nothing is overwritten. It may be a URL. Paths are relative to the working
    directory.

    Raises:
        ExperimentError: for missing or mistyped keys.
        SweepError: for what is no TOML, and as `read_sweep`.
    """
    tables = load_toml(path)
    sweep_file = _path(path, tables, "sweep") or path
    if sweep_file != path and (both := sorted({"train", "sae"} & set(tables))):
        raise ExperimentError(
            f"{path}: sweep = {str(sweep_file)!r} and {', '.join(both)}: give one"
        )
    sweep = read_sweep(sweep_file)
    described = load_toml(sweep_file)
    options: dict[Stage, Options] = {
        "train": {key: described.get(key) for key in ("train", "sae")},
    }
    known = ("sweep", *EXPERIMENT_KEYS)
    if unknown := sorted(set(tables) - {"train", "sae", *known}):
        raise ExperimentError(
            f"{path}: unknown {', '.join(unknown)}; there are {', '.join(known)}, [train] and "
            "[[sae]]"
        )
    for stage in STAGES:
        if stage == "train":
            continue
        table = tables.get(stage, {})
        if not isinstance(table, dict):
            raise ExperimentError(f"{path}: expected a table [{stage}]; got {stage} = {table!r}")
        options[stage] = {key.replace("-", "_"): value for key, value in table.items()}
    out = _path(path, tables, "out")
    if out is None:
        raise ExperimentError(f'{path}: expected where results go, such as out = "runs/mine"')
    return Experiment(
        path=path,
        sweep_file=sweep_file,
        out=out,
        store=as_place(
            _text(path, tables, "store") or out / f"store-{_key(options['harvest'])}.zarr"
        ),
        sweep=sweep,
        options=options,
        interprets="interpret" in tables,
    )


def _path(path: Path, tables: Options, key: str) -> Path | None:
    value = _text(path, tables, key)
    return None if value is None else Path(value).expanduser()


def _text(path: Path, tables: Options, key: str) -> str | None:
    value = tables.get(key)
    if value is not None and (not isinstance(value, str) or not value):
        raise ExperimentError(f"{path}: {key}: expected a path as a text; got {value!r}")
    return value


def _key(harvest: Options) -> str:
    fixed = {key: value for key, value in harvest.items() if key not in _EXTENDED}
    text = json.dumps(fixed, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:_KEY_LENGTH]
