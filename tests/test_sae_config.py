"""Configurations, names and the grammar of `--sae`."""

from __future__ import annotations

import json
from typing import Any

import pytest

from routesae_cache.saes import PRESETS, SaeConfig, build_sae, parse_sae, parse_saes
from routesae_cache.saes.registry import CODERS, NAMES, SELECTORS, expand, resolve_name

TOPK: dict[str, Any] = {"selector": "fixed", "coder": "topk", "layers": (22,), "latents": 64}
STORE: dict[str, Any] = {"store_layers": (7, 8, 12, 22), "auto_layer": 22, "width": 16}


def test_json_round_trip() -> None:
    config = SaeConfig(
        selector="route",
        coder="matryoshka",
        layers=(4, 5, 6),
        latents=64,
        k=8,
        group_sizes=(16, 48),
        route_estimator="straight-through",
    )
    assert SaeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_and_missing_keys_are_named() -> None:
    values = SaeConfig(**TOPK, k=4).to_dict()
    with pytest.raises(ValueError, match=r"unknown keys \['lamda'\]"):
        SaeConfig.from_dict(values | {"lamda": 1})
    del values["latents"]
    with pytest.raises(ValueError, match=r"lacks the keys \['latents'\]"):
        SaeConfig.from_dict(values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "coder 'topk' needs k"),
        ({"coder": "relu"}, "coder 'relu' needs sparsity_weight"),
        ({"k": 65}, "k=65 with latents=64"),
        ({"k": 0}, "k=0 with latents=64"),
        ({"k": 4, "sparsity_weight": 0.1}, "sparsity_weight=0.1 does not apply to coder 'topk'"),
        ({"coder": "relu", "sparsity_weight": 0.1, "k": 4}, "k=4 does not apply to coder 'relu'"),
        ({"coder": "relu", "sparsity_weight": -1.0}, "sparsity_weight must be finite"),
        ({"k": 4, "hard": False}, "hard=False does not apply to selector 'fixed'"),
        ({"k": 4, "layers": (1, 2)}, "exactly one layer"),
        ({"k": 4, "selector": "every", "layers": (2, 1)}, "ascending"),
        ({"k": 4, "selector": "every", "layers": ()}, "not empty"),
        ({"k": 4, "layers": (-1,)}, "count from 0"),
        ({"k": 4, "latents": 0}, "latents must be at least 1"),
        ({"k": 4, "norm": "layer"}, "norm is one of token, scalar, none; got 'layer'"),
        ({"k": 4.0}, "k is one of int, NoneType; got 4.0"),
        ({"k": 4, "coder": "matryoshka", "group_sizes": (1, 2)}, "which sum to 3"),
        ({"k": 4, "selector": "all", "coder": "matryoshka"}, "the crosscoder is built with"),
        ({"k": 4, "dead_window_tokens": 0}, "dead_window_tokens must be positive"),
    ],
)
def test_contradictions(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        SaeConfig(**(TOPK | changes))


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (SaeConfig(**TOPK, k=32), "fixed+topk layer=22 k=32"),
        (
            SaeConfig(selector="route", coder="topk", layers=(1, 2), latents=64, k=32, hard=False),
            "route+topk soft k=32",
        ),
        (
            SaeConfig(
                selector="all", coder="relu", layers=(1, 2), latents=64, sparsity_weight=0.05
            ),
            "crosscoder+relu l1=0.05",
        ),
    ],
)
def test_names_of_configurations(config: SaeConfig, name: str) -> None:
    assert config.name == name


def test_every_name_builds() -> None:
    general = {f"{s}+{c}" for s in SELECTORS for c in CODERS if s != "all"}
    for name in {*NAMES, *general, "crosscoder+batchtopk"}:
        coder = resolve_name(name)[1]
        option = "k=2" if "top" in coder or "mat" in coder else "sparsity_weight=0.1"
        (spec,) = parse_sae(f"{name}:{option}", defaults=PRESETS["default"])
        sae = build_sae(spec.config(**STORE), STORE["width"], seed=0)
        assert sae.config.latents == 8 * STORE["width"]


def test_seeds_mean_what_the_paper_says() -> None:
    assert NAMES["routesae"] == ("route", "topk")
    assert NAMES["mlsae"] == ("every", "topk")
    assert NAMES["vanilla"] == ("fixed", "relu")
    assert resolve_name("crosscoder") == resolve_name("crosscoder+relu") == ("all", "relu")


def test_a_list_is_a_grid() -> None:
    specs = parse_sae("topk:k=32,64,layer=12,22", defaults={"latents": 512})
    found = [(s.config(**STORE).k, s.config(**STORE).layers) for s in specs]
    assert found == [(32, (12,)), (32, (22,)), (64, (12,)), (64, (22,))]


