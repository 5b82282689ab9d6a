"""The description of a store: what it allows, what it computes, what it reads back."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stores.codecs import Bf16Codec, DeltaCodec, ResidualCodec
from stores.spec import FORMAT_VERSION, StoreSpec
from tests.store_helpers import VARIANTS, grown, store_spec, without_rows

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
RECORDS = st.dictionaries(st.text(max_size=8), JSON, max_size=4)


@given(
    model=RECORDS.map(lambda record: record | {"name": "m", "dtype": "float32", "weights": "0"}),
    text=RECORDS.map(lambda record: record | {"dataset": "t"}),
    codec=st.sampled_from(list(VARIANTS.values())),
    layers=st.sets(st.integers(0, 40), min_size=1).map(lambda found: tuple(sorted(found))),
    half_width=st.integers(1, 10**6),
    rows=st.tuples(st.integers(0, 10**9), st.integers(0, 10**9)),
    exhausted=st.booleans(),
)
def test_a_spec_survives_json(
    model: dict[str, Any],
    text: dict[str, Any],
    codec: ResidualCodec,
    layers: tuple[int, ...],
    half_width: int,
    rows: tuple[int, int],
    exhausted: bool,
) -> None:
    spec = StoreSpec(
        model=model,
        tokenizer={},
        text=text,
        packing="joined",
        layers=layers,
        n_blocks=40,
        width=2 * half_width,
        context=512,
        codec=codec,
        batch_rows=1,
        chunk_rows=4,
        eval_target=7,
        eval_rows=4 * rows[0],
        train_rows=rows[1],
        exhausted=exhausted,
    )
    assert StoreSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_the_format_version_is_recorded() -> None:
    assert store_spec().to_dict()["format_version"] == FORMAT_VERSION == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, "width: expected at least 1, found 0"),
        ({"context": 0}, "context"),
        ({"batch_rows": 0}, "batch_rows"),
        ({"chunk_rows": -1}, "chunk_rows"),
        ({"n_blocks": 0}, "n_blocks"),
        ({"eval_target": -1}, "eval_target"),
        ({"train_rows": -1}, "train_rows"),
        ({"eval_rows": -3}, "eval_rows"),
        ({"train_tokens": -1}, "train_tokens"),
        ({"eval_tokens": -1}, "eval_tokens"),
        ({"eval_rows": 4}, "eval_rows: expected whole chunks of 3, found 4"),
        ({"layers": ()}, "layers"),
        ({"layers": (2, 1)}, "layers: expected ascending and distinct from 0 to 6"),
        ({"layers": (1, 1)}, "layers"),
        ({"layers": (-1, 1)}, "layers"),
        ({"layers": (6, 7)}, "layers"),
        ({"width": 7}, "even width"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    spec = store_spec()
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(spec, **changes)


def test_the_embedding_and_the_last_block_are_layers() -> None:
    assert store_spec(layers=(0, 6), n_blocks=6).positions((6,)) == (1,)


def test_chunks_and_splits() -> None:
    spec = store_spec()  # 3 eval rows and 4 train rows, in chunks of 3
    assert (spec.rows, spec.chunks, spec.values_per_token) == (7, 3, 24)
    assert [spec.chunk_range(chunk) for chunk in range(3)] == [
        slice(0, 3),
        slice(3, 6),
        slice(6, 7),
    ]
    assert list(spec.split_chunks("eval")) == [0]
    assert list(spec.split_chunks("train")) == [1, 2]
    assert list(spec.split_chunks("all")) == [0, 1, 2]
    assert spec.tokens == spec.eval_tokens + spec.train_tokens > 0
    empty = without_rows(spec)
    assert (empty.rows, empty.chunks, empty.tokens) == (0, 0, 0)


def test_positions_of_layers() -> None:
    spec = store_spec(layers=(1, 2, 4))
    assert spec.positions((4, 1, 4)) == (2, 0, 2)
    with pytest.raises(ValueError, match=r"layers \[3, 5\] are not in the store; it has 1, 2, 4"):
        spec.positions((4, 3, 5))


def test_row_counts_are_no_difference() -> None:
    spec = store_spec()
    assert spec.differences(dataclasses.replace(grown(spec, 9), exhausted=True)) == []
    assert spec.differences(without_rows(spec)) == []


def test_differences_name_the_key_and_both_values() -> None:
    spec = store_spec()
    asked = dataclasses.replace(
        spec,
        model={"name": "other", "weights": "0123", "dtype": "float32"},
        text={"dataset": "synthetic"},
        codec=DeltaCodec(step=0.1),
        layers=(1, 2),
        eval_target=10,
    )
    assert spec.differences(asked) == [
        "codec.step: the store has 0.2, asked for 0.1",
        "eval_target: the store has 9, asked for 10",
        "layers: the store has [1, 2, 4], asked for [1, 2]",
        "model.name: the store has 'tiny', asked for 'other'",
        "text.seed: the store has 0, asked for None",
    ]
    assert spec.differences(dataclasses.replace(spec, codec=Bf16Codec())) == [
        "codec.keyframe_every: the store has 0, asked for None",
        "codec.kind: the store has 'delta', asked for 'bf16'",
        "codec.step: the store has 0.2, asked for None",
    ]


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(StoreSpec)])
def test_every_field_is_needed_and_typed(name: str) -> None:
    record = store_spec().to_dict()
    with pytest.raises(ValueError, match=f"missing or unknown: {name}"):
        StoreSpec.from_dict({key: value for key, value in record.items() if key != name})
    for wrong in (None, 1.5, "x" if record[name].__class__ is not str else 1):
        with pytest.raises(ValueError, match=name):
            StoreSpec.from_dict(record | {name: wrong})


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(ValueError, match="missing or unknown: colour"):
        StoreSpec.from_dict(store_spec().to_dict() | {"colour": "blue"})


@pytest.mark.parametrize("layers", [["1"], [1.0], [True], [[1]], []])
def test_layers_are_integers(layers: list[Any]) -> None:
    with pytest.raises(ValueError, match="layers"):
        StoreSpec.from_dict(store_spec().to_dict() | {"layers": layers})
