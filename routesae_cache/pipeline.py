"""Which stages of an experiment have their results, made from what is there now.

After a stage, `pipeline.json` records its options, and fingerprints of what it read and of what it
made. A stage is done while all three are as recorded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from routesae_cache.checkpoint import CONFIG, FAILED, WEIGHTS
from routesae_cache.experiment import STAGES, Experiment, Options, Stage
from routesae_cache.json_files import read_json, write_json
from routesae_cache.runs import run_names
from routesae_cache.sweep import complete
from stores.layout import read_spec
from stores.place import Place
from stores.places import as_place

STATE = "pipeline.json"
_DESCRIPTION = "zarr.json"
_WHOLE_BYTES = 1 << 28  # larger files are sampled at both ends
_SAMPLE_BYTES = 1 << 20

Fingerprints = dict[str, str]
"""Of files and folders, by path."""


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """A stage that was finished."""

    options: dict[str, Any]
    inputs: Fingerprints
    outputs: Fingerprints
    seconds: float


class Records:
    """What `pipeline.json` of an experiment says.

    Raises:
        ValueError: for a file that holds something else.
    """

    def __init__(self, out: Path) -> None:
        self._path = out / STATE
        self._records: dict[str, StageRecord] = {}
        if self._path.exists():
            self._records = _read_records(self._path)

    def get(self, stage: Stage) -> StageRecord | None:
        return self._records.get(stage)

    def set(self, stage: Stage, record: StageRecord) -> None:
        """Record a stage and write the file."""
        self._records[stage] = record
        self._path.parent.mkdir(parents=True, exist_ok=True)
        stages = {name: asdict(each) for name, each in self._records.items()}
        write_json(self._path, {"kind": "pipeline", "stages": stages})


class Pipeline:
    """The stages of an experiment and the files between them."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.records = Records(experiment.out)

    def runs(self) -> list[Path]:
        """Folders of the experiment's runs; their names follow from the store."""
        spec = read_spec(self.experiment.store)
        sweep = self.experiment.sweep
        names = run_names(complete(sweep.specs, spec, seed=sweep.train.get("seed", 42)))
        return [self.experiment.saes / name for name in names]

    def finished_runs(self) -> list[Path]:
        """Those that did not fail."""
        return [run for run in self.runs() if (run / WEIGHTS).exists()]

    def why(self, stage: Stage) -> str | None:
        """Why a stage has to be run, in words; None where its result is there.

        All stages before it are done.
        """
        record = self.records.get(stage)
        if record is None:
            return "no result yet"
        if changes := list(_changes(record.options, self._options(stage))):
            return "; ".join(changes)
        if changed := _changed(record.inputs, fingerprints(self.inputs(stage))):
            return "changed: " + ", ".join(changed)
        if changed := _changed(record.outputs, fingerprints(self._outputs(record))):
            return "its result is not the one it made: " + ", ".join(changed)
        return None

    def _outputs(self, record: StageRecord) -> list[Path | Place]:
        """What a stage made; ValueError where that is not the experiment's."""
        experiment, found = self.experiment, list[Path | Place]()
        for name in record.outputs:
            if name == str(experiment.store):
                found.append(experiment.store)
            elif Path(name).resolve().is_relative_to(experiment.out.resolve()):
                found.append(Path(name))
            else:
                raise ValueError(
                    f"{experiment.out / STATE} names {name} as a result, which is neither in "
                    f"{experiment.out} nor the store; remove the file to run every stage again"
                )
        return found

    def inputs(self, stage: Stage) -> list[Path | Place]:
        """Files and folders that a stage reads."""
        experiment = self.experiment
        match stage:
            case "harvest":
                return []
            case "train":
                return [experiment.store]
            case "evaluate" | "contexts":
                return [experiment.store, *self.finished_runs()]
            case "interpret":
                return [*self.made_by("contexts")]
            case "report":
                records = (self.records.get(stage) for stage in STAGES[:-1])
                return [path for record in records if record for path in self._outputs(record)]

    def _options(self, stage: Stage) -> dict[str, Any]:
        """A stage's options as JSON has them, which knows no dates and no tuples."""
        options: dict[str, Any] = json.loads(
            json.dumps(self.experiment.options[stage], default=str)
        )
        return options

    def made_by(self, stage: Stage) -> list[Path]:
        """Files that a stage made when it was last run; ValueError as `_outputs`."""
        record = self.records.get(stage)
        outputs = self._outputs(record) if record else []
        return [path for path in outputs if isinstance(path, Path)]

    def finish(self, stage: Stage, outputs: Sequence[Path | Place], seconds: float) -> None:
        """Record that a stage has just been run."""
        record = StageRecord(
            options=self._options(stage),
            inputs=fingerprints(self.inputs(stage)),
            outputs=fingerprints(outputs),
            seconds=round(seconds, 1),
        )
        self.records.set(stage, record)


