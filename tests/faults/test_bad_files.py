"""TOML files, stores' attributes, runs' config.json and contexts with everything in them wrong."""

from __future__ import annotations

import copy
import datetime
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from routesae_cache.checkpoint import CONFIG, RunError, load_run
from routesae_cache.interpretation.excerpts import read_excerpts
from routesae_cache.json_files import read_json
from stores.errors import StoreError
from stores.layout import ATTRIBUTE
from stores.reader import StoreReader
from tests.faults.bad_commands import COMMANDS, EXAMPLES, Place, fault, line, no_hang, options
from tests.faults.tally import Tally

GONE = object()
HUGE = (2**31, 2**63, 10**18, 10**40, 1e300)
VALUES: tuple[Any, ...] = (
    *(GONE, None, True, 0, -1, 0.5, -0.0, float("nan"), float("inf"), *HUGE, -(10**40)),
    *("", "x", "0", "../x", "\x1b[2J", "x" * 10_000, [], [0], [[]], [None], {}, {"a": {"b": 1}}),
)
_TOML: tuple[Any, ...] = (
    *(v for v in VALUES if v is not GONE and v is not None),
    *(datetime.date(2026, 1, 1), ["a", 1], [1, 1], [-1, 2**70]),
)


def places(record: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a value is in nested objects and lists; only the first item of a list."""
    items = record.items() if isinstance(record, dict) else ()
    if isinstance(record, list):
        items = enumerate(record[:1])
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def changed(record: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy with something else in one place, or nothing."""
    record = copy.deepcopy(record)
    inner = record
    for key in path[:-1]:
        inner = inner[key]
    if value is GONE:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return record


def variants(record: Any) -> Iterator[tuple[str, Any]]:
    """The record with some of the values in each place, by hand with all; and one key too many."""
    for number, path in enumerate(places(record)):
        few = [VALUES[(number * 3 + turn * 5) % len(VALUES)] for turn in range(6)]
        for value in VALUES if EXAMPLES else [GONE, *few]:
            yield f"{path}: {value!r:.40}", changed(record, path, value)
    yield "a key too many", record | {"colour": "blue"}
    yield from ((f"{value!r:.40}", value) for value in VALUES if value is not GONE)


def refused_or_harmless(
    place: Place,
    file: Path,
    records: Iterable[tuple[str, Any]],
    read: Callable[[], object],
    refusal: tuple[type[Exception], str],
    *commands: str,
) -> int:
    """Try records in a file; returns how many.

    `read` refuses each of them with an error of that kind and with those words in it, or the
    commands come to no bad end.
    """
    original, wrong, tried = file.read_bytes(), [], 0
    kind, named = refusal
    try:
        for what, record in records:
            file.write_text(json.dumps(record))
            tried += 1
            try:
                with no_hang(60):
                    read()
            except kind as error:
                if named not in str(error):
                    wrong.append(f"{what}: {error}")
                continue
            for words in commands:
                told = fault(place, line(words, COMMANDS[words], place, {}))
                wrong += [f"{what}: {told}"] if told else []
    finally:
        file.write_bytes(original)
    assert not wrong, "\n".join(wrong)
    return tried


def test_a_stores_attributes(place: Place, tally: Tally) -> None:
    store = place.folder / "s.zarr"
    original = json.loads((store / "zarr.json").read_bytes())
    tried = refused_or_harmless(
        place,
        store / "zarr.json",
        (
            (what, original | {"attributes": {ATTRIBUTE: record}})
            for what, record in variants(original["attributes"][ATTRIBUTE])
        ),
        lambda: StoreReader(store).chunks("all", complete=False),
        (StoreError, "s.zarr"),
        *("store info", "store verify"),
    )
    tally.add("a bad value in a store's attributes", tried=tried, survived=tried)


def test_a_runs_configuration(place: Place, tally: Tally) -> None:
    run = place.folder / "run"
    tried = refused_or_harmless(
        place,
        run / CONFIG,
        variants(read_json(run / CONFIG)),
        lambda: load_run(run),
        (RunError, str(run)),
        *("evaluate", "export"),
    )
    tally.add("a bad value in a run's config.json", tried=tried, survived=tried)


def test_contexts(place: Place, tally: Tally) -> None:
    file = place.folder / "contexts.json"
    tried = refused_or_harmless(
        place,
        file,
        variants(read_json(file)),
        lambda: read_excerpts(file, sample=3, seed=0, hold_out=True),
        (ValueError, str(file)),
        "interpret",
    )
    tally.add("a bad value in contexts", tried=tried, survived=tried)


# TOML


def toml(value: Any) -> str:
    """A value as TOML has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join("1" if v is None else toml(v) for v in value) + "]"
    return json.dumps(value) if isinstance(value, str) else str(value)


def experiment(table: str, key: str, value: str) -> str:
    """An experiment's file with one more line in one of its tables."""
    tables = {"": 'out = "made"\n', "train": "epochs = 1\n", "sae": 'sae = "topk"\nk = 4\n'}
    tables |= dict.fromkeys(("harvest", "evaluate", "contexts", "interpret", "report"), "")
    bad = f"{json.dumps(key)} = {value}\n"
    own = [text for text in tables[table].splitlines() if not text.startswith(f"{key} =")]
    tables[table] = "\n".join([*own, bad])
    heads = {
        name: f"[[{name}]]" if name == "sae" else f"[{name}]" if name else "" for name in tables
    }
    return "".join(f"{heads[name]}\n{text}" for name, text in tables.items())


def keys() -> Iterator[tuple[str, str]]:
    """Every table and key that means something, and some that do not."""
    sae = ("sae", "layer", "layers", "latents", "k", "auxk", "norm", "seed", "lr", "bandwidth")
    train = ("epochs", "tokens", "batch_tokens", "log_every", "checkpoint_seconds", "preset", *sae)
    yield from (("sae", key) for key in (*sae, "colour", ""))
    yield from (
        ("train", key) for key in (*train[:-10], "latents", "seed", "lr", "colour", "\u202e")
    )
    for stage in ("harvest", "evaluate", "contexts", "interpret", "report"):
        yield from ((stage, p.name) for p in options(COMMANDS[stage]))
        yield stage, "colour"
    top = ("out", "store", "sweep", "harvest", "evaluate", "train", "sae", "colour")
    yield from (("", key) for key in top)


@pytest.mark.parametrize(
    "table", ["", "sae", "train", "harvest", "evaluate", "contexts", "interpret", "report"]
)
def test_toml_files(table: str, place: Place, tally: Tally) -> None:
    file = place.folder / "fuzzed.toml"
    wrong, tried = [], 0
    found = [key for at, key in keys() if at == table]
    for number, key in enumerate(found):
        # those of the other stages are read as the command line's are
        for turn in range(len(_TOML) if EXAMPLES else 3 if table in ("", "sae", "train") else 1):
            value = _TOML[(number * 5 + turn * 11) % len(_TOML)]
            file.write_text(experiment(table, key, toml(value)))
            tried += 1
            commands = ("pipeline", "sweep") if table in ("sae", "train") else ("pipeline",)
            for words in commands:
                dry = frozenset({"dry_run"} if words == "pipeline" else ())
                arguments = line(words, COMMANDS[words], place, {"file": "fuzzed.toml"}, dry)
                told = fault(place, arguments)
                wrong += [f"[{table}] {key} = {value!r:.40}: {told}"] if told else []
    file.unlink()
    assert not wrong, "\n".join(wrong)
    tally.add("a bad value in a TOML file", tried=tried, survived=tried)
