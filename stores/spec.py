"""StoreSpec: what a store holds and where it came from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal

from stores.codecs import ResidualCodec, codec_from_dict

FORMAT_VERSION = 1
Split = Literal["train", "eval", "all"]
Record = dict[str, Any]
"""A JSON object describing where something came from."""

_SIZES = ("n_blocks", "width", "context", "batch_rows", "chunk_rows")
_COUNTS = ("eval_target", "eval_rows", "train_rows", "eval_tokens", "train_tokens")
_ORIGIN: Mapping[str, Mapping[str, tuple[type, ...]]] = {
    "model": {"name": (str,), "dtype": (str,), "weights": (str,), "revision": (str, NoneType)},
    "tokenizer": {"bos_id": (int, NoneType)},
    "text": {"dataset": (str,)},
}
"""What is used of where a store came from; a key that may be None may be missing."""
_GROWING = ("eval_rows", "train_rows", "eval_tokens", "train_tokens", "exhausted")


@dataclass(frozen=True, kw_only=True)
class StoreSpec:
    """The description kept in the store's attributes; everything that decides its bytes."""

    model: Record
    """Name, revision, dtype and fingerprints of configuration and weights of the language model."""
    tokenizer: Record
    """Name, fingerprint, BOS, separator and padding ids."""
    text: Record
    """Data set, files, field, seed."""
    packing: str
    """How documents became rows: `joined` or `document`."""
    layers: tuple[int, ...]
    """Layer l is the residual stream after block l-1; 0 is the embedding. Ascending."""
    n_blocks: int
    """Blocks of the model, for `auto` layer choices."""
    width: int
    context: int
    """Positions in a row, BOS included."""
    codec: ResidualCodec
    batch_rows: int
    """Rows in one forward pass; a batch never crosses a chunk."""
    chunk_rows: int
    eval_target: int
    """Tokens asked for in the eval split."""
    eval_rows: int = 0
    """Rows [0, eval_rows) are the eval split, a whole number of chunks; the others train."""
    train_rows: int = 0
    eval_tokens: int = 0
    """Real tokens in the eval rows: BOS included, padding not."""
    train_tokens: int = 0
    exhausted: bool = False
    """The text ran out: there are no further rows to be had."""
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        least = dict.fromkeys(_SIZES, 1) | dict.fromkeys(_COUNTS, 0)
        for name, smallest in least.items():
            if (found := getattr(self, name)) < smallest:
                raise ValueError(f"{name}: expected at least {smallest}, found {found}")
        ascending = self.layers and list(self.layers) == sorted(set(self.layers))
        if not ascending or self.layers[0] < 0 or self.layers[-1] > self.n_blocks:
            raise ValueError(
                f"layers: expected ascending and distinct from 0 to {self.n_blocks}, "
                f"found {self.layers}"
            )
        if self.train_rows and self.eval_rows % self.chunk_rows:
            raise ValueError(
                f"eval_rows: expected whole chunks of {self.chunk_rows}, found {self.eval_rows}"
            )
        check_origin({"model": self.model, "tokenizer": self.tokenizer, "text": self.text})
        self.codec.layout(self.width)

    @property
    def rows(self) -> int:
        return self.eval_rows + self.train_rows

    @property
    def chunks(self) -> int:
        return -(-self.rows // self.chunk_rows)

    @property
    def tokens(self) -> int:
        return self.eval_tokens + self.train_tokens

    @property
    def values_per_token(self) -> int:
        return len(self.layers) * self.width

    def chunk_range(self, chunk: int) -> slice:
        """Rows of one chunk."""
        return slice(chunk * self.chunk_rows, min((chunk + 1) * self.chunk_rows, self.rows))

    def chunk_tokens(self, chunk: int) -> int:
        """Tokens in the rows of one chunk, padding included."""
        return len(range(self.rows)[self.chunk_range(chunk)]) * self.context

    def split_chunks(self, split: Split) -> range:
        """Chunks of a split; the eval split comes first and ends at a chunk border."""
        border = -(-self.eval_rows // self.chunk_rows)
        return {
            "eval": range(border),
            "train": range(border, self.chunks),
            "all": range(self.chunks),
        }[split]

    def positions(self, layers: tuple[int, ...]) -> tuple[int, ...]:
        """Indices into `layers` of the store; ValueError names the ones it lacks."""
        missing = [l for l in layers if l not in self.layers]
        if missing:
            raise ValueError(
                f"layers {missing} are not in the store; it has {', '.join(map(str, self.layers))}"
            )
        return tuple(self.layers.index(l) for l in layers)

    def to_dict(self) -> Record:
        """A JSON object."""
        record = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return record | {"codec": self.codec.to_dict(), "layers": list(self.layers)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> StoreSpec:
        """The spec that `to_dict` wrote; ValueError says what is missing or malformed."""
        names = {f.name for f in dataclasses.fields(cls)}
        if names != set(record):
            odd = sorted(names ^ set(record))
            raise ValueError(f"store description: missing or unknown: {', '.join(odd)}")
        values = dict(record)
        for field in dataclasses.fields(cls):
            expected = _JSON_TYPES[str(field.type)]
            if type(values[field.name]) is not expected:
                raise ValueError(
                    f"store description: {field.name}: expected {expected.__name__}, "
                    f"found {values[field.name]!r}"
                )
        if not all(type(l) is int for l in values["layers"]):
            raise ValueError(f"store description: layers: found {values['layers']}")
        values["layers"] = tuple(values["layers"])
        values["codec"] = codec_from_dict(values["codec"])
        return cls(**values)

    def differences(self, asked: StoreSpec) -> list[str]:
        """What `asked` wants otherwise, a line each; row counts do not count."""
        have, want = self.to_dict(), asked.to_dict()
        for name in _GROWING:
            have.pop(name), want.pop(name)
        return list(_differences("", have, want))


def check_origin(record: Record) -> None:
    """ValueError where a store's description lacks what is used of where it came from."""
    for part, keys in _ORIGIN.items():
        found = record.get(part)
        for key, kinds in keys.items():
            value = found.get(key) if isinstance(found, dict) else None
            if not isinstance(found, dict) or type(value) not in kinds:
                raise ValueError(
                    f"store description: {part}.{key}: expected {kinds[0].__name__}, "
                    f"found {(value if isinstance(found, dict) else found)!r}"
                )


_JSON_TYPES: Mapping[str, type] = {
    "Record": dict,
    "ResidualCodec": dict,
    "tuple[int, ...]": list,
    "str": str,
    "int": int,
    "bool": bool,
}


def _differences(prefix: str, have: Record, want: Record) -> Iterator[str]:
    for key in sorted(have.keys() | want.keys()):
        name, old, new = prefix + key, have.get(key), want.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(f"{name}.", old, new)
        elif old != new:
            yield f"{name}: the store has {old!r}, asked for {new!r}"
