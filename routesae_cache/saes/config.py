"""What a sparse autoencoder is: one frozen configuration for every architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

SelectorKind = Literal["fixed", "route", "random", "every", "all"]
CoderKind = Literal["relu", "gated", "topk", "batchtopk", "jumprelu", "matryoshka"]

TOPK_FAMILY: tuple[CoderKind, ...] = ("topk", "batchtopk", "matryoshka")
PENALISED: tuple[CoderKind, ...] = ("relu", "gated", "jumprelu")
CROSSCODER_CODERS: tuple[CoderKind, ...] = ("relu", "topk", "batchtopk")

# Options that mean something only for some selectors or coders: option -> (the axis, its values).
APPLIES_TO: dict[str, tuple[Literal["selector", "coder"], tuple[str, ...]]] = {
    "k": ("coder", TOPK_FAMILY),
    "auxk": ("coder", TOPK_FAMILY),
    "auxk_weight": ("coder", TOPK_FAMILY),
    "encode_dtype": ("coder", TOPK_FAMILY),
    "sparsity_weight": ("coder", PENALISED),
    "gated_aux": ("coder", ("gated",)),
    "bandwidth": ("coder", ("jumprelu",)),
    "initial_threshold": ("coder", ("jumprelu",)),
    "group_sizes": ("coder", ("matryoshka",)),
    "hard": ("selector", ("route",)),
    "aggregate": ("selector", ("route",)),
    "route_estimator": ("selector", ("route",)),
    "crosscoder_weighting": ("selector", ("all",)),
    "crosscoder_bias": ("selector", ("all",)),
}
REQUIRED_WHERE_IT_APPLIES = ("k", "sparsity_weight")
AUXK_FROM_LATENTS = 4096


@dataclass(frozen=True, kw_only=True)
class SaeConfig:
    """Everything that decides an SAE's parameters and loss, apart from the width and the seed.

    An architecture is a selector (which of a token's layers is read) and a coder (the sparse
    autoencoder proper). `selector="all"` is the crosscoder, which codes all layers at once.

    Raises:
        ValueError: if options contradict each other; the message says what was expected.
    """

    selector: SelectorKind
    coder: CoderKind
    layers: tuple[int, ...]
    """The layers it reads, as the store counts them, in order; exactly one for `fixed`."""
    latents: int
    k: int | None = None
    """Active latents per token (TopK family)."""
    sparsity_weight: float | None = None
    """Weight of the L1 term (relu, gated) or of the L0 term (jumprelu)."""
    norm: Literal["token", "scalar", "none"] = "token"
    """How its input was normalised; recorded here, done by whoever feeds it."""
    init_bias: Literal["zero", "mean", "median"] = "zero"
    """Where b_pre starts: zero, or the mean or geometric median of a sample."""
    dead_window_tokens: int = 100_000
    """A latent that has not fired for this many tokens counts as dead."""
    auxk: int | None = None
    """Dead latents that AuxK revives per token; 0 is off, None is half the width where there are
    at least 4096 latents and off below."""
    auxk_weight: float = 1 / 32
    encode_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the encoder's product that selects; chosen values are float32 either way."""
    hard: bool = True
    """Routing: read one layer (hard) or the mixture of all of them (soft)."""
    aggregate: Literal["sum", "mean"] = "sum"
    """Routing: the router sees the sum or the mean over layers."""
    route_estimator: Literal["factor", "straight-through", "score"] = "factor"
    """Hard routing: the router learns through the factor p on its input (the paper's), through a
    straight-through estimate with no factor, or by sampling layers and the score function."""
    gated_aux: Literal["paper", "authors"] = "paper"
    """Gated: the Gated-SAE paper's loss, or the bare L1 of the RouteSAE authors."""
    bandwidth: float = 1e-3
    initial_threshold: float = 1e-3
    group_sizes: tuple[int, ...] | None = None
    """Matryoshka: sizes of the groups of latents, first to last; None is 1/32, 1/16, 1/8, 1/4 and
    the rest."""
    crosscoder_weighting: Literal["plain", "decoder-norm"] = "plain"
    crosscoder_bias: bool = True
    """Crosscoder: a decoder bias per layer (the authors have none)."""

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_applicable(self)
        _check_layers(self)
        _check_numbers(self)

    @property
    def architecture(self) -> Literal["layered", "crosscoder"]:
        """`crosscoder` where all layers are coded at once, `layered` otherwise."""
        return "crosscoder" if self.selector == "all" else "layered"

    @property
    def name(self) -> str:
        """A short canonical label, such as `route+topk k=32` or `fixed+relu layer=22 l1=0.1`."""
        selector = "crosscoder" if self.selector == "all" else self.selector
        parts = [f"{selector}+{self.coder}"]
        if self.selector == "fixed":
            parts.append(f"layer={self.layers[0]}")
        if self.selector == "route" and not self.hard:
            parts.append("soft")
        if self.k is not None:
            parts.append(f"k={self.k}")
        if self.sparsity_weight is not None:
            key = "l0" if self.coder == "jumprelu" else "l1"
            parts.append(f"{key}={self.sparsity_weight:g}")
        return " ".join(parts)

    def resolved_auxk(self, width: int) -> int:
        """Dead latents that AuxK uses for a model of this width, 0 where it is off."""
        if self.coder not in TOPK_FAMILY:
            return 0
        if self.auxk is not None:
            return self.auxk
        return width // 2 if self.latents >= AUXK_FROM_LATENTS else 0

    def resolved_groups(self) -> tuple[int, ...]:
        """The Matryoshka group sizes, which sum to `latents`."""
        if self.group_sizes is not None:
            return self.group_sizes
        first = [max(1, self.latents // part) for part in (32, 16, 8, 4)]
        kept = [size for i, size in enumerate(first) if sum(first[: i + 1]) < self.latents]
        return (*kept, self.latents - sum(kept))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SaeConfig:
        """The configuration that `to_dict` wrote.

        Raises:
            ValueError: naming every key that is unknown or missing, or of the wrong type.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(
                f"SAE configuration has unknown keys {unknown}; known: {sorted(known)}"
            )
        if missing := sorted(known - set(values)):
            raise ValueError(f"SAE configuration lacks the keys {missing}")
        typed: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**typed)


def applies(option: str, *, selector: str, coder: str) -> bool:
    """Whether an option means anything for this selector and coder."""
    if option not in APPLIES_TO:
        return True
    axis, kinds = APPLIES_TO[option]
    return (selector if axis == "selector" else coder) in kinds


def field_types() -> dict[str, tuple[Any, ...]]:
    """The types each field admits: `int`, `float`, `bool`, `tuple`, `None`'s type, or strings."""
    return {name: _flat_types(hint) for name, hint in get_type_hints(SaeConfig).items()}


def _flat_types(hint: Any) -> tuple[Any, ...]:
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return tuple(kind for part in get_args(hint) for kind in _flat_types(part))
    if origin is Literal:
        return get_args(hint)
    return (tuple,) if origin is tuple else (hint,)


def _admits(kind: Any, value: Any) -> bool:
    if isinstance(kind, str):
        return bool(value == kind)
    if kind is tuple:
        return isinstance(value, tuple) and all(type(item) is int for item in value)
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind


def _check_choices(config: SaeConfig) -> None:
    for name, kinds in field_types().items():
        value = getattr(config, name)
        if not any(_admits(kind, value) for kind in kinds):
            words = [kind if isinstance(kind, str) else kind.__name__ for kind in kinds]
            raise ValueError(f"{name} is one of {', '.join(words)}; got {value!r}")


def _check_applicable(config: SaeConfig) -> None:
    if config.selector == "all" and config.coder not in CROSSCODER_CODERS:
        raise ValueError(
            f"the crosscoder is built with {', '.join(CROSSCODER_CODERS)}; got {config.coder!r}"
        )
    for field in fields(config):
        value = getattr(config, field.name)
        if applies(field.name, selector=config.selector, coder=config.coder):
            if field.name in REQUIRED_WHERE_IT_APPLIES and value is None:
                raise ValueError(f"coder {config.coder!r} needs {field.name}; none was given")
        elif field.default is not MISSING and value != field.default:
            axis, kinds = APPLIES_TO[field.name]
            raise ValueError(
                f"{field.name}={value!r} does not apply to {axis} {getattr(config, axis)!r}; "
                f"it is for {', '.join(kinds)}: leave it out"
            )


def _check_layers(config: SaeConfig) -> None:
    if config.selector == "fixed" and len(config.layers) != 1:
        raise ValueError(f"a fixed SAE reads exactly one layer; got {list(config.layers)}")
    if not config.layers or list(config.layers) != sorted(set(config.layers)):
        raise ValueError(f"layers must be ascending and not empty; got {list(config.layers)}")
    if config.layers[0] < 0:
        raise ValueError(f"layers count from 0; got {list(config.layers)}")


def _check_numbers(config: SaeConfig) -> None:
    if config.latents < 1:
        raise ValueError(f"latents must be at least 1; got {config.latents}")
    if config.k is not None and not 1 <= config.k <= config.latents:
        raise ValueError(
            f"k must lie between 1 and the number of latents; "
            f"got k={config.k} with latents={config.latents}"
        )
    for name in ("sparsity_weight", "auxk", "auxk_weight"):
        value = getattr(config, name)
        if value is not None and not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be finite and not negative; got {value}")
    if config.bandwidth <= 0:
        raise ValueError(f"bandwidth must be positive; got {config.bandwidth}")
    if config.dead_window_tokens < 1:
        raise ValueError(f"dead_window_tokens must be positive; got {config.dead_window_tokens}")
    groups = config.group_sizes
    if groups is not None and (sum(groups) != config.latents or min(groups, default=0) < 1):
        raise ValueError(
            f"group_sizes must be positive and sum to latents={config.latents}; "
            f"got {list(groups)}, which sum to {sum(groups)}"
        )
