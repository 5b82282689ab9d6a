"""Which model it was: enough to tell two apart, quick enough for large ones."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

# Configuration keys that say how a model was saved or loaded, not what it computes.
_VOLATILE = {"transformers_version", "_name_or_path", "_commit_hash", "dtype", "torch_dtype"}

_SAMPLE = 4096


@dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """What decides a model's residuals, apart from rounding."""

    name: str
    """The preset, the hub id, or the last part of the local path."""
    revision: str | None
    """The hub's commit, where it is known."""
    config_hash: str
    """sha256 of the configuration as it was saved, and of code that came with it."""
    weights: str
    """sha256 of a sample of every weight."""
    dtype: str
    """That of the forward pass."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        return cls(**fields)


def config_hash(config: Mapping[str, Any], code: Iterable[Path] = ()) -> str:
    """sha256 of a configuration's canonical JSON, without what varies from save to save.

    `code`: source files that decide, too, what the model computes; wherever they are.
    """
    canonical = json.dumps(_stable(config), sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(canonical.encode())
    for file in sorted(code, key=lambda file: file.name):
        digest.update(f"\n{file.name} {file.stat().st_size}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def weights_hash(model: nn.Module) -> str:
    """sha256 over every saved parameter and buffer: name, dtype, shape, at most 4096 values.

    The values are evenly spaced, an odd number apart, so that they do not keep to one column of
    a matrix whose width is even. Buffers that are computed from the configuration are left out.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().reshape(-1)
        spacing = -(-values.numel() // _SAMPLE) | 1
        sample = values[::spacing].contiguous().cpu().view(torch.uint8)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def _stable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _stable(inner) for key, inner in value.items() if key not in _VOLATILE}
    return value
