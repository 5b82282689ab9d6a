"""What a harvest and a training will take on many machines: time, bytes and money, on paper.

What happens at once is as slow as the place with most to do; what happens at one place adds up.
docs/SCALING.md explains the formulas.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from routesae_cache.estimate import forward_multiply_adds
from routesae_cache.harvest_plan import default_chunk_rows
from routesae_cache.presets import ModelSizes
from routesae_cache.rates import Rates
from routesae_cache.saes.config import SaeConfig
from routesae_cache.saes.cost import matrix_weights, training_multiply_adds
from stores.codecs import Bf16Codec, DeltaCodec, Int8Codec, ResidualCodec

Place = Literal["GPU", "link", "cores", "network", "storage"]
"""`link`: between a GPU and its host."""
_BFLOAT16, _FLOAT32 = 2, 4  # bytes: a residual leaves the GPU as the former, comes as the latter
_ADAM_BYTES = 28  # a weight: itself, two moments and a gradient are read, three written
COMPARED: tuple[ResidualCodec, ...] = (
    Bf16Codec(),
    Int8Codec(),
    DeltaCodec(step=0.10),
    DeltaCodec(step=0.20),
    DeltaCodec(step=0.30),
)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is to be harvested and trained, and by how many workers."""

    model: ModelSizes
    tokens: int
    """To train on."""
    eval_tokens: int
    layers: tuple[int, ...]
    context: int
    codec: ResidualCodec
    workers: int
    """That harvest."""
    saes: tuple[SaeConfig, ...]
    """Trained in one pass."""
    ranks: int = 1
    """That train, data parallel."""
    epochs: int = 1
    batch_tokens: int = 32768
    """A step of the training, over all ranks."""

    def __post_init__(self) -> None:
        for name in ("tokens", "workers", "ranks", "epochs", "batch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if self.eval_tokens < 0:
            raise ValueError(f"eval tokens: expected 0 or more, found {self.eval_tokens}")
        if self.context < 2:
            raise ValueError(f"context: expected at least 2 positions, found {self.context}")

    @property
    def values_per_token(self) -> int:
        """Residual values that the store keeps of a token."""
        return len(self.layers) * self.model.width

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        model, codec = self.model._asdict(), self.codec.to_dict()
        return {**dataclasses.asdict(self), "model": model, "codec": codec}


class Part(NamedTuple):
    """One thing to be done, by all workers at once."""

    what: str
    place: Place
    seconds: float


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage. Different places work at once; what is to be done at one place adds up."""

    workers: int
    before: tuple[Part, ...]
    """What comes first, one after the other."""
    parts: tuple[Part, ...]
    tokens: int
    """Over all epochs."""
    n_bytes: float
    """Written, or read over all epochs."""
    price_per_hour: float
    """USD, of a worker."""

    @property
    def places(self) -> dict[Place, float]:
        """Seconds at each place."""
        found: dict[Place, float] = {}
        for part in self.parts:
            found[part.place] = found.get(part.place, 0.0) + part.seconds
        return found

    @property
    def bottleneck(self) -> Part:
        """The largest part at the place with most to do."""
        places = self.places
        busiest = max(places, key=lambda place: places[place])
        return max((p for p in self.parts if p.place == busiest), key=lambda p: p.seconds)

    @property
    def seconds(self) -> float:
        """From the beginning to the end."""
        return sum(part.seconds for part in self.before) + max(self.places.values())

    @property
    def tokens_per_second(self) -> float:
        """Of all workers together, once they have begun."""
        return self.tokens / max(self.places.values())

    @property
    def dollars(self) -> float:
        """For all workers, from the beginning to the end."""
        return self.seconds / 3600 * self.workers * self.price_per_hour

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "workers": self.workers,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "bottleneck": self.bottleneck.what,
            "bytes": self.n_bytes,
            "dollars": self.dollars,
            "before": [part._asdict() for part in self.before],
            "parts": [part._asdict() for part in self.parts],
        }


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A harvest and a training, on paper."""

    bits: float
    """Of a value on disk."""
    store_bytes: float
    harvest: StagePlan
    training: StagePlan
    storage_dollars: float
    egress_dollars: float

    @property
    def dollars(self) -> float:
        """Of everything."""
        stages = self.harvest.dollars + self.training.dollars
        return stages + self.storage_dollars + self.egress_dollars

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "bits": self.bits,
            "store_bytes": self.store_bytes,
            "harvest": self.harvest.to_dict(),
            "training": self.training.to_dict(),
            "storage_dollars": self.storage_dollars,
            "egress_dollars": self.egress_dollars,
            "dollars": self.dollars,
        }


def plan(setting: Setting, rates: Rates) -> Plan:
    """What a setting takes at these rates."""
    bits = setting.codec.estimated_bits(len(setting.layers), setting.model.width)
    tokens = setting.tokens + setting.eval_tokens
    store_bytes = tokens * setting.values_per_token * bits / 8
    training = _training(setting, rates)
    return Plan(
        bits=bits,
        store_bytes=store_bytes,
        harvest=_harvest(setting, rates, store_bytes),
        training=training,
        storage_dollars=store_bytes / 1e9 * rates.storage_price * rates.storage_months,
        egress_dollars=training.n_bytes / 1e9 * rates.egress_price,
    )