def fingerprints(paths: Iterable[Path | Place]) -> Fingerprints:
    """What tells one content from another, by path; `missing` where there is none."""
    return {str(path): fingerprint(path) for path in paths}


def fingerprint(path: Path | Place) -> str:
    """A sha256 over a file, a run or a store; of a store, over its description and digests."""
    if isinstance(path, Place) or (path / _DESCRIPTION).exists():
        return _fingerprint_of_store(as_place(path))
    digest = hashlib.sha256()
    for part in _parts(path):
        digest.update(f"{part.relative_to(path)}\n".encode())
        for block in _blocks(part):
            digest.update(block)
    return digest.hexdigest() if path.exists() else "missing"


def _fingerprint_of_store(store: Place) -> str:
    if not store.exists():
        return "missing"
    digest = hashlib.sha256()
    keys = [_DESCRIPTION]
    for name in sorted(store.names("digest/c")):
        keys += [f"digest/c/{name}", f"digest/c/{name}/0"]
    for key, read in zip(keys, store.fetch(keys), strict=True):
        digest.update(f"{key}\n".encode())
        with suppress(FileNotFoundError, IsADirectoryError):  # missing is another fingerprint
            content = read()
            digest.update(f"{len(content)}\n".encode() + content)
    return digest.hexdigest()


def _parts(path: Path) -> list[Path]:
    """The files that stand for a path."""
    if path.is_file():
        return [path]
    return [path / name for name in (CONFIG, WEIGHTS, FAILED) if (path / name).exists()]


def _blocks(path: Path) -> Iterator[bytes]:
    if path.is_dir():
        return
    size = path.stat().st_size
    yield f"{size}\n".encode()
    with path.open("rb") as file:
        if size <= _WHOLE_BYTES:
            while block := file.read(_SAMPLE_BYTES):
                yield block
            return
        yield file.read(_SAMPLE_BYTES)
        file.seek(-_SAMPLE_BYTES, 2)
        yield file.read(_SAMPLE_BYTES)


def _read_records(path: Path) -> dict[str, StageRecord]:
    try:
        stages = read_json(path)["stages"]
        return {name: StageRecord(**record) for name, record in stages.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not what a pipeline wrote ({error}); remove it to run every stage again"
        ) from error


def _changed(recorded: Fingerprints, found: Fingerprints) -> list[str]:
    paths = sorted(recorded.keys() | found.keys())
    return [Path(path).name for path in paths if recorded.get(path) != found.get(path)]


def _changes(recorded: Options, asked: Options, prefix: str = "") -> Iterator[str]:
    for key in sorted(recorded.keys() | asked.keys()):
        old, new, name = recorded.get(key), asked.get(key), prefix + key
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _changes(old, new, f"{name}.")
        elif old != new:
            yield f"{name}: {_short(old)} → {_short(new)}"


def _short(value: Any) -> str:
    text = "not given" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}…"
