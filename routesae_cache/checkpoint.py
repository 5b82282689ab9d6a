"""A run's directory: `config.json`, `metrics.jsonl`, `sae.safetensors`, and what resumes it.

`sae.safetensors` appears when the run has ended, `checkpoint.safetensors` is there until then,
and `failed.json` says why a run was given up. Files appear whole: temporary file, then rename.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import google_crc32c
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from routesae_cache.json_files import CHECKSUM, DamagedJsonError, read_json
from routesae_cache.saes.config import SaeConfig
from routesae_cache.saes.registry import build_sae
from routesae_cache.saes.sae import Sae
from routesae_cache.whole_files import whole_file
from stores.json_checksum import json_checksum
from stores.spec import StoreSpec, check_origin

CONFIG, METRICS, FAILED = "config.json", "metrics.jsonl", "failed.json"
WEIGHTS, CHECKPOINT = "sae.safetensors", "checkpoint.safetensors"

MOST = 2**63 - 1
"""Of a seed, and of everything counted."""
_EXTENDED = ("train_rows", "train_tokens", "exhausted")
"""Of a store's description: what a harvest that extends the store changes."""
_TYPES: Mapping[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (float, int),
    "SaeConfig": (SaeConfig,),
    "dict[str, Any]": (dict,),
}


class RunError(ValueError):
    """A run's directory does not hold what was expected."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything needed to rebuild a run's SAE and to know what it was trained on."""

    name: str
    """Of the run and its directory."""
    sae: SaeConfig
    width: int
    seed: int
    """Of the weights."""
    order_seed: int
    """Of the order of the tokens."""
    lr: float
    batch_tokens: int
    total_steps: int
    epochs: int
    store: str
    """Path as it was given."""
    store_spec: dict[str, Any]
    """The store's description at the time."""
    mean_square: float
    """Of the residuals' elements, over the chunks that are read and the SAE's layers."""
    chunks: int
    """Of the train split, from its first on, that are read: all, unless the run was begun while a
    harvest went on."""
    streams: int = 1
    """That the chunks were dealt out to, which the order of the tokens depends on."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, kinds = getattr(self, field.name), _TYPES[str(field.type)]
            if type(value) not in kinds:
                raise ValueError(f"{field.name}: expected {kinds[0].__name__}, found {value!r}")
        smallest = dict.fromkeys(("width", "batch_tokens", "epochs", "streams"), 1)
        smallest |= dict.fromkeys(("seed", "order_seed", "total_steps", "chunks"), 0)
        for name, least in smallest.items():
            if not least <= (found := getattr(self, name)) <= MOST:
                raise ValueError(f"{name}: expected from {least} to {MOST}, found {found}")
        for name in ("lr", "mean_square"):
            if not 0 <= (found := getattr(self, name)) < math.inf:
                raise ValueError(f"{name}: expected a finite number from 0 on, found {found}")
        if not is_plain_name(self.name):
            raise ValueError(f"name: expected the name of a directory, found {self.name!r}")
        check_origin(self.store_spec)
        if type(self.store_spec.get("context")) is not int:
            raise ValueError(f"store_spec.context: found {self.store_spec.get('context')!r}")

    def to_dict(self) -> dict[str, Any]:
        """A JSON object."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return values | {"sae": self.sae.to_dict()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> RunConfig:
        """The configuration that `to_dict` wrote; RunError names odd keys."""
        if not isinstance(record, Mapping):
            raise RunError(f"expected a JSON object, found {type(record).__name__}")
        record = {"streams": 1, **record}  # not in what was written when there was one alone
        if "chunks" not in record and "store_spec" in record:  # when all had to be there
            record["chunks"] = _train_chunks(record["store_spec"])
        if odd := sorted({f.name for f in dataclasses.fields(cls)} ^ set(record)):
            raise RunError(f"missing or unknown keys: {', '.join(odd)}")
        if not isinstance(record["sae"], Mapping):
            raise RunError(f"sae: expected a JSON object, found {record['sae']!r}")
        try:
            return cls(**{**record, "sae": SaeConfig.from_dict(record["sae"])})
        except ValueError as error:
            raise RunError(str(error)) from error

    def differences(self, other: RunConfig) -> list[str]:
        """What `other` has otherwise, a line each.

        Where the store lies does not count, nor how large it is beyond the chunks that are read.
        """
        grown = [f"store_spec.{name}" for name in _EXTENDED]
        mine, theirs = (_flat(c.to_dict(), skip=("store", *grown)) for c in (self, other))
        return [
            f"{key}: the run has {mine.get(key)!r}, asked for {theirs.get(key)!r}"
            for key in sorted(mine.keys() | theirs.keys())
            if mine.get(key) != theirs.get(key)
        ]


def _train_chunks(store_spec: Any) -> int:
    """Of the store that a description is of; RunError where it is none."""
    if not isinstance(store_spec, Mapping):
        raise RunError(f"store_spec: expected a JSON object, found {store_spec!r}")
    try:
        return len(StoreSpec.from_dict(store_spec).split_chunks("train"))
    except ValueError as error:
        raise RunError(f"store_spec: {error}") from error


def is_plain_name(name: str) -> bool:
    """Whether a text names something in a folder, and nothing outside it."""
    return name not in ("", ".", "..") and "/" not in name and name.isprintable()


