"""What turns residuals into the arrays on disk and back: `bf16`, `int8` and `delta`.

A codec sees one block of tokens over all layers of the store. Shapes: N tokens, L layers, D width.
Values are finite and at most 1e38; below 2e-36 they may become 0.
Arithmetic is IEEE float32 with every product and sum rounded on its own, so that any
implementation of the formulas in docs/STORE_FORMAT.md decodes to the same bits.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Codes = dict[str, NDArray[Any]]
"""Array name -> values, the leading axes being tokens (and layers, where a function says so)."""

_BLOCK_VALUES = 1 << 19  # at a time: larger leaves the cache, smaller makes threads wait
_FINEST_STEP = 1e-6  # far below what 8 bits can hold
_SCALE_BITS = 27  # of a float32 scale, after zstd
_U16 = np.dtype("<u2")  # byte order matters where bytes and 16-bit words are views of each other


class ArrayLayout(NamedTuple):
    """One array that a codec keeps for every layer."""

    name: str
    dtype: str
    per_token: int | None
    """Length of the last axis; None where there is one number a token."""
    compression: Literal["zstd", "shuffled-zstd"]


class Encoded(NamedTuple):
    """A block of N tokens, encoded."""

    layers: tuple[Codes, ...]
    """For each layer the arrays named by `layout`, shape (N,) or (N, per_token)."""
    distortion_LN: Float32
    """Mean over D of the squared error over the variance over D: NMSE after normalisation."""


@dataclass(frozen=True)
class ResidualCodec(ABC):
    """Residuals of all layers of one token block <-> the arrays of the store."""

    kind: ClassVar[str]

    @abstractmethod
    def layout(self, width: int) -> tuple[ArrayLayout, ...]:
        """The arrays kept for each layer of residuals with `width` channels."""

    def empty(self, n_tokens: int, n_layers: int, width: int) -> Codes:
        """Room for the codes of some tokens and layers, as `decode` takes them."""
        return {
            a.name: np.empty(
                (n_tokens, n_layers, *((a.per_token,) if a.per_token else ())), a.dtype
            )
            for a in self.layout(width)
        }

    @abstractmethod
    def encode(self, x_LND: Sequence[Float32]) -> Encoded:
        """Encode L arrays of shape (N, D); values are finite."""

    @abstractmethod
    def _decode_block(self, codes: Codes, positions: Sequence[int], out_NLD: Float32) -> None: ...

    @abstractmethod
    def estimated_bits(self, n_layers: int, width: int) -> float:
        """About how many bits a value takes on disk; from what was measured on language models."""

    def required(self, wanted: Sequence[int]) -> tuple[int, ...]:
        """Positions in the layer list whose codes are needed to decode the `wanted` ones."""
        return tuple(sorted(set(wanted)))

    def decode(
        self, codes: Codes, positions: Sequence[int], wanted: Sequence[int], out_NLD: Float32
    ) -> None:
        """Decode N tokens into `out_NLD`, one layer for each of `wanted`.

        `codes` holds arrays of shape (N, len(positions)[, per_token]) for the layers at
        `positions`, which is `required(wanted)`. Works in blocks that stay in a core's cache.
        """
        direct = tuple(positions) == tuple(wanted)
        emit = [list(positions).index(p) for p in wanted]
        n_tokens, width = out_NLD.shape[0], out_NLD.shape[2]
        step = max(1, _BLOCK_VALUES // (len(positions) * width))
        scratch = None if direct else np.empty((step, len(positions), width), np.float32)
        for start in range(0, n_tokens, step):
            part = slice(start, min(start + step, n_tokens))
            block = out_NLD[part] if scratch is None else scratch[: part.stop - start]
            self._decode_block({k: v[part] for k, v in codes.items()}, positions, block)
            if not direct:
                out_NLD[part] = block[:, emit]

    def to_dict(self) -> dict[str, Any]:
        """Kind and parameters, as kept in the store's attributes."""
        return {"kind": self.kind, **asdict(self)}


@dataclass(frozen=True)
class Bf16Codec(ResidualCodec):
    """The upper 16 bits of each float32, rounded to nearest even; exact for bfloat16 residuals."""

    kind: ClassVar[str] = "bf16"

    def layout(self, width: int) -> tuple[ArrayLayout, ...]:
        return (ArrayLayout("codes", "uint16", width, "shuffled-zstd"),)

    def estimated_bits(self, n_layers: int, width: int) -> float:
        return 12.6

    def encode(self, x_LND: Sequence[Float32]) -> Encoded:
        layers, distortion = [], []
        for x_ND in x_LND:
            bits = np.ascontiguousarray(x_ND).view(np.uint32)
            rounded = bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))
            layers.append({"codes": (rounded >> 16).astype(np.uint16)})
            error_ND = (rounded & np.uint32(0xFFFF0000)).view(np.float32) - x_ND
            std_N = _std(x_ND)
            error_ND *= _inverse(std_N)[:, None]
            distortion.append(_relative(error_ND, std_N, std_N))
        return Encoded(tuple(layers), np.stack(distortion))

    def _decode_block(self, codes: Codes, positions: Sequence[int], out_NLD: Float32) -> None:
        np.left_shift(codes["codes"], 16, out=out_NLD.view(np.uint32), dtype=np.uint32)


