"""Steering against a plain computation without a cache, layer by layer and token by token."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor
from typer.testing import Result

from routesae_cache.lm import LanguageModel, ModelError, ModelIdentity
from routesae_cache.origin import origin_lm, origin_tokenizer
from routesae_cache.steering.changes import ChangedLatents, LatentChange
from routesae_cache.steering.dialogues import make_prompt, prompt_ids
from routesae_cache.steering.steer import (
    Reader,
    SteerConfig,
    _chooser,
    _compared,
    _continuation,
    _Made,
    steer,
)
from routesae_cache.tokens import Tokenizer
from routesae_cache.train import train
from routesae_cache.train_plan import TrainConfig
from routesae_cache.trained import Residuals, TrainedSae
from tests.command_helpers import routesae
from tests.conftest import ARCHITECTURES
from tests.pipeline_helpers import LAYERS, SAES, config, run

OF_EVERY_MODEL = ("fixed", "straight-through", "factor", "every")
ROUTED = ("straight-through", "factor")
PROMPT = make_prompt("The router looks at every layer", "here")
NEW = 6


class Setting(NamedTuple):
    """A model, and SAEs of its residuals."""

    lm: LanguageModel
    tokenizer: Tokenizer
    saes: dict[str, TrainedSae]
    folder: Path
    """Where the model is; beside it are s.zarr and runs."""

    def ids(self) -> list[int]:
        return prompt_ids(PROMPT, self.tokenizer, raw=True)

    def steer(self, name: str, changes: Sequence[LatentChange], **options: Any) -> Any:
        latents = ChangedLatents(self.saes[name], changes)
        options = {"max_new_tokens": NEW} | options
        (result,) = steer(self.lm, self.tokenizer, latents, [PROMPT], SteerConfig(**options))
        return result


def with_windows(folder: Path) -> None:
    """Have a saved model see four tokens back and no further; its cache drops what is before."""
    path = folder / "config.json"
    record = json.loads(path.read_text())
    windows = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
    path.write_text(json.dumps(record | windows | {"layer_types": ["sliding_attention"] * 4}))


@pytest.fixture(scope="module")
def setting_of(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    tiny_corpus: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Setting]:
    """Make a setting by the architecture's name, each once."""

    @functools.cache
    def make(architecture: str) -> Setting:
        folder = tmp_path_factory.mktemp(architecture) / "model"
        tiny_model("qwen2" if architecture == "windows" else architecture).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        if architecture == "windows":
            with_windows(folder)
        reader = run(config(folder, tiny_corpus, folder.with_name("s.zarr")))
        options = TrainConfig(out=folder.with_name("runs"), batch_tokens=64, epochs=1)
        saes = SAES if architecture == "llama" else {name: SAES[name] for name in OF_EVERY_MODEL}
        runs = train(reader, [(sae, 1) for sae in saes.values()], options).folders
        return Setting(
            origin_lm(reader.spec, model=str(folder)),
            origin_tokenizer(reader.spec, model=str(folder)),
            {name: TrainedSae(path, reader.spec) for name, path in zip(saes, runs, strict=True)},
            folder,
        )

    return make


@pytest.fixture(scope="module", params=[*ARCHITECTURES, "windows"])
def setting(request: pytest.FixtureRequest, setting_of: Callable[[str], Setting]) -> Setting:
    return setting_of(request.param)


@pytest.fixture(scope="module")
def llama(setting_of: Callable[[str], Setting]) -> Setting:
    return setting_of("llama")


def changes_of(
    setting: Setting, name: str, kind: str, first: float, second: float
) -> list[LatentChange]:
    """Of a latent that the prompt activates, and of one that it does not."""
    sae = setting.saes[name]
    residuals = setting.lm.residuals(torch.tensor([setting.ids()]), sae.config.sae.layers)
    seen = Residuals(torch.cat(residuals).transpose(0, 1)[1:], sae.config.sae.layers)
    z_F = sae(seen.seen_by(sae.config).x).latents.dense(64).abs().sum(0)
    make = partial(LatentChange, kind=kind)  # type: ignore[arg-type]
    return [
        make(latent=int(z_F.argmax()), value=first),
        make(latent=int(z_F.argmin()), value=second),
    ]


# The reference: whole passes without a cache, in which vectors are added at (layer, position).

Added = dict[tuple[int, int], Tensor]


