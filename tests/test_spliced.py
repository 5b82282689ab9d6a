"""Spliced metrics against a plain float64 computation with whole logits."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from routesae_cache import ray_splicing
from routesae_cache.lm import LanguageModel, ModelError
from routesae_cache.metrics import Estimate, RowSums, Spliced, SplicedMetrics
from routesae_cache.origin import origin_lm
from routesae_cache.ray_cluster import RayConfig
from routesae_cache.splicing import evaluate as spliced
from routesae_cache.splicing import passes as passes_module
from routesae_cache.splicing import predictions
from routesae_cache.splicing.evaluate import SplicedConfig, check_spliceable, evaluate_spliced
from routesae_cache.train import train
from routesae_cache.train_plan import TrainConfig
from routesae_cache.trained import ReadingRule, TrainedSae
from stores.codecs import Bf16Codec, DeltaCodec, Int8Codec
from stores.reader import StoreReader
from stores.recode import recode
from stores.stats import split_stats
from tests.pipeline_helpers import LAYERS, SAES, config, run
from tests.ray_helpers import without_ray

MEASURED = [name for name in SAES if name != "soft"]
AT_LAYER = {"crosscoder": 2}
SIXTEENTHS = torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 16]).double()


@pytest.fixture(scope="module")
def reader(tiny_model_dir: Path, tiny_corpus: Path, tmp_path_factory: Any) -> StoreReader:
    """A document a row, so that most rows are padded."""
    out = tmp_path_factory.mktemp("spliced") / "s.zarr"
    options = {"packing": "document", "context": 24, "eval_tokens": 150}
    return run(config(tiny_model_dir, tiny_corpus, out, **options))


@pytest.fixture(scope="module")
def lm(reader: StoreReader, tiny_model_dir: Path) -> LanguageModel:
    return origin_lm(reader.spec, model=str(tiny_model_dir))


@pytest.fixture(scope="module")
def runs(reader: StoreReader, tmp_path_factory: Any) -> dict[str, Path]:
    options = TrainConfig(out=tmp_path_factory.mktemp("runs"), batch_tokens=64, epochs=2)
    folders = train(reader, [(sae, 1) for sae in SAES.values()], options).folders
    return dict(zip(SAES, folders, strict=True))


@pytest.fixture(scope="module")
def saes(reader: StoreReader, runs: dict[str, Path]) -> dict[str, TrainedSae]:
    found = {name: TrainedSae(folder, reader.spec) for name, folder in runs.items()}
    # its own draw hashes every bit of a residual, and so differs in float64
    selector: Any = found["random"].sae.selector
    selector.draw.forward = lambda x_NLD, _: (x_NLD[:, 0, :4] > 0).double() @ SIXTEENTHS
    return found


class Row(NamedTuple):
    """Sums of one row, as the definitions have them."""

    tokens: int
    nexts: int
    ce: float
    kl: float
    delta: float
    ablated: float


class Plain:
    """The same measurements, one row at a time, in float64, with hooks of its own."""

    def __init__(self, reader: StoreReader, lm: LanguageModel) -> None:
        self.model = copy.deepcopy(lm.model).double()
        self.lm = LanguageModel(self.model, lm.identity)
        rows = [reader.rows(chunk) for chunk in reader.chunks("eval")]
        self.rows = [
            torch.from_numpy(tokens[:length])
            for part in rows
            for tokens, length in zip(part.tokens_RT, part.lengths_R, strict=True)
        ]

    def log_p(self, ids_T: Tensor, layer_T: Tensor, x_TD: Tensor | None) -> Tensor:
        """Log-probabilities (T, V) with every token but the first replaced at its layer."""

        def hook(layer: int) -> Callable[..., Tensor]:
            def replaced(_: Any, __: Any, output: Tensor) -> Tensor:
                here_T = (layer_T == layer) & (torch.arange(len(ids_T)) > 0)
                return torch.where(here_T[None, :, None], x_TD, output)

            return replaced

        blocks = self.model.model.layers
        handles = [
            blocks[layer - 1].register_forward_hook(hook(layer))
            for layer in (LAYERS if x_TD is not None else ())
        ]
        logits_TV = self.model(ids_T[None].long()).logits[0]
        for handle in handles:
            handle.remove()
        return logits_TV.log_softmax(-1)

    def measure(
        self, sae: TrainedSae, layer: int | None, fill_LD: Tensor, scale: str = "exact"
    ) -> list[Row]:
        """The sums of each row, spliced at a layer or at each token's own."""
        found = []
        for ids_T in self.rows:
            layer_T, x_TD = self.reconstruct(sae, ids_T, layer, scale)
            nothing = self.log_p(ids_T, layer_T, None)
            mine = self.log_p(ids_T, layer_T, x_TD)
            ablated = self.log_p(ids_T, layer_T, fill_LD[layer_T].double())
            kl = (nothing.exp() * (nothing - mine)).sum(-1)[1:].sum()
            next_T = ids_T[2:, None].long()
            ce = [-log_p[1:-1].gather(1, next_T).sum() for log_p in (nothing, mine, ablated)]
            sums = (ce[0], kl, ce[1] - ce[0], ce[2] - ce[0])
            found.append(Row(len(ids_T) - 1, len(ids_T) - 2, *map(float, sums)))
        return found

    def reconstruct(
        self, sae: TrainedSae, ids_T: Tensor, layer: int | None, scale: str
    ) -> tuple[Tensor, Tensor]:
        """Layer and reconstruction (T, D) of each token, the first one's included."""
        layers = sae.config.sae.layers
        x_TLD = torch.stack(self.lm.residuals(ids_T[None], layers), 2)[0].float().clone()
        mean, std = x_TLD.mean(-1, keepdim=True), x_TLD.std(-1, keepdim=True) + 1e-6
        if sae.config.sae.norm == "scalar":
            mean, std = 0 * mean, 0 * std + math.sqrt(sae.config.mean_square)
        output = sae((x_TLD - mean) / std)
        assert output.layer_M is not None
        x_MD, p = output.reconstruction_MD, output.scale_M
        if p is not None and scale == "exact":
            x_MD = x_MD / p[:, None]
        elif p is not None:
            latents = sae.sae.coder.read(output.target_MD / p[:, None], None, None)
            x_MD = sae.sae.coder.decode(latents)
        index_T = output.layer_M
        if layer is not None:
            index_T = torch.full((len(ids_T),), layers.index(layer))
            x_MD = x_MD.view(len(ids_T), -1, x_TLD.shape[-1])
            x_MD = x_MD[:, layers.index(layer) if x_MD.shape[1] > 1 else 0]
        token_T = torch.arange(len(ids_T))
        x_TD = x_MD * std[token_T, index_T] + mean[token_T, index_T]
        return torch.tensor(layers)[index_T], x_TD.detach().double()