@dataclass(frozen=True)
class Int8Codec(ResidualCodec):
    """`q = round(x / s)` with `s = max|x| / 127` for each token and layer."""

    kind: ClassVar[str] = "int8"

    def layout(self, width: int) -> tuple[ArrayLayout, ...]:
        return (
            ArrayLayout("codes", "int8", width, "zstd"),
            ArrayLayout("scale", "float32", None, "zstd"),
        )

    def estimated_bits(self, n_layers: int, width: int) -> float:
        return 4.9 + _SCALE_BITS / width

    def encode(self, x_LND: Sequence[Float32]) -> Encoded:
        layers, distortion = [], []
        for x_ND in x_LND:
            scale_N = _max_abs(x_ND) / np.float32(127)
            residual_ND = x_ND * _inverse(scale_N)[:, None]
            q_ND = np.rint(residual_ND)
            layers.append({"codes": q_ND.astype(np.int8), "scale": scale_N})
            residual_ND -= q_ND
            distortion.append(_relative(residual_ND, scale_N, _std(x_ND)))
        return Encoded(tuple(layers), np.stack(distortion))

    def _decode_block(self, codes: Codes, positions: Sequence[int], out_NLD: Float32) -> None:
        out_NLD[...] = codes["codes"]
        out_NLD *= codes["scale"][..., None]


