"""The rates and prices that a plan is computed from, each with where it comes from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from typing import Any, Literal, NamedTuple

from routesae_cache import devices

CPU = "cpu"
Basis = Literal["measured", "data sheet", "program", "assumed", "given"]
"""`measured`: docs/BENCHMARKS.md, or just now. `program`: how this program works. `given`: by the
user. `assumed`: by nobody but us, to be put right by the user."""
_MAY_BE_ZERO = {
    *("price_per_hour", "storage_price", "storage_months", "egress_price"),
    *("start_seconds", "tokenise_us"),
}
_FRACTIONS = {"model_utilisation", "sae_utilisation"}


class RateError(ValueError):
    """A rate that there is not, or a value that it cannot have."""


class Figure(NamedTuple):
    """One rate or price, as it is shown."""

    name: str
    value: float
    unit: str
    basis: Basis
    note: str


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU, from its maker's data sheet; dense products, no sparsity."""

    bf16_flops: float
    float32_flops: float
    """Outside tensor cores, as PyTorch multiplies float32 unless told otherwise."""
    memory_bandwidth: float
    """Bytes/s."""
    price_per_hour: float
    """USD on demand, assumed: the middle of what specialised clouds asked in May 2026."""


GPUS: Mapping[str, Gpu] = {
    "h200": Gpu(
        bf16_flops=989e12, float32_flops=67e12, memory_bandwidth=4.8e12, price_per_hour=4.00
    ),
    "h100": Gpu(
        bf16_flops=989e12, float32_flops=67e12, memory_bandwidth=3.35e12, price_per_hour=3.00
    ),
    "a100": Gpu(
        bf16_flops=312e12, float32_flops=19.5e12, memory_bandwidth=2.039e12, price_per_hour=1.50
    ),
    "l40s": Gpu(
        bf16_flops=362e12, float32_flops=91.6e12, memory_bandwidth=0.864e12, price_per_hour=1.50
    ),
}


def _rate(value: Any, unit: str, basis: Basis, note: str) -> Any:
    return field(default=value, metadata={"unit": unit, "basis": basis, "note": note})


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What one worker, its machine, the network and the storage do, and what they cost.

    A worker is one process with the model, or one rank of a training. None: no such limit.
    """

    gpu: str
    """A key of `GPUS`, or `cpu` for this machine."""
    given: frozenset[str] = frozenset()
    """Names of the rates that the user gave."""

    bf16_flops: float = _rate(MISSING, "FLOP/s", "data sheet", "dense products in bfloat16")
    model_utilisation: float = _rate(0.4, "", "assumed", "of bf16_flops, in a forward pass")
    model_tokens_per_second: float | None = _rate(
        None, "tokens/s", "given", "of the forward pass; in place of the two above"
    )
    float32_flops: float = _rate(MISSING, "FLOP/s", "data sheet", "products in float32")
    sae_utilisation: float = _rate(0.6, "", "assumed", "of float32_flops, in a large product")
    sae_products: float = _rate(
        1.5, "products", "measured", "a TopK's step over its encoder's product at D=2048, on a CPU"
    )
    memory_bandwidth: float | None = _rate(None, "bytes/s", "data sheet", "of the GPU, for Adam")
    price_per_hour: float = _rate(0.0, "USD", "assumed", "a worker on demand, May 2026")

    cores: float = _rate(16.0, "cores", "assumed", "of the CPU, for each worker")
    machine_cores: float | None = _rate(
        None, "cores", "measured", "of the one machine that all workers share"
    )
    transfer_bytes: float | None = _rate(
        10e9, "bytes/s", "assumed", "from a GPU to its host, into pageable memory"
    )
    pinned_bytes: float | None = _rate(
        25e9, "bytes/s", "assumed", "to a GPU from pinned memory, beside what it computes"
    )
    network_bytes: float | None = _rate(3.1e9, "bytes/s", "assumed", "of each worker: 25 Gbit/s")
    reduce_bytes: float = _rate(
        3.1e9, "bytes/s", "assumed", "between ranks; NVLink has a hundred times that"
    )
    storage_bytes: float = _rate(
        5e9, "bytes/s", "assumed", "of the disks or bucket, for all workers together"
    )
    start_seconds: float = _rate(120.0, "s", "assumed", "until a worker has the model")

    tokenise_us: float = _rate(1.4, "µs a token", "measured", "text to rows, in one process")
    encode_ns_bf16: float = _rate(10.2, "core-ns a value", "measured", "encode, compress, write")
    encode_ns_int8: float = _rate(5.6, "core-ns a value", "measured", "encode, compress, write")
    encode_ns_delta: float = _rate(7.6, "core-ns a value", "measured", "encode, compress, write")
    decode_ns_bf16: float = _rate(4.2, "core-ns a value", "measured", "read, check, decode")
    decode_ns_int8: float = _rate(0.6, "core-ns a value", "measured", "read, check, decode")
    decode_ns_delta: float = _rate(1.7, "core-ns a value", "measured", "read, check, decode")
    normalise_ns: float = _rate(3.0, "core-ns a value", "measured", "of the layers wanted")
    reader_threads: float = _rate(
        MISSING, "threads", "program", "that decode, and as many that read, each rank"
    )

    storage_price: float = _rate(0.023, "USD", "assumed", "a GB and month in an object store, 2026")
    storage_months: float = _rate(1.0, "months", "assumed", "that the store is kept")
    egress_price: float = _rate(
        0.0, "USD", "assumed", "a GB read; 0.09 where it leaves its cloud, 2026"
    )

    def __post_init__(self) -> None:
        for name, value in self._values().items():
            least = 0 if name in _MAY_BE_ZERO else math.nextafter(0, 1)
            most = 1 if name in _FRACTIONS else math.inf
            if not (least <= value <= most and math.isfinite(value)):
                wanted = "from 0 on" if least == 0 else "above 0"
                limit = " and at most 1" if most == 1 else ""
                raise RateError(f"{name}: expected a number {wanted}{limit}, found {value:g}")

    @property
    def on_cpu(self) -> bool:
        """The model and the SAEs are computed by the same cores as all the rest."""
        return self.gpu == CPU

    def encode_ns(self, kind: str) -> float:
        """Of a codec's kind."""
        return float(getattr(self, f"encode_ns_{kind}"))

    def decode_ns(self, kind: str) -> float:
        """Of a codec's kind."""
        return float(getattr(self, f"decode_ns_{kind}"))

    def figures(self) -> list[Figure]:
        """All that are in use, in order."""
        fields = {f.name: f.metadata for f in dataclasses.fields(self)}
        return [
            Figure(
                name,
                value,
                fields[name]["unit"],
                "given" if name in self.given else self._basis(name, fields[name]["basis"]),
                fields[name]["note"],
            )
            for name, value in self._values().items()
        ]

    def _basis(self, name: str, basis: Basis) -> Basis:
        return "measured" if self.on_cpu and name in _MEASURED_ON_CPU else basis

    def _values(self) -> dict[str, float]:
        names = [f.name for f in dataclasses.fields(self) if f.metadata]
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}