def ratio(over: Sequence[float], under: Sequence[float]) -> tuple[float, float]:
    """A ratio of sums over rows, and its standard error with rows as clusters (Cochran 1977)."""
    y, n = np.array(over), np.array(under)
    r, count = y.sum() / n.sum(), len(y)
    variance = count / (count - 1) * ((y - r * n) ** 2).sum() / n.sum() ** 2
    return float(r), float(np.sqrt(variance))


def close(found: Estimate | None, expected: tuple[float, float], slack: float = 1e-3) -> None:
    assert found is not None
    assert found.mean == pytest.approx(expected[0], rel=slack, abs=1e-5)
    assert found.se == pytest.approx(expected[1], rel=5 * slack, abs=1e-5)


def compare(found: SplicedMetrics, rows: list[Row]) -> None:
    """Check a result of one place against the plain sums."""
    tokens, nexts, _, kl, delta, ablated = (list(column) for column in zip(*rows, strict=True))
    close(found.kl, ratio(kl, tokens))
    close(found.kl_per_row, ratio(kl, [1] * len(rows)))
    close(found.delta_ce, ratio(delta, nexts))
    share, error = ratio(delta, ablated)
    close(found.recovered, (1 - share, error))


def measure(reader: StoreReader, lm: LanguageModel, sae: TrainedSae, **options: Any) -> Spliced:
    (found,) = evaluate_spliced(reader, lm, [sae], SplicedConfig(**options))
    return found


def figures(found: SplicedMetrics) -> list[float]:
    assert found.recovered is not None
    parts = (found.kl, found.kl_per_row, found.delta_ce, found.recovered)
    return [number for part in parts for number in (part.mean, part.se or math.nan)]


