"""What a harvest is going to do, known before any of it is done."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path

from routesae_cache.devices import resolve_device
from routesae_cache.estimate import forward_seconds
from routesae_cache.layers import parse_layers
from routesae_cache.lm import (
    Dtype,
    ModelShape,
    ModelSource,
    block_parameters,
    model_shape,
    resolve_model,
)
from routesae_cache.presets import ModelSizes
from routesae_cache.text import TextConfig, TextSource, open_text
from routesae_cache.tokens import Packing, Tokenizer, load_tokenizer
from stores.codecs import DeltaCodec, ResidualCodec
from stores.errors import SpecMismatchError
from stores.layout import committed_chunks, read_spec
from stores.place import Place
from stores.places import Where, as_place
from stores.spec import Record, StoreSpec

_CHUNK_VALUES = 1 << 22  # of one layer: a few MB of codes
_CPU_BATCH_ROWS, _GPU_BATCH_ROWS = 4, 32
_UNKNOWN = "not known before the model is loaded"


@dataclass(frozen=True, kw_only=True)
class HarvestConfig:
    """What to harvest, and to where."""

    model: str | ModelSource
    dataset: str
    out: Where
    """A path or a URL."""
    tokens: int
    """Tokens of the train split, rounded up to whole chunks; more than there are extends."""
    eval_tokens: int
    """Tokens of the eval split, which comes first; rounded up to whole chunks."""
    layers: str = "auto"
    context: int = 512
    codec: ResidualCodec = field(default_factory=DeltaCodec)
    packing: Packing = "joined"
    text_field: str | None = None
    split: str = "train"
    seed: int = 42
    dtype: Dtype = "bfloat16"
    revision: str | None = None
    """Of a model that is given by its name."""
    attention: str | None = None
    device: str = "auto"
    batch_rows: int | None = None
    chunk_rows: int | None = None

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.eval_tokens < 0:
            raise ValueError(
                f"expected tokens of at least 1 and eval tokens of at least 0, "
                f"found {self.tokens} and {self.eval_tokens}"
            )
        if self.context < 2:
            raise ValueError(f"context: expected at least 2 positions, found {self.context}")
        for name in ("batch_rows", "chunk_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, found {value}")


@dataclass(frozen=True, kw_only=True)
class HarvestPlan:
    """A harvest that was checked as far as it can be without loading the model."""

    config: HarvestConfig
    model: ModelSource
    tokenizer: Tokenizer | None
    """None for workers elsewhere, which write no token rows and may not know its class."""
    text: TextSource | None
    """None where the store already has all token rows it is to have."""
    spec: StoreSpec
    """Without row counts, and without the model's fingerprints unless a store is there."""
    existing: StoreSpec | None
    device: str
    tokens: int
    """Tokens in the finished store, before rounding up to whole chunks."""
    tokens_left: int
    """Tokens whose residuals are still to be computed."""
    bytes_left: int
    """Estimate of what is still to be written."""
    bytes_free: int | None
    """None where there is no limit."""
    seconds_left: float | None
    """Estimate of the forward passes, from the rate of a matrix product measured just now; None
    where they are not this machine's."""

    @property
    def complete(self) -> bool:
        """Nothing is left to be done."""
        return self.text is None and self.tokens_left == 0

    def check_disk(self) -> None:
        """ValueError where the estimate does not fit the disk."""
        if self.bytes_free is not None and self.bytes_left > self.bytes_free:
            raise ValueError(
                f"{self.config.out}: about {self.bytes_left / 1e6:,.0f} MB are still to "
                f"be written, {self.bytes_free / 1e6:,.0f} MB are free; free space, or ask for "
                "fewer tokens, fewer layers or a coarser --step"
            )


def default_chunk_rows(context: int, width: int) -> int:
    """The power of two that comes closest to a few MB a layer."""
    return 1 << max(0, round(math.log2(_CHUNK_VALUES / (context * width))))


