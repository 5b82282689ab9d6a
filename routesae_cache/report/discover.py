"""What lies below a folder: finished runs, and the results that stages have left about them."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from routesae_cache.checkpoint import CONFIG, WEIGHTS, RunConfig, read_config
from routesae_cache.json_files import DamagedJsonError, read_json
from routesae_cache.loggers import read_metrics
from stores.spec import Record

logger = logging.getLogger(__name__)

KINDS = ("evaluation", "contexts", "interpretation")


class ReportError(ValueError):
    """What was found cannot be made a report of."""


class Result(NamedTuple):
    """One JSON file of a stage; of contexts without the contexts themselves, which are many."""

    path: Path
    record: Record

    @property
    def modified(self) -> float:
        """When it was written."""
        return self.path.stat().st_mtime


@dataclass(frozen=True, kw_only=True)
class FoundRun:
    """One SAE and everything known about it."""

    id: str
    """Its name, or its path below the folder where two runs have one name."""
    folder: Path
    config: RunConfig
    metrics: list[Record]
    """The lines of its training's metrics."""
    evaluation: Record | None
    """Its newest result on held-out tokens."""
    spliced: Record | None
    """Its newest result of splicing."""
    contexts: Result | None
    """The contexts to browse: those that were interpreted, otherwise the newest."""
    summaries: tuple[Record, ...]
    """The summaries of all its contexts, whatever their threshold."""
    interpretation: Record | None
    """Of `contexts`."""


def discover(root: Path) -> list[FoundRun]:
    """Find runs and results below a folder, whatever their place in it.

    Results are matched with runs by the path they name, otherwise by the run's name. Stores are
    not entered. ReportError where there is no finished run, or a result is not what the stage
    writes.
    """
    folders: list[Path] = []
    results: list[Result] = []
    for folder, files in _folders(root):
        if CONFIG in files and WEIGHTS in files:
            folders.append(folder)
        results += _results(folder / name for name in files if name.endswith(".json"))
    if not folders:
        raise ReportError(
            f"{root}: expected finished runs of `routesae train` in it, found none; "
            "train some with --out in this folder"
        )
    by_kind = {kind: [r for r in results if r.record["kind"] == kind] for kind in KINDS}
    configs = {folder: read_config(folder) for folder in folders}
    matcher = _Matcher(configs)
    evaluations = _by_run(matcher, _evaluations(by_kind["evaluation"]))
    contexts = _by_run(matcher, by_kind["contexts"])
    ids = _ids(root, configs)
    return [
        _found(
            ids[folder],
            folder,
            configs[folder],
            evaluations.get(folder, []),
            contexts.get(folder, []),
            by_kind["interpretation"],
        )
        for folder in folders
    ]


def _found(
    id: str,
    folder: Path,
    config: RunConfig,
    evaluations: list[Result],
    contexts: list[Result],
    interpretations: list[Result],
) -> FoundRun:
    spliced = [result.record for result in evaluations if result.record["spliced"]]
    browsed, interpretation = _browsed(contexts, interpretations)
    return FoundRun(
        id=id,
        folder=folder,
        config=config,
        metrics=read_metrics(folder),
        evaluation=evaluations[-1].record if evaluations else None,
        spliced=spliced[-1] if spliced else None,
        contexts=browsed,
        summaries=tuple(result.record["summary"] for result in contexts),
        interpretation=interpretation,
    )


def _folders(root: Path) -> Iterator[tuple[Path, set[str]]]:
    if not root.is_dir():
        raise ReportError(f"{root}: expected a folder with runs, found none")
    for name, folders, files in os.walk(root):
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        if "zarr.json" in files:  # a store: thousands of files, none of them a result
            folders.clear()
            continue
        yield Path(name), set(files)


def _results(paths: Iterable[Path]) -> Iterator[Result]:
    """The files that say which stage they are from."""
    for path in sorted(paths):
        try:
            record = read_json(path)
        except DamagedJsonError as error:
            logger.warning("left out: %s", error)
            continue
        if isinstance(record, dict) and record.get("kind") in KINDS:
            _check(path, record)
            record.pop(TEXTS, None)
            yield Result(path, record)


def read_texts(result: Result) -> Record:
    """The contexts of each latent and token in a contexts file."""
    texts: Record = read_json(result.path)[TEXTS]
    return texts


TEXTS = "latent_context_map"
_KEYS = {
    "evaluation": ("store", "split", "results"),
    "contexts": (
        *("run", "name", "store", "tokens", "threshold", "total_latents", "summary"),
        *("latents", TEXTS),
    ),
    "interpretation": ("contexts", "name", "averages", "latents"),
}


def _check(path: Path, record: Record) -> None:
    missing = [key for key in _KEYS[record["kind"]] if key not in record]
    for one in record.get("results", ()):
        missing += [f"results.{key}" for key in ("run", "name") if key not in one]
    if missing:
        raise ReportError(
            f"{path}: expected the {record['kind']} that a stage writes, found no "
            f"{', '.join(missing)}; make it again or remove it"
        )


def _evaluations(results: list[Result]) -> Iterator[Result]:
    """A result for each run of each file; those on the train split come first."""
    for result in sorted(results, key=lambda r: (r.record["split"] == "eval", r.modified)):
        for one in result.record["results"]:
            store = {"store": result.record["store"], "split": result.record["split"]}
            yield Result(result.path, {"spliced": None} | one | store)


def _by_run(matcher: _Matcher, results: Iterable[Result]) -> dict[Path, list[Result]]:
    """Each run's results, the best last."""
    found: dict[Path, list[Result]] = {}
    for result in results:
        folder = matcher.find(result.record)
        if folder is None:
            name = result.record["name"]
            logger.warning("%s: its run %s is not in the folder, left out", result.path, name)
        else:
            found.setdefault(folder, []).append(result)
    return found


class _Matcher:
    """Finds the run that a result is about."""

    def __init__(self, configs: dict[Path, RunConfig]) -> None:
        self._by_path = {folder.resolve(): folder for folder in configs}
        self._by_name: dict[str, list[Path]] = {}
        for folder, config in configs.items():
            self._by_name.setdefault(config.name, []).append(folder)

    def find(self, record: Record) -> Path | None:
        """By its path, which may be from another place or machine, otherwise by a unique name."""
        path = Path(record["run"])
        if (folder := self._by_path.get(path.resolve())) is not None:
            return folder
        named = self._by_name.get(record["name"], [])
        if len(named) > 1:
            named = [folder for folder in named if folder.parts[-2:] == path.parts[-2:]]
        return named[0] if len(named) == 1 else None


def _browsed(
    contexts: list[Result], interpretations: list[Result]
) -> tuple[Result | None, Record | None]:
    newest_first = sorted(contexts, key=lambda result: result.modified, reverse=True)
    for result in newest_first:
        for other in interpretations:
            # what was moved keeps its name
            same_file = Path(other.record["contexts"]).name == result.path.name
            if same_file and other.record["name"] == result.record["name"]:
                return result, other.record
    return (newest_first[0] if newest_first else None), None


def _ids(root: Path, configs: dict[Path, RunConfig]) -> dict[Path, str]:
    count = Counter(config.name for config in configs.values())
    return {
        folder: config.name if count[config.name] == 1 else folder.relative_to(root).as_posix()
        for folder, config in configs.items()
    }


def thinned(records: list[Any], most: int) -> list[Any]:
    """At most so many of a list, evenly spaced, first and last included."""
    if len(records) <= most:
        return records
    return [records[round(i * (len(records) - 1) / (most - 1))] for i in range(most)]