RATE_NAMES = tuple(f.name for f in dataclasses.fields(Rates) if f.metadata)
_MEASURED_ON_CPU = {
    *("bf16_flops", "float32_flops", "model_utilisation", "sae_utilisation", "cores"),
    *("storage_bytes",),
}


def rates_for(gpu: str, given: Mapping[str, Any]) -> Rates:
    """The rates of workers with this GPU, some of them replaced.

    Raises:
        RateError: for a GPU or a rate that there is not, listing those there are, or a value that
            a rate cannot have.
    """
    if unknown := [name for name in given if name not in RATE_NAMES]:
        raise RateError(
            f"no rate is called {unknown[0]!r}; expected some of {', '.join(RATE_NAMES)}"
        )
    for name, value in given.items():
        if type(value) not in (int, float):
            raise RateError(f"{name}: expected a number, found {value!r}")
    if gpu == CPU:
        own: dict[str, Any] = _this_machine(float(given.get("cores", devices.cores())))
    elif gpu in GPUS:
        own = dataclasses.asdict(GPUS[gpu])
    else:
        raise RateError(f"no GPU is called {gpu!r}; expected {', '.join(GPUS)} or {CPU}")
    own |= {name: float(value) for name, value in given.items()}
    threads = {"reader_threads": float(devices.batch_threads(own.get("cores", Rates.cores)))}
    return Rates(gpu=gpu, given=frozenset(given), **threads | own)


def _this_machine(cores: float) -> dict[str, float | None]:
    """The rates of workers with so many cores each, all on this machine; products are timed."""
    import torch

    from routesae_cache.estimate import FORWARD_EFFICIENCY, multiply_adds_per_second

    share = 2 * cores / torch.get_num_threads()
    return {
        "bf16_flops": share * multiply_adds_per_second("cpu", "bfloat16"),
        "float32_flops": share * multiply_adds_per_second("cpu", "float32"),
        "model_utilisation": FORWARD_EFFICIENCY,
        "sae_utilisation": 1.0,
        "sae_products": 1.0,
        "cores": cores,
        "machine_cores": float(devices.cores()),
        "memory_bandwidth": None,
        "transfer_bytes": None,
        "pinned_bytes": None,
        "network_bytes": None,
        "storage_bytes": 1.3e9,
        "start_seconds": 20.0,
    }
