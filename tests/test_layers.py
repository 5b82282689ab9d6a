"""Texts that name layers."""

import pytest

from routesae_cache.layers import default_layer, parse_layers


@pytest.mark.parametrize(
    ("text", "n_layers", "layers"),
    [
        ("auto", 30, range(7, 23)),
        ("auto", 16, range(4, 13)),
        ("all", 3, range(4)),
        ("7-22", 30, range(7, 23)),
        ("0", 30, [0]),
        ("30", 30, [30]),
        ("4,8,12", 30, [4, 8, 12]),
        ("9, 1-3,2", 30, [1, 2, 3, 9]),
    ],
)
def test_layers(text: str, n_layers: int, layers: range) -> None:
    assert parse_layers(text, n_layers) == tuple(layers)


@pytest.mark.parametrize("text", ["", "x", "3-", "-3", "5-4", "1,,2", "1.5", "1..3", "auto,3"])
def test_malformed(text: str) -> None:
    with pytest.raises(ValueError, match=r"layers of 0-30"):
        parse_layers(text, 30)


@pytest.mark.parametrize("text", ["31", "7-31", "1,200"])
def test_out_of_range(text: str) -> None:
    with pytest.raises(ValueError, match=r"0 \(the embedding\) to 30"):
        parse_layers(text, 30)


def test_the_default_layer_is_the_last_of_auto() -> None:
    assert default_layer(30) == parse_layers("auto", 30)[-1] == 22