def test_layers_come_from_the_store_unless_given() -> None:
    assert parse_sae("topk:k=2")[0].config(**STORE).layers == (22,)
    assert parse_sae("topk:k=2,layer=auto")[0].config(**STORE).layers == (22,)
    assert parse_sae("routesae:k=2")[0].config(**STORE).layers == (7, 8, 12, 22)
    assert parse_sae("routesae:k=2,layers=7-8")[0].config(**STORE).layers == (7, 8)
    assert parse_sae("routesae:k=2,layers=7+12")[0].config(**STORE).layers == (7, 12)
    with pytest.raises(ValueError, match=r"has the layers \[7, 8, 12, 22\], not \[9\]"):
        parse_sae("topk:k=2,layer=9")[0].config(**STORE)


def test_values_are_typed() -> None:
    (spec,) = parse_sae("routesae:k=2,hard=false,auxk=none,dead-window-tokens=50,init_bias=median")
    options = {"k": 2, "hard": False, "auxk": None, "dead_window_tokens": 50, "init_bias": "median"}
    assert spec.options == options
    (spec,) = expand("matryoshka", {"k": 2, "group_sizes": "8+24", "latents": 32})
    assert spec.options["group_sizes"] == (8, 24)


def test_defaults_apply_where_they_mean_something() -> None:
    defaults = {"k": 8, "sparsity_weight": 0.2, "layer": 12, "layers": "7-8"}
    assert parse_sae("topk", defaults=defaults)[0].options == {"k": 8}
    assert parse_sae("vanilla", defaults=defaults)[0].options == {"sparsity_weight": 0.2}
    assert parse_sae("topk:k=4", defaults=defaults)[0].options == {"k": 4}
    assert parse_sae("topk", defaults=defaults)[0].layers == (12,)
    assert parse_sae("mlsae", defaults=defaults)[0].layers == (7, 8)


def test_training_options_travel_along() -> None:
    specs = parse_sae("topk:k=2,seed=1,2", train_options={"seed": int})
    assert [spec.train for spec in specs] == [{"seed": 1}, {"seed": 2}]
    assert all(spec.options == {"k": 2} for spec in specs)


def test_presets() -> None:
    (paper,) = parse_saes(["routesae"], options={"k": 4}, preset="paper")
    config = paper.config(**STORE)
    assert (config.route_estimator, config.auxk, config.init_bias) == ("factor", 0, "zero")
    (own,) = parse_saes(["gated"], options={"sparsity_weight": 0.1}, preset="default")
    assert own.config(**STORE).gated_aux == "paper"


def test_soft_routing_works_under_every_preset() -> None:
    for preset in PRESETS:
        (spec,) = parse_saes(["routesae:k=4,hard=false"], options={}, preset=preset)
        assert spec.config(**STORE).hard is False


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rutesae:k=2", "unknown SAE 'rutesae'; there are vanilla, gated, topk"),
        (
            "route+dense:k=2",
            "selectors fixed, route, random, every, crosscoder and the coders relu",
        ),
        ("topk:q=2", r"topk has no option 'q'; its options are layer, latents, k"),
        ("topk:k=2,sparsity_weight=0.1", "for the coders relu, gated, jumprelu"),
        ("vanilla:sparsity_weight=0.1,k=2", "k does not apply to vanilla"),
        ("topk:k=2,hard=false", "hard does not apply to topk: it is for the selectors route"),
        ("topk:k=2,layers=1-2", "topk takes layer, not layers"),
        ("routesae:k=2,layer=3", "routesae takes layers, not layer"),
        ("topk:k=2,k=3", "gives k twice"),
        ("topk:32", "could not read '32'"),
        ("topk:k=", "could not read 'k='"),
        ("topk:k=two", "k takes a whole number; got 'two'"),
        ("topk:k=2.5", "k takes a whole number; got '2.5'"),
        ("vanilla:sparsity_weight=much", "sparsity_weight takes a number"),
        ("routesae:k=2,hard=perhaps", "hard takes true or false"),
        ("topk:k=2,norm=batch", "norm is one of token, scalar, none"),
        ("topk", "coder 'topk' needs k"),
        ("topk:k=64,latents=32", "k=64 with latents=32"),
        ("crosscoder+jumprelu:sparsity_weight=1", "the crosscoder is built with"),
        ("routesae:k=2,layers=8-7", "not empty"),
    ],
)
def test_mistakes_are_found_while_reading(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_sae(text)


def test_a_common_option_that_fits_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sparsity_weight=0.1 does not apply to topk, routesae"):
        parse_saes(["topk", "routesae"], options={"sparsity_weight": 0.1, "k": 2}, preset="default")
    specs = parse_saes(
        ["topk", "vanilla"], options={"sparsity_weight": 0.1, "k": 2}, preset="default"
    )
    assert [spec.options.get("k") for spec in specs] == [2, None]
    with pytest.raises(ValueError, match="unknown preset 'theirs'; there are default, paper"):
        parse_saes(["topk"], options={}, preset="theirs")


def test_matryoshka_groups_sum_to_the_latents() -> None:
    for latents in (1, 2, 7, 33, 1000, 4608):
        config = SaeConfig(selector="fixed", coder="matryoshka", layers=(1,), latents=latents, k=1)
        assert sum(config.resolved_groups()) == latents
        assert min(config.resolved_groups()) >= 1