@pytest.mark.parametrize("name", MEASURED)
def test_against_plain_float64(
    name: str, reader: StoreReader, lm: LanguageModel, saes: dict[str, TrainedSae]
) -> None:
    sae, at_layer = saes[name], AT_LAYER.get(name)
    found = measure(reader, lm, sae, at_layer=at_layer, batch_tokens=50)
    plain, zeros_LD = Plain(reader, lm), torch.zeros(5, 32)
    if name != "every":
        rows = plain.measure(sae, at_layer, zeros_LD)
        compare(found, rows)
        assert found.per_layer is None
    else:
        assert found.per_layer is not None
        by_layer = {layer: plain.measure(sae, layer, zeros_LD) for layer in LAYERS}
        for layer, rows in by_layer.items():
            compare(found.per_layer[layer], rows)
        for key in ("kl", "kl_per_row", "delta_ce", "recovered"):
            each = [getattr(metrics, key).mean for metrics in found.per_layer.values()]
            assert getattr(found, key).mean == pytest.approx(np.mean(each))
        kl = [[row.kl / 3 for row in rows] for rows in by_layer.values()]
        close(found.kl, ratio(np.sum(kl, axis=0), [row.tokens for row in rows]))
    assert found.at_layer == at_layer
    assert found.rows == len(plain.rows)
    assert found.tokens == sum(row.tokens for row in rows)
    ce = sum(row.ce for row in rows) / sum(row.nexts for row in rows)
    assert found.ce == pytest.approx(ce, rel=1e-5)
    assert found.kl.mean > 1e-3


def test_mean_ablation_and_the_authors_scale(
    reader: StoreReader, lm: LanguageModel, saes: dict[str, TrainedSae]
) -> None:
    found = measure(reader, lm, saes["factor"], ablation="mean", scale="authors")
    fill_LD = torch.zeros(5, 32)
    fill_LD[1:4] = torch.from_numpy(split_stats(reader).mean_LD).float()
    compare(found, Plain(reader, lm).measure(saes["factor"], None, fill_LD, "authors"))
    exact = measure(reader, lm, saes["factor"], ablation=None)
    assert exact.recovered is None
    assert abs(exact.kl.mean / found.kl.mean - 1) > 1e-3
    one = measure(reader, lm, saes["straight-through"])
    assert figures(measure(reader, lm, saes["straight-through"], scale="authors")) == figures(one)