@dataclass(frozen=True)
class DeltaCodec(ResidualCodec):
    """Each layer against the decoded previous one, in steps of `step` standard deviations.

    `q = round((x_l - y) / s)`, `s = max(step * std(x_l), max|x_l - y| / 127)`, where `y` is what
    the decoder has for the layer before, or 0 at a keyframe. Layers at positions 0,
    `keyframe_every`, 2 `keyframe_every`, ... are keyframes (0: the first alone). The 8 bits of
    `q + 8` are kept as two planes of nibbles, two neighbouring channels in a byte, the even one
    in the low half: `high` is nearly all zeros, and `low` is what zstd's entropy coder likes.
    """

    kind: ClassVar[str] = "delta"
    step: float = 0.20
    keyframe_every: int = 0

    def __post_init__(self) -> None:
        if not _FINEST_STEP <= self.step < 10:
            raise ValueError(
                f"codec step: expected from {_FINEST_STEP:g} to below 10, found {self.step}"
            )
        if self.keyframe_every < 0:
            raise ValueError(f"keyframe_every: expected 0 or more, found {self.keyframe_every}")

    def layout(self, width: int) -> tuple[ArrayLayout, ...]:
        if width % 2:
            raise ValueError(f"codec delta: expected an even width, found {width}; use int8")
        return (
            ArrayLayout("low", "uint8", width // 2, "zstd"),
            ArrayLayout("high", "uint8", width // 2, "zstd"),
            ArrayLayout("scale", "float32", None, "zstd"),
        )

    def estimated_bits(self, n_layers: int, width: int) -> float:
        keyframes = sum(map(self._is_keyframe, range(n_layers))) / n_layers
        at_default_step = 4.4 * keyframes + 2.55 * (1 - keyframes)
        return max(at_default_step + math.log2(0.20 / self.step), 0.3) + _SCALE_BITS / width

    def required(self, wanted: Sequence[int]) -> tuple[int, ...]:
        needed = set[int]()
        for position in wanted:
            needed.add(position)
            while not self._is_keyframe(position):
                position -= 1
                needed.add(position)
        return tuple(sorted(needed))

    def _is_keyframe(self, position: int) -> bool:
        return position % self.keyframe_every == 0 if self.keyframe_every else position == 0

    def encode(self, x_LND: Sequence[Float32]) -> Encoded:
        n_tokens, width = x_LND[0].shape
        layers = tuple(
            {
                a.name: np.empty((n_tokens, a.per_token) if a.per_token else n_tokens, a.dtype)
                for a in self.layout(width)
            }
            for _ in x_LND
        )
        distortion_LN = np.empty((len(x_LND), n_tokens), np.float32)
        for part in _token_blocks(n_tokens, width):
            size = part.stop - part.start
            decoded_ND = np.zeros((size, width), np.float32)
            residual_ND, rounded_ND = np.empty_like(decoded_ND), np.empty_like(decoded_ND)
            for position, (x_ND, codes) in enumerate(zip(x_LND, layers, strict=True)):
                if self._is_keyframe(position):
                    decoded_ND[...] = 0
                block_ND = x_ND[part]
                np.subtract(block_ND, decoded_ND, out=residual_ND)
                std_N = _std(block_ND)
                scale_N = np.maximum(
                    np.float32(self.step) * std_N, _max_abs(residual_ND) / np.float32(127)
                )
                residual_ND *= _inverse(scale_N)[:, None]
                np.rint(residual_ND, out=rounded_ND)
                _split_nibbles(rounded_ND.astype(np.int8), codes["low"][part], codes["high"][part])
                codes["scale"][part] = scale_N
                residual_ND -= rounded_ND
                distortion_LN[position, part] = _relative(residual_ND, scale_N, std_N)
                rounded_ND *= scale_N[:, None]
                decoded_ND += rounded_ND
        return Encoded(layers, distortion_LN)

    def _decode_block(self, codes: Codes, positions: Sequence[int], out_NLD: Float32) -> None:
        out_NLD[...] = _join_nibbles(codes["low"], codes["high"])
        out_NLD *= codes["scale"][..., None]
        for index, position in enumerate(positions):
            if not self._is_keyframe(position):
                out_NLD[:, index] += out_NLD[:, index - 1]


CODECS: Mapping[str, type[ResidualCodec]] = {c.kind: c for c in (Bf16Codec, Int8Codec, DeltaCodec)}


def codec_from_dict(record: Mapping[str, Any]) -> ResidualCodec:
    """The codec that `ResidualCodec.to_dict` described; ValueError for anything else."""
    parameters = dict(record)
    kind = parameters.pop("kind", None)
    if not isinstance(kind, str) or kind not in CODECS:
        raise ValueError(f"codec: expected one of {', '.join(CODECS)}, found {kind!r}")
    allowed = {f.name: _PARAMETER_TYPES[str(f.type)] for f in fields(CODECS[kind])}
    odd = {k: v for k, v in parameters.items() if type(v) not in allowed.get(k, ())}
    if odd:
        raise ValueError(f"codec {kind}: unexpected parameters {odd}")
    return CODECS[kind](**parameters)


_PARAMETER_TYPES: Mapping[str, tuple[type, ...]] = {"int": (int,), "float": (int, float)}


def join_blocks(blocks: Sequence[tuple[Codes, ...]]) -> list[Codes]:
    """Blocks of tokens, each with arrays for every layer -> the same arrays for all the tokens."""
    return [
        {name: np.concatenate([block[layer][name] for block in blocks]) for name in first}
        for layer, first in enumerate(blocks[0])
    ]


def _token_blocks(n_tokens: int, width: int) -> Iterator[slice]:
    step = max(1, _BLOCK_VALUES // width)
    for start in range(0, n_tokens, step):
        yield slice(start, min(start + step, n_tokens))


def _std(x_ND: Float32) -> Float32:
    width = np.float32(x_ND.shape[1])
    with np.errstate(over="ignore", invalid="ignore"):
        mean_N = x_ND @ np.ones(x_ND.shape[1], np.float32) / width
        variance_N: Float32 = np.vecdot(x_ND, x_ND) / width - mean_N * mean_N
    if not np.isfinite(variance_N).all():  # squares of values beyond 1e19
        variance_N = x_ND.var(axis=1, dtype=np.float64)
    std_N: Float32 = np.sqrt(np.maximum(variance_N, 0)).astype(np.float32, copy=False)
    return std_N


def _max_abs(x_ND: Float32) -> Float32:
    largest: Float32 = np.maximum(x_ND.max(axis=1), -x_ND.min(axis=1))
    return np.abs(largest)  # of zeros it is not -0


def _inverse(scale_N: Float32) -> Float32:
    """1 / scale, and 0 where that is beyond float32."""
    usable_N = scale_N >= np.finfo(np.float32).smallest_normal
    return np.divide(1, scale_N, out=np.zeros_like(scale_N), where=usable_N)


def _relative(error_ND: Float32, unit_N: Float32, std_N: Float32) -> Float32:
    """Mean squared error, in units of `unit_N`, over the variance; 0 where nothing varies."""
    mean_N = np.vecdot(error_ND, error_ND) / np.float32(error_ND.shape[1])
    ratio_N = unit_N.astype(np.float64) * _inverse(std_N)
    relative_N = np.minimum(mean_N * ratio_N * ratio_N, np.finfo(np.float32).max)
    relative: Float32 = relative_N.astype(np.float32)
    return relative


def _split_nibbles(
    q_ND: NDArray[np.int8], low_NP: NDArray[np.uint8], high_NP: NDArray[np.uint8]
) -> None:
    pairs = (q_ND.view(np.uint8) + np.uint8(8)).view(_U16)
    low_NP[...] = (pairs & 0x0F) | ((pairs >> 4) & 0xF0)
    high_NP[...] = ((pairs >> 4) & 0x0F) | ((pairs >> 8) & 0xF0)


def _join_nibbles(low: NDArray[np.uint8], high: NDArray[np.uint8]) -> NDArray[np.int8]:
    pairs = _spread(low)
    pairs |= _spread(high) << 4
    return (pairs.view(np.uint8) - np.uint8(8)).view(np.int8)


def _spread(nibbles: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """Bytes holding two nibbles -> 16-bit words holding them in the low half of each byte."""
    words = nibbles.astype(_U16)
    words |= words << 4
    words &= 0x0F0F
    return words