def whole_pass(lm: LanguageModel, ids: list[int], added: Added) -> tuple[Tensor, Tensor]:
    """The logits (T, V), and the residuals (T, L, D) at LAYERS with everything added."""
    read: dict[int, Tensor] = {}

    def hook(layer: int, _: Any, __: Any, output: Any) -> Any:
        x_TD = (output if isinstance(output, Tensor) else output[0])[0].clone()
        for (at, position), vector_D in added.items():
            if at == layer:
                x_TD[position] += vector_D
        read[layer] = x_TD
        return x_TD[None] if isinstance(output, Tensor) else (x_TD[None], *output[1:])

    handles = [lm.blocks[l - 1].register_forward_hook(partial(hook, l)) for l in LAYERS]
    with torch.no_grad():
        logits_TV = lm.model(torch.tensor([ids]), use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return logits_TV, torch.stack([read[layer] for layer in LAYERS], 1)


def moved(kind: str, z: float, value: float) -> float:
    return {"set": value, "add": z + value, "multiply": z * value}[kind] - z


def added_to_token(
    sae: TrainedSae, changes: Sequence[LatentChange], x_LD: Tensor, at: Sequence[int]
) -> dict[int, Tensor]:
    """Layer -> what is added to one token, from its residuals at the layers `at`."""
    norm, index = sae.config.sae.norm, [LAYERS.index(layer) for layer in at]
    mean_L1, std_L1 = x_LD.mean(-1, keepdim=True), x_LD.std(-1, keepdim=True) + 1e-6
    if norm == "scalar":
        mean_L1, std_L1 = 0 * mean_L1, 0 * std_L1 + sae.config.mean_square**0.5
    output = sae.sae.inference(((x_LD - mean_L1) / std_L1)[None, index])
    z_F = output.latents.dense(64)[0]
    p = 1.0 if output.scale_M is None else float(output.scale_M)
    assert output.layer_M is not None
    added = {}
    for i in output.layer_M.tolist():
        direction_FD = sae.sae.direction_FD(i).detach()
        vectors = [
            moved(c.kind, float(z_F[c.latent]), c.value) * direction_FD[c.latent] for c in changes
        ]
        added[at[i]] = sum(vectors, torch.zeros(())) * std_L1[LAYERS.index(at[i])] / p
    return added


def read_piece(
    lm: LanguageModel,
    sae: TrainedSae,
    changes: Sequence[LatentChange],
    ids: list[int],
    start: int,
    added: Added,
    at_layer: int | None,
) -> None:
    """Put into `added` what the tokens from `start` on get, read behind those before."""
    layers = sae.config.sae.layers
    apart = sae.config.sae.selector in ("fixed", "every")
    for at in [(layer,) for layer in layers] if apart else [layers]:
        _, x_TLD = whole_pass(lm, ids, added)
        for position in range(max(start, 1), len(ids)):
            found = added_to_token(sae, changes, x_TLD[position], at)
            for layer, vector_D in found.items():
                if at_layer in (None, layer):
                    added[layer, position] = vector_D


def reference(
    setting: Setting, name: str, changes: Sequence[LatentChange], at_layer: int | None = None
) -> tuple[list[int], list[Tensor], Added]:
    """Greedy tokens, the logits they were chosen by, and all that was added."""
    ids, added, tokens, logits = setting.ids(), {}, [], []
    start = 0
    for _ in range(NEW):
        read_piece(setting.lm, setting.saes[name], changes, ids, start, added, at_layer)
        start = len(ids)
        logits.append(whole_pass(setting.lm, ids, added)[0][-1])
        tokens.append(int(logits[-1].argmax()))
        ids = [*ids, tokens[-1]]
    return tokens, logits, added


def check_against_reference(setting: Setting, name: str, kind: str, at_layer: int | None) -> None:
    changes = changes_of(setting, name, kind, 3.0, -2.0)
    tokens, logits, added = reference(setting, name, changes, at_layer)
    latents = ChangedLatents(setting.saes[name], changes, at_layer)
    reader, ids = Reader(setting.lm, latents), setting.ids()
    piece, position = ids, len(ids) - 1
    for token, expected_V in zip(tokens, logits, strict=True):
        logits_V, layers = reader.take(piece)
        torch.testing.assert_close(logits_V, expected_V, rtol=1e-4, atol=1e-3)
        if layers is not None:
            assert len(layers) == len(piece) - (piece is ids)
            assert (layers[-1], position) in added
        piece, position = [token], position + 1
    plain_V = setting.lm.logits(torch.tensor([ids]))[0, -1]
    assert (logits[0] - plain_V).abs().max() > 0.05
    single = at_layer is not None or name not in ("every", "crosscoder")
    assert (layers is not None) is single


@pytest.mark.parametrize("name", OF_EVERY_MODEL)
def test_cached_generation_is_uncached_generation(name: str, setting: Setting) -> None:
    check_against_reference(setting, name, "set", None)


@pytest.mark.parametrize(
    ("name", "kind", "at_layer"),
    [
        ("scalar", "add", None),
        ("factor", "multiply", None),
        ("every", "add", 2),
        ("crosscoder", "set", None),
        ("crosscoder", "multiply", 2),
    ],
)
def test_other_saes_and_changes(name: str, kind: str, at_layer: int | None, llama: Setting) -> None:
    check_against_reference(llama, name, kind, at_layer)


def check_nothing_changes(setting: Setting, name: str) -> None:
    nothing = [("add", 0.0), ("multiply", 1.0)]
    changes = [
        LatentChange(latent=i, kind=kind, value=value)  # type: ignore[arg-type]
        for i, (kind, value) in enumerate(nothing * 32)
    ]
    result = setting.steer(name, changes)
    assert result.steered.tokens == result.original.tokens
    assert result.differ_at is None
    assert result.same_text == result.original.text


@pytest.mark.parametrize("name", ["fixed", *ROUTED])
def test_a_change_of_nothing_changes_nothing(name: str, setting: Setting) -> None:
    check_nothing_changes(setting, name)


@pytest.mark.parametrize("name", ["scalar", "every", "crosscoder", "random"])
def test_a_change_of_nothing_of_other_saes(name: str, llama: Setting) -> None:
    check_nothing_changes(llama, name)


@pytest.mark.parametrize("name", ROUTED)
def test_raising_a_latent_raises_its_projection_where_each_token_is_read(
    name: str, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    raised = [LatentChange(latent=9, kind="set", value=30.0)]
    tokens = setting.steer(name, raised).steered.tokens
    direction_D = setting.saes[name].sae.direction_FD()[9].detach()
    seen: dict[str, dict[int, Tensor]] = {"clean": {}, "steered": {}}
    read = setting.lm.residuals_behind

    def note_clean(ids_RT: Tensor, layers: Sequence[int], cache: Any) -> list[Tensor]:
        residuals = read(ids_RT, layers, cache)
        seen["clean"] = {layer: x[0, -1] for layer, x in zip(layers, residuals, strict=True)}
        return residuals

    def note_steered(layer: int, _: Any, args: Any, kwargs: Any) -> None:
        seen["steered"][layer] = (args[0] if args else kwargs["hidden_states"])[0, -1]

    monkeypatch.setattr(setting.lm, "residuals_behind", note_clean)
    handles = [  # what enters the next block
        setting.lm.blocks[l].register_forward_pre_hook(partial(note_steered, l), with_kwargs=True)
        for l in LAYERS
    ]
    reader = Reader(setting.lm, ChangedLatents(setting.saes[name], raised))
    reader.take(setting.ids())
    rises = []
    for token in tokens:
        _, layers = reader.take([token])
        assert layers is not None
        for layer in LAYERS[: LAYERS.index(layers[0])]:  # nothing happens before it
            assert torch.equal(seen["steered"][layer], seen["clean"][layer])
        change_D = seen["steered"][layers[0]] - seen["clean"][layers[0]]
        rises.append(float(change_D @ direction_D))
        torch.testing.assert_close(change_D, rises[-1] * direction_D, rtol=1e-3, atol=1e-3)
    for handle in handles:
        handle.remove()
    assert len(rises) == NEW
    assert min(rises) > 1


def test_the_first_position_is_left_alone(llama: Setting) -> None:
    changes = [LatentChange(latent=9, kind="set", value=100.0)]
    for name in ("fixed", "factor"):
        reader = Reader(llama.lm, ChangedLatents(llama.saes[name], changes))
        ids = [llama.tokenizer.bos_id]
        logits_V, layers = reader.take(ids)  # type: ignore[arg-type]
        assert layers is None
        assert torch.equal(logits_V, llama.lm.logits(torch.tensor([ids]))[0, -1])
        changed_V, layers = reader.take([7])
        assert layers is not None
        clean_V = llama.lm.logits(torch.tensor([[*ids, 7]]))[0, -1]
        assert (changed_V - clean_V).abs().max() > 0.05


def test_the_original_is_what_transformers_generates(setting: Setting) -> None:
    result = setting.steer("fixed", [LatentChange(latent=0, kind="add", value=0.0)])
    expected = setting.lm.model.generate(
        torch.tensor([setting.ids()]), max_new_tokens=NEW, do_sample=False, pad_token_id=0
    )
    assert list(result.original.tokens) == expected[0, len(setting.ids()) :].tolist()


def test_generation_ends_after_a_token_that_ends_a_text(
    llama: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = [LatentChange(latent=0, kind="add", value=0.0)]
    whole = llama.steer("factor", nothing).original
    assert whole.finish == "length"
    third = whole.tokens[2]
    for ids in (third, [third, 299]):
        monkeypatch.setattr(llama.lm.model.generation_config, "eos_token_id", ids)
        result = llama.steer("factor", nothing)
        end = whole.tokens.index(third) + 1
        assert result.steered.tokens == result.original.tokens == whole.tokens[:end]
        assert result.steered.finish == "end"
        assert result.steered.layers is not None
        assert len(result.steered.layers) == end
    monkeypatch.setattr(llama.lm.model.generation_config, "eos_token_id", None)
    hf = copy.deepcopy(llama.tokenizer.hf)
    hf.eos_token = hf.convert_ids_to_tokens(whole.tokens[0])
    other = llama._replace(tokenizer=dataclasses.replace(llama.tokenizer, hf=hf))
    assert other.steer("factor", nothing).original.tokens == whole.tokens[:1]


def test_sampling_has_the_same_random_numbers_for_both(llama: Setting) -> None:
    nothing = [LatentChange(latent=3, kind="multiply", value=1.0)]
    first = llama.steer("factor", nothing, temperature=1.0, seed=1)
    assert first.differ_at is None
    assert llama.steer("factor", nothing, temperature=1.0, seed=1) == first
    other = llama.steer("factor", nothing, temperature=1.0, seed=2)
    assert other.original.tokens != first.original.tokens
    much = [LatentChange(latent=3, kind="set", value=100.0)]
    steered = llama.steer("factor", much, temperature=1.0, seed=1)
    assert steered.original == first.original
    assert steered.differ_at is not None
    assert steered.original.text.startswith(steered.same_text)
    assert steered.steered.text.startswith(steered.same_text)


def test_sampling_draws_from_the_softmax() -> None:
    logits_V = torch.tensor([1.0, 0.0, -1.0, 3.0])
    for temperature in (0.7, 2.0):
        choose = _chooser(SteerConfig(temperature=temperature), [1, 2])
        counts_V = torch.bincount(
            torch.tensor([choose(logits_V) for _ in range(2000)]), minlength=4
        )
        expected_V = torch.softmax(logits_V / temperature, 0)
        torch.testing.assert_close(counts_V / 2000, expected_V, rtol=0, atol=0.035)


def test_texts_that_differ_inside_a_character(llama: Setting) -> None:
    encode = llama.tokenizer.encode
    first, second = (tuple(encode([f"so {letter}"])[0].tolist()) for letter in "éè")
    assert first[-2] == second[-2]  # the two bytes of a letter are tokens
    made = [[_Made(token, None) for token in tokens] for tokens in (first, second)]
    both = [_continuation(each, llama.tokenizer, frozenset()) for each in made]
    result = _compared(PROMPT, [1], llama.tokenizer, *both)
    assert result.differ_at == len(first) - 1
    assert result.same_text == "so "
    shorter = _continuation(made[0][:-2], llama.tokenizer, frozenset())
    result = _compared(PROMPT, [1], llama.tokenizer, both[0], shorter)
    assert (result.differ_at, result.same_text) == (len(first) - 2, "so ")


def test_changes_that_cannot_be(llama: Setting) -> None:
    one = LatentChange(latent=1, kind="set", value=2.0)
    refused: list[tuple[str, list[LatentChange], int | None, str]] = [
        ("fixed", [one, dataclasses.replace(one, latent=64)], None, r"from 0 to 63, found \[64\]"),
        ("fixed", [dataclasses.replace(one, latent=-1)], None, r"from 0 to 63, found \[-1\]"),
        ("fixed", [one, one], None, r"found several of \[1\]"),
        ("fixed", [], None, "found none"),
        ("soft", [one], None, "soft routing reads a mixture of the layers"),
        ("fixed", [one], 3, "only for SAEs that read every layer"),
        ("factor", [one], 3, "only for SAEs that read every layer"),
        ("every", [one], 4, r"layers \[1, 2, 3\], found 4"),
    ]
    for name, changes, at_layer, message in refused:
        with pytest.raises(ValueError, match=message):
            ChangedLatents(llama.saes[name], changes, at_layer)
    for value in (float("nan"), float("inf"), -1e300):
        with pytest.raises(ValueError, match="latent 3: expected a finite value to add, found"):
            LatentChange(latent=3, kind="add", value=value)


def test_options_out_of_range(llama: Setting) -> None:
    with pytest.raises(ValueError, match="at least 1 new token, found 0"):
        SteerConfig(max_new_tokens=0)
    for temperature in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature of 0 or above, found"):
            SteerConfig(temperature=temperature)
    nothing = [LatentChange(latent=0, kind="add", value=0.0)]
    most = 128 - len(llama.ids())
    with pytest.raises(
        ValueError, match=f"here: expected at most the model's 128 .* {most + 1} new"
    ):
        llama.steer("fixed", nothing, max_new_tokens=most + 1)
    assert len(llama.steer("fixed", nothing, max_new_tokens=most).original.tokens) == most


def test_changes_too_large_for_the_model(llama: Setting) -> None:
    much = [LatentChange(latent=3, kind="set", value=3.4e38)]
    with pytest.raises(ValueError, match="no numbers any more; change latents by less"):
        llama.steer("factor", much)


def test_a_model_that_keeps_no_keys_and_values() -> None:
    config = transformers.MambaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4
    )
    identity = ModelIdentity(name="m", revision=None, config_hash="", weights="", dtype="float32")
    lm = LanguageModel(transformers.MambaForCausalLM(config), identity)
    with pytest.raises(ModelError, match="MambaForCausalLM keeps no cache of keys and values"):
        lm.extend(torch.zeros(1, 3))


@pytest.fixture
def command(llama: Setting) -> Iterator[Callable[..., Result]]:
    """`routesae steer` on one of the SAEs, by its name here."""

    def invoke(name: str, *arguments: object) -> Result:
        store = llama.folder.with_name("s.zarr")
        return routesae("steer", llama.saes[name].run, "--store", store, *arguments)

    yield invoke
    for name in ("routesae_cache", "stores"):  # commands send their messages to the screen
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.setLevel(logging.NOTSET)
        logger.propagate = True


@pytest.fixture
def dialogues(tmp_path: Path) -> Path:
    path = tmp_path / "hh.jsonl"
    records = [
        {"chosen": "\n\nHuman: Look.\n\nAssistant: Where?", "rejected": "…"},
        {"prompt": "The blocks were read"},
        {"prompt": "never read, for there is a limit"},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_command(
    command: Callable[..., Result], llama: Setting, dialogues: Path, tmp_path: Path
) -> None:
    options = ["--latent", 5, "--latent", 12, "--set", 30, "--set", -20, "--max-new-tokens", 6]
    prompts = ["--prompt", "The router", "--dialogues", dialogues, "--limit", 2]
    path = tmp_path / "deep" / "steered.json"
    where = ["--model", llama.folder, "--json", path, "--device", "cpu"]
    result = command("factor", *options, *prompts, *where)
    assert result.exit_code == 0, result.output
    words = ("original", "steered", "▶", "latent 5: set 30", "hh.jsonl, line 2", "read from:")
    assert all(word in result.output for word in words), result.output
    record = json.loads(path.read_text())
    results = record.pop("results")
    assert record == {
        "kind": "steering",
        "run": str(llama.saes["factor"].run),
        "name": llama.saes["factor"].config.name,
        "store": str(llama.folder.with_name("s.zarr")),
        "model": "model",
        "changes": [
            {"latent": 5, "kind": "set", "value": 30.0},
            {"latent": 12, "kind": "set", "value": -20.0},
        ],
        "at_layer": None,
        "max_new_tokens": 6,
        "temperature": 0.0,
        "seed": 42,
        "raw": False,
    }
    sources = ["--prompt 1", f"{dialogues}, line 1", f"{dialogues}, line 2"]
    assert [each["source"] for each in results] == sources
    assert results[1]["prompt"] == "<|bos|>\n\nHuman: Look.\n\nAssistant:"
    for each in results:
        assert each.keys() == {
            *("source", "prompt", "prompt_tokens", "differ_at", "original", "steered")
        }
        assert set(each["original"]) == {"tokens", "text", "finish"}
        layers = each["steered"]["layers"]
        assert len(layers) == len(each["steered"]["tokens"]) <= 6
        assert set(layers) <= set(LAYERS)
    assert command("factor", *options, *prompts, *where).output == result.output


def test_command_on_latents_that_share_a_value(
    command: Callable[..., Result], llama: Setting, tmp_path: Path
) -> None:
    where = ["--model", llama.folder, "--json", tmp_path / "s.json", "--max-new-tokens", 3]
    options = ["--latent", 5, "--latent", 12, "--multiply", 1]
    result = command("fixed", *options, "--prompt", "The \x1b[31m router", *where)
    assert result.exit_code == 0, result.output
    assert "The two are the same." in result.output
    assert "\x1b" not in result.output  # nothing that a terminal would obey
    record = json.loads((tmp_path / "s.json").read_text())
    assert [change["value"] for change in record["changes"]] == [1.0, 1.0]
    assert record["results"][0]["differ_at"] is None


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("fixed", ["--latent", 64, "--set", 1], "expected latents from 0 to 63, found [64]"),
        ("fixed", ["--latent", 6, "--set", "nan"], "latent 6: expected a finite value to set"),
        ("fixed", ["--latent", 6, "--add", "inf"], "latent 6: expected a finite value to add"),
        ("soft", ["--latent", 6, "--set", 1], "soft routing reads a mixture"),
        ("fixed", ["--latent", 6], "one of --set, --add, --multiply, found none of them"),
        ("fixed", ["--latent", 6, "--set", 1, "--add", 1], "found --set and --add"),
        (
            "fixed",
            ["--latent", 6, "--latent", 7, "--latent", 8, "--set", 1, "--set", 2],
            "--set once for each --latent, or once for all 3 of them, found 2 values",
        ),
        ("fixed", ["--latent", 6, "--set", 1, "--set", 2], "found 2 values"),
        ("fixed", ["--latent", 6, "--set", 1, "--limit", 2], "--limit is for --dialogues"),
        ("fixed", ["--latent", 6, "--set", 1, "--temperature", -1], "temperature of 0 or above"),
        ("every", ["--latent", 6, "--set", 1, "--at-layer", 9], "layers [1, 2, 3], found 9"),
    ],
)
def test_command_refuses_before_the_model_is_loaded(
    name: str,
    arguments: list[Any],
    words: str,
    command: Callable[..., Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refuse(monkeypatch)
    path = tmp_path / "folder" / "s.json"
    result = command(name, *arguments, "--prompt", "x", "--json", path)
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.stderr.split())
    assert not path.parent.exists()


def refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have loading a model or a tokenizer fail the test."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("routesae_cache.origin.load_lm", fail)
    monkeypatch.setattr("routesae_cache.origin.load_tokenizer", fail)


def test_command_on_what_is_not_there(
    command: Callable[..., Result],
    llama: Setting,
    dialogues: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refuse(monkeypatch)
    one = ["--latent", 6, "--set", 1]
    dialogues.write_text('{"prompt": "a"}\nno JSON\n')
    unfinished = tmp_path / "run"
    shutil.copytree(llama.saes["fixed"].run, unfinished)
    (unfinished / "sae.safetensors").unlink()
    store = llama.folder.with_name("s.zarr")
    typed = [*one, "--prompt", "x"]
    for result, words in (
        (command("fixed", *one), "nothing to do: give --prompt or --dialogues"),
        (command("fixed", *one, "--dialogues", dialogues), "hh.jsonl, line 2: expected a JSON"),
        (command("fixed", *one, "--dialogues", tmp_path / "no.jsonl"), "No such file"),
        (routesae("steer", unfinished, "--store", store, *typed), "the run has not ended"),
        (routesae("steer", tmp_path, "--store", store, *typed), "expected a run"),
        (routesae("steer", unfinished, "--store", tmp_path, *typed), "an activation store"),
        (command("fixed", *typed, "--json", tmp_path), "expected a file to write"),
    ):
        assert result.exit_code == 2, result.output
        assert words in " ".join(result.stderr.split())
        assert "Traceback" not in result.output


def test_command_with_another_model(
    command: Callable[..., Result], tiny_model: Callable[..., Any], llama: Setting, tmp_path: Path
) -> None:
    typed = ["--latent", 6, "--set", 1, "--prompt", "x"]
    result = command("fixed", *typed)
    assert result.exit_code == 2
    assert "could not be reached for the model 'model'" in " ".join(result.stderr.split())
    other = shutil.copytree(llama.folder, tmp_path / "other")
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj.weight.data += 0.1
    model.save_pretrained(other)
    result = command("fixed", *typed, "--model", other)
    assert result.exit_code == 2
    assert "is not the model that the store came from" in " ".join(result.stderr.split())