@pytest.mark.parametrize("name", MEASURED)
def test_a_perfect_and_an_absent_reconstruction(
    name: str,
    reader: StoreReader,
    lm: LanguageModel,
    saes: dict[str, TrainedSae],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = TrainedSae.__call__

    def perfect(self: TrainedSae, x_NLD: Tensor) -> Any:
        output = original(self, x_NLD)
        return output._replace(reconstruction_MD=output.target_MD)

    options = {"at_layer": AT_LAYER.get(name), "rows": 4}
    with monkeypatch.context() as patch:
        patch.setattr(TrainedSae, "__call__", perfect)
        found = measure(reader, lm, saes[name], **options)
    assert found.recovered is not None
    assert abs(found.kl.mean) < 1e-6
    assert abs(found.delta_ce.mean) < 1e-5
    assert found.recovered.mean == pytest.approx(1, abs=1e-4)

    def absent(output: Any, seen: Any) -> Tensor:
        return torch.zeros_like(output.reconstruction_MD)

    monkeypatch.setattr(spliced, "reconstruction_MD", absent)
    found = measure(reader, lm, saes[name], **options)
    assert found.recovered is not None
    assert (found.recovered.mean, found.recovered.se) == pytest.approx((0, 0), abs=1e-12)
    assert found.kl.mean > 0.1


def test_together_gives_what_alone_does_in_one_clean_pass(
    reader: StoreReader, lm: LanguageModel, saes: dict[str, TrainedSae]
) -> None:
    chosen = [saes[name] for name in MEASURED]
    settings = SplicedConfig(at_layer=2, rows=4, batch_tokens=48)
    ran: list[int] = []
    handle = lm.model.model.norm.register_forward_hook(lambda *_: ran.append(1))
    lm.output_forms, passes_module.resumable(lm, 1)
    ran.clear()
    together = evaluate_spliced(reader, lm, chosen, settings)
    handle.remove()
    assert [one.at_layer for one in together] == [None] * 5 + [2, 2]
    passes = check_spliceable([sae.config for sae in chosen], settings)
    # clean, one for each SAE, and zeros at layers 2, 3 and each token's own in three SAEs
    assert passes == 1 + len(chosen) + 5
    probes = 3 * len(LAYERS)
    assert 2 * passes < len(ran) <= 2 * passes + probes
    for sae, one in zip(chosen, together, strict=True):
        several = sae.config.sae.selector in ("every", "all")
        alone = replace(settings, at_layer=2 if several else None)
        (found,) = evaluate_spliced(reader, lm, [sae], alone)
        assert figures(found) == figures(one)


def test_how_the_work_is_cut_changes_nothing(
    reader: StoreReader,
    lm: LanguageModel,
    saes: dict[str, TrainedSae],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = figures(measure(reader, lm, saes["straight-through"]))
    assert figures(measure(reader, lm, saes["straight-through"], batch_tokens=1)) == pytest.approx(
        expected, rel=1e-4
    )
    sizes: list[int] = []
    original = predictions.head

    def watched(lm: LanguageModel, final_ND: Tensor) -> Tensor:
        sizes.append(len(final_ND))
        return original(lm, final_ND)

    monkeypatch.setattr(predictions, "head", watched)
    monkeypatch.setattr(predictions, "_SLICE_VALUES", 7 * lm.vocab_size)
    monkeypatch.setattr(predictions, "_BLOCK_VALUES", 3 * lm.vocab_size)
    assert figures(measure(reader, lm, saes["straight-through"])) == pytest.approx(
        expected, rel=1e-5
    )
    assert max(sizes) == 7
    monkeypatch.setattr(passes_module, "resumable", lambda *_: False)
    assert figures(measure(reader, lm, saes["straight-through"])) == pytest.approx(
        expected, rel=1e-5
    )


def test_padding_plays_no_part(
    reader: StoreReader,
    lm: LanguageModel,
    saes: dict[str, TrainedSae],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = figures(measure(reader, lm, saes["straight-through"]))
    original = StoreReader.rows

    def other_padding(self: StoreReader, chunk: int) -> Any:
        rows = original(self, chunk)
        tokens_RT = rows.tokens_RT.copy()
        for tokens_T, length in zip(tokens_RT, rows.lengths_R, strict=True):
            tokens_T[length:] = 17
        return rows._replace(tokens_RT=tokens_RT)

    monkeypatch.setattr(StoreReader, "rows", other_padding)
    assert any((reader.rows(chunk).tokens_RT == 17).any() for chunk in reader.chunks("eval"))
    assert figures(measure(reader, lm, saes["straight-through"])) == pytest.approx(
        expected, rel=1e-6
    )


def test_rows_without_a_counted_token_are_passed_over(
    reader: StoreReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = StoreReader.rows

    def some_empty(self: StoreReader, chunk: int) -> Any:
        rows = original(self, chunk)
        return rows._replace(lengths_R=np.array([1, 1, 7, 1])[: len(rows.lengths_R)])

    monkeypatch.setattr(StoreReader, "rows", some_empty)
    options = {"batch_tokens": 2 * reader.spec.context, "device": torch.device("cpu")}
    parts = passes_module.first_rows(reader, "eval", 7)
    found = list(passes_module.row_batches(reader, parts, **options))
    assert [(rows.chunk, rows.row_R, rows.through) for rows in found] == [(0, [2], 4), (1, [2], 7)]
    assert [rows.ids_RT.shape for rows in found] == [(1, 7), (1, 7)]
    assert found[0].counted_RT.tolist() == [[False] + [True] * 6]


def test_the_first_rows_alone(
    reader: StoreReader, lm: LanguageModel, saes: dict[str, TrainedSae]
) -> None:
    plain = Plain(reader, lm)
    plain.rows = plain.rows[:3]
    done: list[tuple[int, int]] = []
    (found,) = evaluate_spliced(
        reader, lm, [saes["fixed"]], SplicedConfig(rows=3), lambda *two: done.append(two)
    )
    compare(found, plain.measure(saes["fixed"], 3, torch.zeros(5, 32)))
    assert done[-1] == (3, 3)
    one = measure(reader, lm, saes["fixed"], rows=1)
    assert (one.rows, one.kl.se) == (1, None)


def test_chunks_shared_out_give_the_same_figures(
    reader: StoreReader,
    lm: LanguageModel,
    runs: dict[str, Path],
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_ray(monkeypatch, ray_splicing)
    rules = [ReadingRule(infer_k=2 if name == "route" else None) for name in MEASURED]
    chosen = [
        TrainedSae(runs[name], reader.spec, rule=rule)
        for name, rule in zip(MEASURED, rules, strict=True)
    ]
    settings = SplicedConfig(at_layer=2, rows=7, batch_tokens=48, ablation="mean")
    done: list[tuple[int, int]] = []
    found = ray_splicing.splice_on_ray(
        reader,
        str(tiny_model_dir),
        chosen,
        settings,
        lambda *two: done.append(two),
        cluster=RayConfig(address="local", workers=2),
    )
    assert found == evaluate_spliced(reader, lm, chosen, settings)
    assert done[-1] == (7, 7)


def test_reading_rules(reader: StoreReader, lm: LanguageModel, runs: dict[str, Path]) -> None:
    kls = [
        measure(reader, lm, TrainedSae(runs["fixed"], reader.spec, rule=rule), rows=4).kl.mean
        for rule in (ReadingRule(infer_k=1), ReadingRule(), ReadingRule(infer_k=16))
    ]
    assert kls == sorted(kls, reverse=True)
    nothing = TrainedSae(runs["fixed"], reader.spec, rule=ReadingRule(theta=1e9))
    assert measure(reader, lm, nothing, rows=4).kl.mean > kls[0]


@pytest.mark.parametrize(
    ("names", "at_layer", "message"),
    [
        (["fixed", "soft"], None, "soft routing mixes the layers"),
        (["crosscoder"], None, r"3 layers of a token at once; .* --at-layer, of \[1, 2, 3\]"),
        (["every", "fixed"], 4, r"does not reconstruct layer 4; it has \[1, 2, 3\]"),
        (["fixed", "straight-through"], 2, "--at-layer is for SAEs that reconstruct several"),
    ],
)
def test_what_cannot_be_spliced(
    names: list[str], at_layer: int | None, message: str, saes: dict[str, TrainedSae]
) -> None:
    with pytest.raises(ValueError, match=message):
        check_spliceable([saes[name].config for name in names], SplicedConfig(at_layer=at_layer))


@pytest.mark.parametrize("options", [{"rows": 0}, {"batch_tokens": -1}])
def test_odd_options(options: Any) -> None:
    with pytest.raises(ValueError, match="expected at least 1"):
        SplicedConfig(**options)


@pytest.mark.parametrize("codec", [Bf16Codec(), Int8Codec(), DeltaCodec(step=0.05), DeltaCodec()])
def test_every_codec_is_recognised(
    codec: Any,
    reader: StoreReader,
    lm: LanguageModel,
    saes: dict[str, TrainedSae],
    tmp_path: Path,
) -> None:
    recode(reader.path, tmp_path / "s.zarr", codec)
    measure(StoreReader(tmp_path / "s.zarr"), lm, saes["fixed"], rows=2)


def test_another_model_is_refused(
    reader: StoreReader,
    lm: LanguageModel,
    saes: dict[str, TrainedSae],
    tiny_model_dir: Path,
    tmp_path: Path,
) -> None:
    model = copy.deepcopy(lm.model)
    model.model.layers[0].mlp.up_proj.weight.data[:4] += 0.1
    impostor = LanguageModel(model, lm.identity)
    with pytest.raises(ModelError, match="at layer 3 its residuals and the stored ones differ"):
        measure(reader, impostor, saes["fixed"])
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match="is not the model that the store came from; weights"):
        origin_lm(reader.spec, model=str(tmp_path / "model"))


def test_errors_of_figures_made_of_sums() -> None:
    sums_RS = np.random.default_rng(0).gamma(3.0, size=(40, 3))
    sums = RowSums(3)
    for part in (sums_RS[:1], sums_RS[1:8], sums_RS[8:]):
        sums.add(torch.from_numpy(part))
    assert sums.rows == 40
    close(sums.estimate(lambda m: m[0] / m[1]), ratio(sums_RS[:, 0], sums_RS[:, 1]), 1e-9)
    mean = sums_RS[:, 2].mean(), sums_RS[:, 2].std(ddof=1) / np.sqrt(40)
    close(sums.estimate(lambda m: m[2]), mean, 1e-9)
    # any smooth figure: the jackknife agrees to first order
    found = sums.estimate(lambda m: (m[0] / m[1]).log() * m[2])
    total = sums_RS.sum(0)
    left_out = [(total - row) / 39 for row in sums_RS]
    values = np.array([np.log(m[0] / m[1]) * m[2] for m in left_out])
    assert found.se == pytest.approx(
        np.sqrt(39 / 40 * ((values - values.mean()) ** 2).sum()), rel=0.1
    )
