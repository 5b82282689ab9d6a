"""Where a model's name leads: a folder, a GGUF file or the hub. Nothing is loaded here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from routesae_cache.hub import HUB_FAILURES, advice, current_commit, problem_of
from routesae_cache.presets import MODELS, hub_id, wheel_path

_GGUF_MAGIC = b"GGUF"


class ModelError(ValueError):
    """A model or tokenizer that cannot be found or used as asked."""


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """What a model's name was found to mean."""

    name: str
    """What the model is called from here on: the preset, the hub id, or the last part of a path."""
    kind: Literal["folder", "gguf", "hub"]
    location: str
    """The path of the folder or file, or the hub id."""
    revision: str | None = None
    """The hub's commit, or what was asked for where the hub could not be reached."""
    cached_only: bool = False
    """The hub could not be reached; what was downloaded before may still do."""
    own_code: bool = False
    """The code that comes with it may be run; `with_own_code` alone says so."""


def resolve_model(name: str | ModelSource, *, revision: str | None = None) -> ModelSource:
    """Find the preset, folder, `.gguf` file or hub id that a name stands for.

    What was found before is returned as it is.
    UnknownNameError or MissingWheelError for a name that stands for nothing here; ModelError for
    a path without a model, and for a model the hub does not have or does not let one have. A hub
    that cannot be reached is no error yet: the model may have been downloaded before.
    """
    if isinstance(name, ModelSource):
        return name
    if name in MODELS:
        source = MODELS[name].source
        if isinstance(source, str):
            return _on_hub(name, source, revision)
        return _local(name, wheel_path(source), revision)
    path = Path(name).expanduser()
    if path.exists():
        return _local(path.resolve().name, path, revision)
    return _on_hub(name, hub_id("model", name, (".gguf",)), revision)


def _local(name: str, path: Path, revision: str | None) -> ModelSource:
    if revision is not None:
        raise ModelError(f"{name!r} is local and has no revisions; leave {revision!r} out")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"the folder {path} holds no model: it has no config.json")
        return ModelSource(name=name, kind="folder", location=str(path))
    with path.open("rb") as file:
        if file.read(len(_GGUF_MAGIC)) != _GGUF_MAGIC:
            raise ModelError(f"{path} is not a GGUF file; expected one, a model's folder, a hub id")
    return ModelSource(name=name, kind="gguf", location=str(path))


def _on_hub(name: str, repository: str, revision: str | None) -> ModelSource:
    try:
        commit = current_commit("model", repository, revision)
    except HUB_FAILURES as failure:
        match problem_of(failure):
            case None:
                raise
            case "unreachable":
                return ModelSource(
                    name=name,
                    kind="hub",
                    location=repository,
                    revision=revision,
                    cached_only=True,
                )
            case problem:
                raise ModelError(advice(problem, "model", repository)) from failure
    return ModelSource(name=name, kind="hub", location=repository, revision=commit)