def read_config(run: Path) -> RunConfig:
    """The configuration of a run; RunError where there is none or it cannot be read."""
    path = run / CONFIG
    try:
        return RunConfig.from_dict(read_json(path))
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(
            f"{run}: expected a run of `routesae train`, found no {CONFIG} there"
        ) from None
    except DamagedJsonError as error:
        raise RunError(str(error)) from error
    except RunError as error:
        raise RunError(f"{path}: {error}") from error


def save_weights(run: Path, sae: Sae) -> None:
    """Write the finished SAE and drop its checkpoint."""
    _save(run / WEIGHTS, sae.state_dict())
    (run / CHECKPOINT).unlink(missing_ok=True)


def load_run(run: Path, device: str = "cpu") -> tuple[Sae, RunConfig]:
    """A finished run's SAE, in evaluation mode; RunError names what is missing or mis-shaped."""
    config = read_config(run)
    if not (run / WEIGHTS).exists():
        raise RunError(f"{run}: the run has not ended; `routesae train --resume` goes on with it")
    tensors, _ = _load(run / WEIGHTS)
    if sum(tensor.numel() for tensor in tensors.values()) < config.sae.latents * config.width:
        raise RunError(  # before memory is asked for
            f"{run / WEIGHTS} does not fit the run's {CONFIG}: it is too small for "
            f"{config.sae.latents} latents of width {config.width}"
        )
    sae = build_sae(config.sae, config.width, config.seed)
    load_strictly(sae, tensors, run / WEIGHTS)
    return sae.to(device).eval(), config


def save_checkpoint(run: Path, sae: Sae, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write what `load_checkpoint` needs to go on after `step` steps."""
    tensors = {f"sae.{name}": value for name, value in sae.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
    _save(run / CHECKPOINT, tensors, {"step": str(step)})


def load_checkpoint(run: Path, sae: Sae, optimizer: torch.optim.Optimizer) -> int:
    """Restore an SAE and its optimiser; returns the steps taken, 0 where there is no checkpoint."""
    path = run / CHECKPOINT
    if not path.exists():
        return 0
    tensors, about = _load(path)
    prefix = "sae."
    load_strictly(
        sae, {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}, path
    )
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return int(about["step"])


def checkpoint_step(run: Path) -> int:
    """The steps that a run's checkpoint is after, 0 where there is none."""
    path = run / CHECKPOINT
    if not path.exists():
        return 0
    with _opened(path) as file:
        return int(file.metadata()["step"])


def load_strictly(sae: Sae, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load tensors by name; RunError lists every one that is missing, extra or mis-shaped."""
    expected = sae.state_dict()
    faults = [f"{name} is missing" for name in sorted(expected.keys() - tensors.keys())]
    faults += [f"{name} is not known" for name in sorted(tensors.keys() - expected.keys())]
    for name in sorted(expected.keys() & tensors.keys()):
        want, found = expected[name], tensors[name]
        if want.shape != found.shape or want.dtype != found.dtype:
            faults.append(
                f"{name}: expected {want.dtype} {tuple(want.shape)}, "
                f"found {found.dtype} {tuple(found.shape)}"
            )
    if faults:
        raise RunError(f"{path} does not fit the run's {CONFIG}: " + "; ".join(faults))
    sae.load_state_dict(dict(tensors))


def _save(
    path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str] = MappingProxyType({})
) -> None:
    kept = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    size = sum(value.nbytes for value in kept.values())
    with whole_file(path, size) as temporary:
        # one entry: safetensors writes several in any order
        checksums = f"{_checksum(kept, about)} {_settings(path.parent)}"
        save_tensors(kept, temporary, {**about, CHECKSUM: checksums})


def save_tensors(tensors: dict[str, Tensor], path: Path, about: dict[str, str]) -> None:
    """safetensors' `save_file`, with an OSError where it has one put into words."""
    try:
        save_file(tensors, path, about)
    except SafetensorError as error:
        if found := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(found[1]), str(error), str(path)) from error
        raise


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and texts as `_save` wrote them; files of earlier versions have no checksums."""
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = dict(file.metadata() or {})
    checksum, _, settings = about.pop(CHECKSUM, "").partition(" ")
    if checksum not in ("", str(_checksum(tensors, about))):
        raise RunError(f"{path} is damaged: its content does not fit its checksum")
    if settings not in ("", str(_settings(path.parent))):
        raise RunError(f"{path} is another run's: its settings are not those in {CONFIG}")
    return tensors, about


def _settings(run: Path) -> int:
    """Checksum of what tells a run from others; its name and its store may change."""
    skip = ("name", "store", "store_spec", "mean_square")
    return json_checksum({k: v for k, v in read_json(run / CONFIG).items() if k not in skip})


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise RunError(f"{path} is damaged: {error}") from error


def _checksum(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> int:
    """CRC-32C over the texts, and over each tensor's name, type, shape and bytes."""
    described = {name: (str(t.dtype), list(t.shape)) for name, t in sorted(tensors.items())}
    crc = json_checksum([sorted(about.items()), described])
    for name in described:
        values = tensors[name].cpu().reshape(-1).view(torch.uint8).numpy()
        crc = google_crc32c.extend(crc, values)
    return int(crc)


def _flat(
    record: Mapping[str, Any], skip: tuple[str, ...] = (), prefix: str = ""
) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in record.items():
        if prefix + key in skip:
            continue
        if isinstance(value, Mapping):
            flat |= _flat(value, skip, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