def plan_harvest(config: HarvestConfig, *, here: bool = True) -> HarvestPlan:
    """Resolve names, compare with the store that is there, estimate size and time.

    `here` is False where other machines have the device.
    Raises ValueErrors: for what the model, text and layers cannot be; SpecMismatchError where
    `config.out` holds something harvested otherwise; StoreError where it is no store.
    """
    source = resolve_model(config.model, revision=config.revision)
    shape = model_shape(source)
    if shape.context_limit is not None and config.context > shape.context_limit:
        raise ValueError(f"context {config.context} is beyond the model's {shape.context_limit}")
    tokenizer = load_tokenizer(source)
    device = resolve_device(config.device) if here else config.device
    out = as_place(config.out)
    existing = _existing(out)
    text = _text(config, existing)
    asked = _spec(config, source, shape, tokenizer, text, device)
    if existing is not None:
        asked = _with_unknowns_of(existing, asked)
        if differences := existing.differences(asked):
            raise SpecMismatchError(out, differences)
    grows = existing is None or (config.tokens > existing.train_tokens and not existing.exhausted)
    if existing is not None and grows:
        tokens = max(config.tokens, existing.train_tokens) + existing.eval_tokens
    else:
        tokens = existing.tokens if existing else config.tokens + config.eval_tokens
    left = tokens - _tokens_done(out, existing)
    per_token = asked.codec.estimated_bits(len(asked.layers), shape.width) / 8
    seconds_left = left * _seconds_per_token(source, asked, device) if here and left else 0.0
    return HarvestPlan(
        config=config,
        model=source,
        tokenizer=tokenizer,
        text=text if grows else None,
        spec=asked,
        existing=existing,
        device=device,
        tokens=tokens,
        tokens_left=left,
        bytes_left=int(left * asked.values_per_token * per_token),
        bytes_free=out.free_bytes(),
        seconds_left=seconds_left if here else None,
    )


def _existing(out: Place) -> StoreSpec | None:
    if not out.exists():
        return None
    spec = read_spec(out)
    return spec if spec.rows else None  # a harvest that was stopped before its rows were complete


def _text(config: HarvestConfig, existing: StoreSpec | None) -> TextSource | None:
    """The text, which an interrupted harvest needs no more once its token rows are written."""
    text = TextConfig(
        dataset=config.dataset, text_field=config.text_field, split=config.split, seed=config.seed
    )
    rows_are_there = existing is not None and config.tokens <= existing.train_tokens
    try:
        return open_text(text)
    except (ValueError, OSError):
        if not rows_are_there:
            raise
        return None


def _spec(
    config: HarvestConfig,
    source: ModelSource,
    shape: ModelShape,
    tokenizer: Tokenizer,
    text: TextSource | None,
    device: str,
) -> StoreSpec:
    auto_batch = _CPU_BATCH_ROWS if device == "cpu" else _GPU_BATCH_ROWS
    chunk_rows = config.chunk_rows or default_chunk_rows(config.context, shape.width)
    model: Record = {
        "name": source.name,
        "revision": source.revision,
        "config_hash": _UNKNOWN,
        "weights": _UNKNOWN,
        "dtype": config.dtype,
    }
    return StoreSpec(
        model=model,
        tokenizer=tokenizer.identity(),
        text=text.identity.to_dict() if text else _name_of_text(config),
        packing=config.packing,
        layers=parse_layers(config.layers, shape.n_layers),
        n_blocks=shape.n_layers,
        width=shape.width,
        context=config.context,
        codec=config.codec,
        batch_rows=min(config.batch_rows or auto_batch, chunk_rows),
        chunk_rows=chunk_rows,
        eval_target=config.eval_tokens,
    )


def _name_of_text(config: HarvestConfig) -> Record:
    path = Path(config.dataset).expanduser()
    name = path.resolve().name if path.is_absolute() or path.suffix else config.dataset
    return {"dataset": name, "split": config.split, "seed": config.seed}


def _with_unknowns_of(existing: StoreSpec, asked: StoreSpec) -> StoreSpec:
    """What `asked` cannot know yet, or left to be chosen, is as the store has it."""
    model = {
        key: existing.model.get(key) if value in (_UNKNOWN, None) else value
        for key, value in asked.model.items()
    }
    return dataclasses.replace(asked, model=model, text={**existing.text, **asked.text})


def _tokens_done(out: Place, existing: StoreSpec | None) -> int:
    if existing is None:
        return 0
    done = committed_chunks(out, existing)
    rows: int = sum(r.stop - r.start for r in map(existing.chunk_range, done))
    return round(existing.tokens * rows / existing.rows)


def _seconds_per_token(source: ModelSource, spec: StoreSpec, device: str) -> float:
    return forward_seconds(
        ModelSizes(spec.n_blocks, spec.width, block_parameters(source)),
        blocks=max(spec.layers),
        context=spec.context,
        device=device,
        dtype=spec.model["dtype"],
    )
