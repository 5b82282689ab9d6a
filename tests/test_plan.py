"""Time, bytes and money on paper."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from cli.plan_tables import codec_table, figure_table, plan_table, worker_table
from routesae_cache.plan import COMPARED, Setting, plan, with_codecs, with_workers
from routesae_cache.presets import MODELS, ModelSizes
from routesae_cache.rates import GPUS, RATE_NAMES, RateError, Rates, rates_for
from routesae_cache.saes.config import SaeConfig
from stores.codecs import Bf16Codec, DeltaCodec
from tests.command_helpers import refused, routesae

SIZES = ModelSizes(n_layers=4, width=64, block_parameters=10_000)
TOPK = SaeConfig(selector="fixed", coder="topk", layers=(3,), latents=512, k=8)
ROUTED = SaeConfig(selector="route", coder="topk", layers=(1, 3), latents=512, k=8)
SETTING = Setting(
    model=SIZES,
    tokens=100_000,
    eval_tokens=31_072,
    layers=(1, 3),
    context=16,
    codec=Bf16Codec(),
    workers=2,
    ranks=2,
    saes=(ROUTED,),
    batch_tokens=1000,
)
RATES = Rates(
    gpu="h100",
    bf16_flops=1e9,
    model_utilisation=0.5,
    float32_flops=1e8,
    sae_utilisation=0.5,
    sae_products=2.0,
    memory_bandwidth=1e7,
    price_per_hour=36.0,
    cores=8.0,
    transfer_bytes=1e7,
    pinned_bytes=5e6,
    network_bytes=1e6,
    reduce_bytes=1e8,
    storage_bytes=4e6,
    start_seconds=5.0,
    tokenise_us=10.0,
    encode_ns_bf16=1000.0,
    decode_ns_bf16=500.0,
    normalise_ns=250.0,
    reader_threads=4.0,
    storage_price=100.0,
    storage_months=2.0,
    egress_price=10.0,
)
SLOWER_WHEN_LARGER = {
    name for name in RATE_NAMES if name.startswith(("encode_ns", "decode_ns", "normalise_ns"))
} | {"sae_products", "start_seconds", "tokenise_us"}
PRICES = {"price_per_hour", "storage_price", "storage_months", "egress_price"}


def test_an_example_by_hand() -> None:
    """131,072 tokens in 2 chunks of 4,096 rows of 16, one for each worker; 128 values a token."""
    found = plan(SETTING, RATES)
    # 12.6 bits of 131,072 x 128 values
    assert found.store_bytes == pytest.approx(26_424_115.2)
    harvest = {part.what: (part.place, part.seconds) for part in found.harvest.parts}
    # 2 x 3 blocks x (10,000 + 2 x 16 x 64) = 72,288 FLOP a token, 65,536 tokens, at 5e8 FLOP/s
    assert harvest["model"] == ("GPU", pytest.approx(9.474932736))
    # 65,536 x 128 values x 2 bytes at 1e7; x 1000 ns on 8 cores
    assert harvest["copies"] == ("GPU", pytest.approx(1.6777216))
    assert harvest["encode"] == ("cores", pytest.approx(1.048576))
    # half of the bytes over each worker's network, all of them into the storage
    assert harvest["network"] == ("network", pytest.approx(13.2120576))
    assert harvest["storage"] == ("storage", pytest.approx(6.6060288))
    # 5 s of start, 131,072 x 10 µs of tokenising, then what is slowest: the network
    assert found.harvest.bottleneck.what == "network"
    assert found.harvest.seconds == pytest.approx(5 + 1.31072 + 13.2120576)
    assert found.harvest.tokens_per_second == pytest.approx(131_072 / 13.2120576)
    assert found.harvest.dollars == pytest.approx(2 * 36 * 19.5227776 / 3600)

    training = {part.what: (part.place, part.seconds) for part in found.training.parts}
    # a product of 512 x 64, 2 FLOP, twice for the whole step; 50,000 tokens each at 5e7 FLOP/s
    assert training["SAE steps"] == ("GPU", pytest.approx(131.072))
    # 100 steps, 2 x 512 x 64 weights: 28 bytes at 1e7; 2 x 1/2 x 4 bytes at 1e8
    assert training["Adam"] == ("GPU", pytest.approx(18.35008))
    assert training["gradients"] == ("GPU", pytest.approx(0.262144))
    # 50,000 tokens of 128 values, 4 bytes at 5e6; 500 + 250 ns on the 4 threads that decode
    assert training["copies"] == ("link", pytest.approx(5.12))
    assert training["decode"] == ("cores", pytest.approx(1.2))
    # 100,000 x 128 x 12.6 bits
    assert found.training.n_bytes == pytest.approx(20_160_000)
    assert training["storage"] == ("storage", pytest.approx(5.04))
    assert training["network"] == ("network", pytest.approx(10.08))
    assert found.training.bottleneck.what == "SAE steps"
    assert found.training.seconds == pytest.approx(5 + 131.072 + 18.35008 + 0.262144)
    assert found.storage_dollars == pytest.approx(0.0264241152 * 200)
    assert found.egress_dollars == pytest.approx(0.02016 * 10)
    parts = (found.harvest.dollars, found.training.dollars, 5.28482304, 0.2016)
    assert found.dollars == pytest.approx(sum(parts))


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": 200_000},
        {"eval_tokens": 200_000},
        {"layers": (1, 2, 3)},
        {"layers": (1, 3, 4)},
        {"context": 32},
        {"model": SIZES._replace(block_parameters=20_000)},
        {"model": SIZES._replace(width=128)},
        {"saes": (ROUTED, TOPK)},
        {"saes": (dataclasses.replace(ROUTED, latents=1024),)},
        {"epochs": 2},
        {"workers": 1},
    ],
)
def test_more_to_do_takes_more(change: dict[str, object]) -> None:
    few, many = plan(SETTING, RATES), plan(dataclasses.replace(SETTING, **change), RATES)
    pairs = [(few.harvest, many.harvest), (few.training, many.training)]
    for less, more in pairs:
        assert more.seconds >= less.seconds
        assert more.n_bytes >= less.n_bytes
    less, more = (
        sum(p.seconds for s in pair for p in _all(s)) for pair in zip(*pairs, strict=True)
    )
    assert more > less
    assert many.store_bytes >= few.store_bytes


@pytest.mark.parametrize("name", [n for n in RATE_NAMES if getattr(RATES, n) is not None])
@pytest.mark.parametrize("factor", [1.1, 2.0, 1e6])
def test_every_rate_and_price_has_its_direction(name: str, factor: float) -> None:
    value = getattr(RATES, name)
    larger = min(value * factor, 1.0) if name.endswith("utilisation") else value * factor
    kinds = [plan(dataclasses.replace(SETTING, codec=codec), RATES) for codec in COMPARED]
    changed = dataclasses.replace(RATES, **{name: larger})
    others = [plan(dataclasses.replace(SETTING, codec=codec), changed) for codec in COMPARED]
    if name in PRICES:
        assert all(b.dollars > a.dollars for a, b in zip(kinds, others, strict=True))
        return
    before = [part.seconds for p in kinds for s in (p.harvest, p.training) for part in _all(s)]
    after = [part.seconds for p in others for s in (p.harvest, p.training) for part in _all(s)]
    changes = [b - a for a, b in zip(before, after, strict=True)]
    if name not in SLOWER_WHEN_LARGER:
        changes = [-change for change in changes]
    assert min(changes) >= 0
    assert max(changes) > 0


def _all(stage):  # type: ignore[no-untyped-def]
    return (*stage.before, *stage.parts)


@pytest.mark.parametrize(
    ("slow", "stage", "what"),
    [
        ({"bf16_flops": 1e6}, "harvest", "model"),
        ({"encode_ns_bf16": 1e9}, "harvest", "encode"),
        ({"transfer_bytes": 1e3}, "harvest", "copies"),
        ({"network_bytes": 1e3}, "harvest", "network"),
        ({"storage_bytes": 1e3}, "harvest", "storage"),
        ({"float32_flops": 1e5}, "training", "SAE steps"),
        ({"reader_threads": 1e-3}, "training", "decode"),
        ({"pinned_bytes": 1e3}, "training", "copies"),
        ({"memory_bandwidth": 1e3}, "training", "Adam"),
        ({"reduce_bytes": 1e3}, "training", "gradients"),
        ({"network_bytes": 1e3}, "training", "network"),
        ({"storage_bytes": 1e3}, "training", "storage"),
    ],
)
def test_the_bottleneck_moves(slow: dict[str, float], stage: str, what: str) -> None:
    found = getattr(plan(SETTING, dataclasses.replace(RATES, **slow)), stage)
    assert found.bottleneck.what == what
    assert found.seconds == pytest.approx(found.bottleneck.seconds, rel=0.1)


@settings(max_examples=50, deadline=None)
@given(workers=st.integers(1, 200), more=st.integers(1, 200), tokens=st.integers(1, 10**8))
def test_more_workers_never_take_longer_nor_share_less_than_all(
    workers: int, more: int, tokens: int
) -> None:
    for rates in (RATES, dataclasses.replace(RATES, gpu="cpu", cores=1.0, machine_cores=2.0)):
        setting = dataclasses.replace(SETTING, tokens=tokens)
        (_, one), (_, few), (_, many) = with_workers(setting, rates, (1, workers, workers + more))
        assert few.harvest.seconds >= many.harvest.seconds
        for plan_of_many, number in ((few, workers), (many, workers + more)):
            busiest = max(plan_of_many.harvest.places.values())
            assert busiest * number >= max(one.harvest.places.values()) * (1 - 1e-9)


def test_workers_on_one_machine_share_its_cores() -> None:
    rates = dataclasses.replace(
        RATES,
        gpu="cpu",
        cores=1.0,
        machine_cores=2.0,
        model_tokens_per_second=1000.0,
        network_bytes=None,
        transfer_bytes=None,
    )
    setting = dataclasses.replace(SETTING, tokens=4_000_000, eval_tokens=0)
    found = dict(with_workers(setting, rates, (1, 2, 4)))
    places = {n: p.harvest.places["cores"] for n, p in found.items()}
    # one core's model and encoder, which are the same core's work: 1 ms + 128 x 1 µs
    assert places[1] == pytest.approx(4_000_000 * 1.128e-3, rel=0.01)
    assert places[2] == pytest.approx(places[1] / 2, rel=0.02)
    assert places[4] == pytest.approx(places[1] / 2, rel=0.02)


def test_more_workers_than_chunks_stand_idle() -> None:
    found = dict(with_workers(SETTING, RATES, (2, 3, 50)))
    assert found[2].harvest.seconds == found[3].harvest.seconds == found[50].harvest.seconds


def test_a_single_layer_of_delta_needs_those_before_it() -> None:
    setting = dataclasses.replace(SETTING, saes=(TOPK,))
    bf16, delta = (
        plan(dataclasses.replace(setting, codec=codec), RATES).training.n_bytes
        for codec in (Bf16Codec(), DeltaCodec())
    )
    assert bf16 == pytest.approx(100_000 * 64 * 12.6 / 8)
    assert delta == pytest.approx(100_000 * 128 * DeltaCodec().estimated_bits(2, 64) / 8)


def test_other_codecs_are_compared_with_the_settings_own() -> None:
    odd = DeltaCodec(step=0.25)
    assert [codec for codec, _ in with_codecs(SETTING, RATES)] == list(COMPARED)
    found = with_codecs(dataclasses.replace(SETTING, codec=odd), RATES)
    assert [codec for codec, _ in found] == [*COMPARED, odd]
    sizes = {codec: p.store_bytes for codec, p in found}
    assert sizes[DeltaCodec(step=0.3)] < sizes[odd] < sizes[DeltaCodec()] < sizes[Bf16Codec()]


@pytest.mark.parametrize(
    ("name", "config"),
    [
        (
            "llama-3.2-1b",
            LlamaConfig(
                hidden_size=2048,
                intermediate_size=8192,
                num_attention_heads=32,
                num_key_value_heads=8,
                num_hidden_layers=16,
            ),
        ),
        (
            "llama-3.1-8b",
            LlamaConfig(
                hidden_size=4096,
                intermediate_size=14336,
                num_attention_heads=32,
                num_key_value_heads=8,
                num_hidden_layers=32,
            ),
        ),
    ],
)
def test_sizes_of_presets(name: str, config: LlamaConfig) -> None:
    with torch.device("meta"):
        block = LlamaDecoderLayer(config, 0)
    weights = sum(p.numel() for p in block.parameters())
    assert MODELS[name].sizes == (config.num_hidden_layers, config.hidden_size, weights)


def test_rates_of_a_gpu_and_given_ones() -> None:
    rates = rates_for("h100", {"price_per_hour": 2, "cores": 8})
    assert (rates.bf16_flops, rates.memory_bandwidth) == (989e12, 3.35e12)
    figures = {figure.name: figure for figure in rates.figures()}
    assert (figures["price_per_hour"].value, figures["price_per_hour"].basis) == (2.0, "given")
    assert figures["bf16_flops"].basis == "data sheet"
    assert figures["model_utilisation"].basis == "assumed"
    assert "machine_cores" not in figures
    assert all(figure.note for figure in rates.figures())


@pytest.mark.parametrize(
    ("given", "threads"),
    [
        ({}, 16),
        ({"cores": 8}, 8),
        ({"cores": 1}, 2),
        ({"cores": 64}, 16),
        ({"reader_threads": 3}, 3),
    ],
)
def test_a_training_decodes_on_the_cores_there_are(given: dict[str, float], threads: float) -> None:
    rates = rates_for("h100", given)
    assert rates.reader_threads == threads
    decoding = next(p.seconds for p in plan(SETTING, rates).training.parts if p.what == "decode")
    each, values = 50_000, 128
    alone = each * values * (rates.decode_ns_bf16 + rates.normalise_ns) * 1e-9
    assert decoding == pytest.approx(alone / min(threads, rates.cores))


def test_rates_of_this_machine_are_measured() -> None:
    rates = rates_for("cpu", {"cores": 1})
    figures = {figure.name: figure for figure in rates.figures()}
    assert figures["bf16_flops"].basis == "measured"
    assert rates.bf16_flops > 1e8
    assert rates.network_bytes is None
    assert plan(SETTING, rates).harvest.bottleneck.place == "cores"


@pytest.mark.parametrize(
    ("gpu", "rates", "says"),
    [
        ("b9000", {}, ["b9000", *GPUS, "cpu"]),
        ("h100", {"colour": 1}, ["colour", *RATE_NAMES]),
        ("h100", {"cores": 0}, ["cores", "above 0", "found 0"]),
        ("h100", {"cores": True}, ["cores", "number", "True"]),
        ("h100", {"cores": "many"}, ["cores", "number", "many"]),
        ("h100", {"price_per_hour": -1}, ["price_per_hour", "from 0 on", "-1"]),
        ("h100", {"model_utilisation": 1.5}, ["model_utilisation", "at most 1", "1.5"]),
        ("h100", {"storage_bytes": float("inf")}, ["storage_bytes", "inf"]),
    ],
)
def test_rates_that_cannot_be(gpu: str, rates: dict[str, object], says: list[str]) -> None:
    with pytest.raises(RateError) as error:
        rates_for(gpu, rates)
    assert all(word in str(error.value) for word in says)


@pytest.mark.parametrize("name", ["tokens", "workers", "ranks", "epochs", "batch_tokens"])
def test_settings_that_cannot_be(name: str) -> None:
    with pytest.raises(ValueError, match="expected at least 1, found 0"):
        dataclasses.replace(SETTING, **{name: 0})


def test_command_shows_and_writes_the_plan(tmp_path: Path) -> None:
    rates, file = tmp_path / "rates.toml", tmp_path / "plan.json"
    rates.write_text("price_per_hour = 2.5\ncores = 4\n")
    arguments = ["--tokens", "1e9", "--workers", "16", "--set", "cores=8", "--rates", rates]
    result = routesae("plan", *arguments, "--json", file)
    assert result.exit_code == 0, result.output
    for words in ("16 × h100", "◀", "delta 0.2", "assumed", "data sheet"):
        assert words in result.output
    record = json.loads(file.read_text("utf-8"))
    figures = {figure["name"]: (figure["value"], figure["basis"]) for figure in record["rates"]}
    assert figures["cores"] == (8.0, "given")
    assert figures["price_per_hour"] == (2.5, "given")
    assert record["setting"]["tokens"] == 10**9
    assert record["setting"]["layers"] == list(range(8, 25))
    own = [p for p in record["codecs"] if p["codec"] == record["setting"]["codec"]]
    assert own == [{"codec": record["setting"]["codec"], **record["plan"]}]
    assert [p["workers"] for p in record["workers"]] == [1, 2, 4, 16, 64]


def test_tables_fit_80_characters() -> None:
    rates = rates_for("h100", {"machine_cores": 1000, "model_tokens_per_second": 20_000})
    setting = dataclasses.replace(SETTING, model=MODELS["llama-3.1-8b"].sizes, tokens=10**9)
    tables = (
        plan_table(plan(setting, rates), "h100"),
        codec_table(with_codecs(setting, rates)),
        worker_table(with_workers(setting, rates, (1, 64))),
        figure_table(rates.figures()),
    )
    console = Console(width=80)
    with console.capture() as shown:
        for table in tables:
            console.print(table)
    assert "…" not in shown.get()
    cells = {cell for line in shown.get().splitlines() for cell in line.split()}
    assert set(RATE_NAMES) | {"gradients", "delta", "int8", "decode"} <= cells


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--gpu", "abacus"], "abacus"),
        (["--tokens", "1.5"], "whole number"),
        (["--set", "cores"], "NAME=NUMBER"),
        (["--set", "cores=many"], "NAME=NUMBER"),
        (["--layers", "40"], "no layer 40"),
        (["--workers", "0"], "workers: expected at least 1"),
        (["--model", "no model.gguf"], "llama-3.1-8b"),
    ],
)
def test_command_refuses(arguments: list[str], says: str) -> None:
    refused(routesae("plan", *arguments), says)