def with_codecs(setting: Setting, rates: Rates) -> list[tuple[ResidualCodec, Plan]]:
    """The same in other codecs, and in its own."""
    codecs = COMPARED if setting.codec in COMPARED else (*COMPARED, setting.codec)
    return [(c, plan(dataclasses.replace(setting, codec=c), rates)) for c in codecs]


def with_workers(setting: Setting, rates: Rates, workers: Iterable[int]) -> list[tuple[int, Plan]]:
    """The same with other numbers of workers, who harvest and then train."""
    return [(n, plan(dataclasses.replace(setting, workers=n, ranks=n), rates)) for n in workers]


def _harvest(setting: Setting, rates: Rates, store_bytes: float) -> StagePlan:
    tokens, values = setting.tokens + setting.eval_tokens, setting.values_per_token
    chunk_tokens = default_chunk_rows(setting.context, setting.model.width) * setting.context
    chunks_each = math.ceil(math.ceil(tokens / chunk_tokens) / setting.workers)
    each = min(chunks_each * chunk_tokens, tokens)
    crowded = _crowded(each, tokens, rates)
    computed = crowded if rates.on_cpu else each
    encoding = crowded * values * rates.encode_ns(setting.codec.kind) * 1e-9 / rates.cores
    parts = [
        Part("model", _computing(rates), computed * _model_seconds(setting, rates)),
        Part("encode", "cores", encoding),
    ]
    if rates.transfer_bytes is not None:
        seconds = each * values * _BFLOAT16 / rates.transfer_bytes
        parts.append(Part("copies", "GPU", seconds))
    parts += _moving(store_bytes, each / tokens, rates)
    rows = Part("token rows", "cores", tokens * rates.tokenise_us * 1e-6)
    return StagePlan(
        workers=setting.workers,
        before=(_start(rates), rows),
        parts=tuple(parts),
        tokens=tokens,
        n_bytes=store_bytes,
        price_per_hour=rates.price_per_hour,
    )


def _training(setting: Setting, rates: Rates) -> StagePlan:
    tokens, width = setting.tokens * setting.epochs, setting.model.width
    kept = {layer: position for position, layer in enumerate(setting.layers)}
    wanted = {kept[layer] for sae in setting.saes for layer in sae.layers}
    read = setting.codec.required(sorted(wanted))
    bits = setting.codec.estimated_bits(len(read), width)
    n_bytes = tokens * len(read) * width * bits / 8
    each = tokens / setting.ranks
    crowded = _crowded(each, tokens, rates)
    computed = crowded if rates.on_cpu else each
    decode_ns = len(read) * rates.decode_ns(setting.codec.kind) + len(wanted) * rates.normalise_ns
    readers = min(rates.cores, rates.reader_threads)
    flops = 2 * training_multiply_adds(setting.saes, width) * rates.sae_products
    step = flops / (rates.float32_flops * rates.sae_utilisation)
    weights, steps = matrix_weights(setting.saes, width), tokens / setting.batch_tokens
    parts = [
        Part("SAE steps", _computing(rates), computed * step),
        Part("decode", "cores", crowded * width * decode_ns * 1e-9 / readers),
    ]
    if rates.memory_bandwidth is not None:
        seconds = steps * weights * _ADAM_BYTES / rates.memory_bandwidth
        parts.append(Part("Adam", "GPU", seconds))
    if rates.pinned_bytes is not None:
        seconds = each * len(wanted) * width * _FLOAT32 / rates.pinned_bytes
        parts.append(Part("copies", "link", seconds))
    if setting.ranks > 1:
        sent = 2 * (1 - 1 / setting.ranks) * weights * _FLOAT32
        parts.append(Part("gradients", _computing(rates), steps * sent / rates.reduce_bytes))
    parts += _moving(n_bytes, 1 / setting.ranks, rates)
    return StagePlan(
        workers=setting.ranks,
        before=(_start(rates),),
        parts=tuple(parts),
        tokens=tokens,
        n_bytes=n_bytes,
        price_per_hour=rates.price_per_hour,
    )


def _computing(rates: Rates) -> Place:
    return "cores" if rates.on_cpu else "GPU"


def _start(rates: Rates) -> Part:
    return Part("start", _computing(rates), rates.start_seconds)


def _model_seconds(setting: Setting, rates: Rates) -> float:
    """Of one worker for a token."""
    if rates.model_tokens_per_second is not None:
        return 1 / rates.model_tokens_per_second
    blocks = max(setting.layers)
    products = forward_multiply_adds(setting.model, blocks=blocks, context=setting.context)
    return 2 * products / (rates.bf16_flops * rates.model_utilisation)


def _crowded(each: float, tokens: float, rates: Rates) -> float:
    """Tokens of the busiest worker, or more where there are fewer cores than workers have."""
    if rates.machine_cores is None:
        return each
    return max(each, tokens * rates.cores / rates.machine_cores)


def _moving(n_bytes: float, busiest: float, rates: Rates) -> list[Part]:
    """`busiest`: the share of the worker with the largest."""
    parts = [Part("storage", "storage", n_bytes / rates.storage_bytes)]
    if rates.network_bytes is not None:
        parts.append(Part("network", "network", n_bytes * busiest / rates.network_bytes))
    return parts
