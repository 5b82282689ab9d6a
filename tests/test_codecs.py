"""One suite over all codecs: what is lost, what is reported lost, and the formulas."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from stores.codecs import (
    CODECS,
    Bf16Codec,
    DeltaCodec,
    Encoded,
    Float32,
    Int8Codec,
    ResidualCodec,
    codec_from_dict,
    join_blocks,
)
from tests.store_helpers import VARIANTS, decoded, stacked

DELTAS = {name: codec for name, codec in VARIANTS.items() if isinstance(codec, DeltaCodec)}
Q_MAX = 127
TINY = 2e-36  # below it values may become 0

over_codecs = pytest.mark.parametrize("codec", VARIANTS.values(), ids=VARIANTS.keys())
over_deltas = pytest.mark.parametrize("codec", DELTAS.values(), ids=DELTAS.keys())


def walk(n_layers: int, n_tokens: int = 50, width: int = 64, step: float = 0.3) -> list[Float32]:
    """Layers that are each the one before and something new, as those of a model are."""
    rng = np.random.default_rng(n_layers)
    new_LND = rng.standard_normal((n_layers, n_tokens, width))
    x_LND = new_LND[0] + 0.2 + step * np.cumsum(new_LND, axis=0)
    return list(x_LND.astype(np.float32))


def true_distortion(x_LND: Sequence[Float32], decoded_NLD: Float32) -> NDArray[np.float64]:
    """(L, N), in float64."""
    x = np.stack(x_LND).astype(np.float64)
    error = decoded_NLD.transpose(1, 0, 2).astype(np.float64) - x
    distortion: NDArray[np.float64] = np.square(error).mean(-1) / x.var(-1)
    return distortion


def bound(codec: ResidualCodec, x_LND: Sequence[Float32], encoded: Encoded) -> NDArray[np.float64]:
    """Largest error of each value, shape (N, L, D): half a step, and what float32 rounds away."""
    x = np.stack(x_LND, axis=1).astype(np.float64)
    largest_error: NDArray[np.float64]
    if isinstance(codec, Bf16Codec):
        largest_error = np.abs(x) / 256 + TINY
        return largest_error
    largest = np.abs(x).max(axis=(1, 2), keepdims=True)
    scale = stacked(encoded)["scale"][..., None].astype(np.float64)
    # |x - y| is 2 max|x| and half a step at most; the deviation is as good as float32 can tell
    step = codec.step if isinstance(codec, DeltaCodec) else 0.0
    deviation = x.std(axis=2, keepdims=True) + 1e-3 * largest
    assert (scale <= step * deviation + 3 * largest / Q_MAX + TINY).all()
    largest_error = scale / 2 + 1e-6 * largest + TINY
    return largest_error


def assert_within_bound(codec: ResidualCodec, x_LND: Sequence[Float32]) -> None:
    encoded = codec.encode(x_LND)
    error = np.abs(decoded(codec, encoded).astype(np.float64) - np.stack(x_LND, axis=1))
    assert (error <= bound(codec, x_LND, encoded)).all()
    assert np.isfinite(encoded.distortion_LN).all()


def test_every_kind_is_among_the_variants() -> None:
    assert {codec.kind for codec in VARIANTS.values()} == set(CODECS)


@over_codecs
def test_round_trip_is_within_half_a_step(codec: ResidualCodec) -> None:
    assert_within_bound(codec, walk(6))


@over_codecs
def test_reported_distortion_is_the_error_of_what_is_decoded(codec: ResidualCodec) -> None:
    x_LND = walk(6)
    encoded = codec.encode(x_LND)
    expected_LN = true_distortion(x_LND, decoded(codec, encoded))
    assert expected_LN.min() > 0
    np.testing.assert_allclose(encoded.distortion_LN, expected_LN, rtol=1e-3)


@over_codecs
def test_arrays_are_as_the_layout_says(codec: ResidualCodec) -> None:
    encoded = codec.encode(walk(3, n_tokens=7, width=10))
    expected = {
        a.name: ((7, a.per_token) if a.per_token else (7,), a.dtype) for a in codec.layout(10)
    }
    for layer in encoded.layers:
        assert {name: (v.shape, str(v.dtype)) for name, v in layer.items()} == expected


@over_codecs
def test_any_layers_in_any_order_decode_as_they_do_among_all(codec: ResidualCodec) -> None:
    encoded = codec.encode(walk(5, n_tokens=9, width=6))
    full_NLD = decoded(codec, encoded)
    subsets = itertools.chain.from_iterable(
        itertools.permutations(range(5), size) for size in range(1, 4)
    )
    for wanted in (*subsets, (4, 3, 2, 1, 0), (2, 2)):
        np.testing.assert_array_equal(decoded(codec, encoded, wanted), full_NLD[:, wanted])


@pytest.mark.parametrize(
    ("codec", "wanted", "required"),
    [
        (Bf16Codec(), (5, 2), (2, 5)),
        (Int8Codec(), (0, 7), (0, 7)),
        (DeltaCodec(), (3,), (0, 1, 2, 3)),
        (DeltaCodec(keyframe_every=1), (3, 5), (3, 5)),
        (DeltaCodec(keyframe_every=3), (5,), (3, 4, 5)),
        (DeltaCodec(keyframe_every=3), (3,), (3,)),
        (DeltaCodec(keyframe_every=3), (1, 7), (0, 1, 6, 7)),
    ],
)
def test_only_the_layers_back_to_a_keyframe_are_required(
    codec: ResidualCodec, wanted: tuple[int, ...], required: tuple[int, ...]
) -> None:
    assert codec.required(wanted) == required


@over_codecs
def test_more_tokens_than_a_working_block_holds(codec: ResidualCodec) -> None:
    x_LND = walk(2, n_tokens=300, width=512)
    assert_within_bound(codec, x_LND)
    encoded = codec.encode(x_LND)
    tail = tuple({n: v[200:] for n, v in layer.items()} for layer in encoded.layers)
    np.testing.assert_array_equal(
        decoded(codec, encoded._replace(layers=tail)), decoded(codec, encoded)[200:]
    )


@over_codecs
def test_joined_blocks_decode_one_after_the_other(codec: ResidualCodec) -> None:
    first, second = (codec.encode(walk(2, n_tokens=n, width=6)) for n in (3, 5))
    joined = first._replace(layers=tuple(join_blocks([first.layers, second.layers])))
    np.testing.assert_array_equal(
        decoded(codec, joined), np.concatenate([decoded(codec, first), decoded(codec, second)])
    )


@over_codecs
@pytest.mark.parametrize(
    "token",
    [
        [0.0] * 8,
        [3.25] * 8,
        [-1e-20] * 8,
        [0.0] * 7 + [1e30],
        [1e38, -1e38] * 4,
        [1e-30, -3e-30] * 4,
        [1e-37, -1e-38] * 4,
        [1e-45, 0.0] * 4,
        [1e-20, 1e20] * 4,
    ],
    ids=["zeros", "constant", "small", "one", "huge", "tiny", "lost", "subnormal", "both"],
)
def test_extreme_values_stay_within_the_bound(codec: ResidualCodec, token: list[float]) -> None:
    """Beside an ordinary token, and with zeros before and after: nothing leaks, no warning."""
    x_ND = np.array([token, np.linspace(-1, 1, 8)], np.float32)
    assert_within_bound(codec, [x_ND, np.zeros_like(x_ND), x_ND, x_ND, x_ND[::-1]])


@over_codecs
def test_zeros_come_back_as_zeros(codec: ResidualCodec) -> None:
    x_LND = [np.zeros((4, 6), np.float32)] * 3
    encoded = codec.encode(x_LND)
    assert not decoded(codec, encoded).any()
    assert not encoded.distortion_LN.any()


@over_codecs
@settings(max_examples=60)
@given(
    x_LND=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5)).flatmap(
        lambda s: arrays(
            np.float32,
            (s[0], s[1], 2 * s[2]),
            elements=st.floats(-(2.0**126), 2.0**126, width=32),
        )
    )
)
def test_any_finite_values_round_trip_within_the_bound(
    codec: ResidualCodec, x_LND: Float32
) -> None:
    assert_within_bound(codec, list(x_LND))


@over_codecs
def test_codecs_survive_json(codec: ResidualCodec) -> None:
    assert codec_from_dict(codec.to_dict()) == codec


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"kind": None},
        {"kind": "zip"},
        {"kind": ["delta"]},
        {"kind": "bf16", "step": 0.2},
        {"kind": "delta", "steps": 0.2},
        {"kind": "delta", "step": "0.2"},
        {"kind": "delta", "step": True},
        {"kind": "delta", "step": 0},
        {"kind": "delta", "step": 10.0},
        {"kind": "delta", "step": math.nan},
        {"kind": "delta", "keyframe_every": -1},
        {"kind": "delta", "keyframe_every": 2.0},
    ],
)
def test_a_malformed_description_is_a_value_error(record: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"codec|keyframe_every"):
        codec_from_dict(record)


def test_delta_needs_an_even_width() -> None:
    with pytest.raises(ValueError, match="even width, found 7; use int8"):
        DeltaCodec().layout(7)


# bf16


def test_bf16_rounds_as_torch_does() -> None:
    """Ties to even, and what is just beside them, over all exponents and both signs."""
    upper = np.arange(0, 0x7F00, 13, dtype=np.uint32)[:, None]
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    bits = np.concatenate([upper << 16 | lower, (upper | 0x8000) << 16 | lower])
    x_ND = bits.view(np.float32)
    encoded = Bf16Codec().encode([x_ND])
    expected = torch.from_numpy(x_ND).bfloat16()
    np.testing.assert_array_equal(
        encoded.layers[0]["codes"].view(np.int16), expected.view(torch.int16).numpy()
    )
    np.testing.assert_array_equal(
        decoded(Bf16Codec(), encoded)[:, 0].view(np.int32), expected.float().view(torch.int32)
    )


def test_bf16_is_exact_on_bfloat16_values() -> None:
    x_ND = torch.from_numpy(walk(1)[0]).bfloat16().float().numpy()
    encoded = Bf16Codec().encode([x_ND])
    np.testing.assert_array_equal(decoded(Bf16Codec(), encoded)[:, 0], x_ND)
    assert not encoded.distortion_LN.any()


# int8


def test_int8_formula() -> None:
    codec, x_ND = Int8Codec(), walk(1)[0]
    encoded = codec.encode([x_ND])
    scale_N1 = np.abs(x_ND.astype(np.float64)).max(axis=1, keepdims=True) / Q_MAX
    codes, scale = encoded.layers[0]["codes"], encoded.layers[0]["scale"]
    np.testing.assert_allclose(scale, scale_N1[:, 0], rtol=1e-7)
    assert np.abs(codes - x_ND / scale_N1).max() < 0.5 + 1e-4
    assert (np.abs(codes.astype(int)).max(axis=1) == Q_MAX).all()
    expected = np.array(
        [[np.float32(q) * s for q in row] for row, s in zip(codes, scale, strict=True)]
    )
    np.testing.assert_array_equal(decoded(codec, encoded)[:, 0], expected)


# delta


def quantised(encoded: Encoded) -> list[NDArray[np.int64]]:
    """`q` of each layer, (N, D), from the nibble planes, by their definition."""
    layers = []
    for codes in encoded.layers:
        low, high = codes["low"].astype(int), codes["high"].astype(int)
        even, odd = (low & 15) + 16 * (high & 15), (low >> 4) + 16 * (high >> 4)
        unsigned = np.stack([even, odd], axis=-1).reshape(len(low), -1)
        layers.append((unsigned - 8 + 128) % 256 - 128)
    return layers


def is_keyframe(codec: DeltaCodec, position: int) -> bool:
    return position == 0 if codec.keyframe_every == 0 else position % codec.keyframe_every == 0


@over_deltas
def test_delta_encodes_by_the_formula(codec: DeltaCodec) -> None:
    """Against float64 arithmetic, from what the decoder has for the layer before."""
    x_LND = walk(7)
    encoded = codec.encode(x_LND)
    decoded_NLD = decoded(codec, encoded).astype(np.float64)
    for position, q_ND in enumerate(quantised(encoded)):
        x_ND = x_LND[position].astype(np.float64)
        residual_ND = x_ND - (0.0 if is_keyframe(codec, position) else decoded_NLD[:, position - 1])
        scale_N = np.maximum(codec.step * x_ND.std(axis=1), np.abs(residual_ND).max(1) / Q_MAX)
        np.testing.assert_allclose(encoded.layers[position]["scale"], scale_N, rtol=1e-5)
        assert np.abs(q_ND - residual_ND / scale_N[:, None]).max() < 0.5 + 2e-3
        assert np.abs(q_ND).max() <= Q_MAX


@over_deltas
def test_delta_decodes_by_the_formula_to_the_last_bit(codec: DeltaCodec) -> None:
    """One float32 product and one float32 sum at a time."""
    encoded = codec.encode(walk(7, n_tokens=5, width=8))
    actual_NLD = decoded(codec, encoded)
    for token, channel in itertools.product(range(5), range(8)):
        value = np.float32(0)
        for position, q_ND in enumerate(quantised(encoded)):
            product = encoded.layers[position]["scale"][token] * np.float32(q_ND[token, channel])
            value = product if is_keyframe(codec, position) else value + product
            assert actual_NLD[token, position, channel] == value


def test_every_code_has_its_bits_in_the_planes() -> None:
    x_ND = np.arange(-128, 128, dtype=np.float32).reshape(1, -1)
    x_ND[0, 0] = 0
    encoded = DeltaCodec(step=1e-3).encode([x_ND])  # so small that max|x| / 127 decides: 1
    codes = encoded.layers[0]
    assert codes["scale"].tolist() == [1]
    unsigned = [(int(q) + 8) % 256 for q in x_ND[0]]
    pairs = list(zip(unsigned[::2], unsigned[1::2], strict=True))
    assert codes["low"].tolist() == [[a % 16 + 16 * (b % 16) for a, b in pairs]]
    assert codes["high"].tolist() == [[a // 16 + 16 * (b // 16) for a, b in pairs]]
    np.testing.assert_array_equal(decoded(DeltaCodec(), encoded)[:, 0], x_ND)


@pytest.mark.parametrize("keyframe_every", [0, 5])
def test_errors_do_not_pile_up_over_layers(keyframe_every: int) -> None:
    codec = DeltaCodec(keyframe_every=keyframe_every)
    distortion_L = codec.encode(walk(60, n_tokens=100)).distortion_LN.mean(axis=1)
    uniform = codec.step**2 / 12
    assert distortion_L.min() > 0.9 * uniform
    assert distortion_L.max() < 1.1 * uniform


def test_a_smaller_step_costs_bits_and_distorts_less() -> None:
    x_LND = walk(8)
    steps = [DeltaCodec(step=step) for step in (0.05, 0.1, 0.2, 0.4)]
    distortion = [float(codec.encode(x_LND).distortion_LN.mean()) for codec in steps]
    bits = [codec.estimated_bits(16, 576) for codec in steps]
    assert distortion == sorted(distortion)
    assert bits == sorted(bits, reverse=True)


def test_estimates_are_near_what_was_measured() -> None:
    """Sixteen layers of width 576, the tables in docs/STORE_FORMAT.md."""
    measured = {
        DeltaCodec(): 2.68,
        DeltaCodec(step=0.15): 3.08,
        Int8Codec(): 4.9,
        Bf16Codec(): 12.6,
    }
    for codec, bits in measured.items():
        assert codec.estimated_bits(16, 576) == pytest.approx(bits, rel=0.03)
    every = dataclasses.replace(DeltaCodec(), keyframe_every=1)
    assert every.estimated_bits(16, 576) > DeltaCodec().estimated_bits(16, 576)
