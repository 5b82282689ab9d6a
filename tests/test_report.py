"""The report's data, against one computed token by token; what is left out; what is escaped."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from cli.app import app
from routesae_cache.checkpoint import load_run
from routesae_cache.json_files import read_json
from routesae_cache.lm import load_lm
from routesae_cache.origin import origin_tokenizer
from routesae_cache.report.activity import (
    ActivityPlan,
    Window,
    choose_passages,
    load_saes,
    passage_of,
    read_activity,
)
from routesae_cache.report.assets import harmless
from routesae_cache.report.browser import choose_latents, short
from routesae_cache.report.build import ReportConfig, build_report
from routesae_cache.report.charts import Axis, domain
from routesae_cache.report.directions import neighbours, token_effects
from routesae_cache.report.discover import ReportError, discover
from routesae_cache.report.page import embedded, policy
from routesae_cache.report.table import build_table
from routesae_cache.report.text import Stretch, TokenText, merged
from routesae_cache.sources import ModelError
from tests.report_helpers import HARM, SAES, SENTENCES, Stages, dense_values, make_stages


@pytest.fixture(scope="module")
def stages(tiny_model_dir: Path, tmp_path_factory: Any) -> Stages:
    return make_stages(tmp_path_factory.mktemp("report"), tiny_model_dir)


@pytest.fixture(scope="module")
def page(stages: Stages) -> str:
    out = stages.root / "deep" / "report.html"
    made = build_report(
        ReportConfig(
            root=stages.root, out=out, assets=stages.root / "assets", model=str(stages.model)
        )
    )
    assert made.out == out
    assert made.bytes == out.stat().st_size
    return out.read_text("utf-8")


def part(page: str, name: str) -> Any:
    found = re.search(rf'<script type="application/json" id="data-{name}">(.*?)</script>', page)
    assert found
    return json.loads(found[1])


def copied(stages: Stages, folder: Path) -> Path:
    """The results in another place, without the store."""
    shutil.copytree(stages.root, folder, ignore=shutil.ignore_patterns("*.zarr", "assets"))
    return folder


@pytest.mark.parametrize("name", SAES)
def test_shading_and_density_against_one_token_at_a_time(name: str, stages: Stages) -> None:
    values = dense_values(stages, name)
    strongest = [(int(value_F.argmax()), *key) for key, value_F in values.items()]
    windows = [Window(latent, row, max(0, at - 5), at + 4) for latent, row, at in strongest[::7]]
    saes = load_saes({name: stages.runs[name]}, stages.reader, "cpu")
    plan = ActivityPlan(windows={name: windows}, passages=[], density_tokens=300, batch_tokens=50)
    activity = read_activity(stages.reader, saes, plan)
    assert len(activity.shading[name]) == len(set(windows)) > 10
    for window in windows:
        expected = {}
        for offset in range(window.last - window.first + 1):
            value_F = values.get((window.row, window.first + offset))
            if value_F is not None and value_F[window.latent] > 0:
                expected[offset] = float(value_F[window.latent])
        shading = activity.shading[name][window]
        assert shading.offset_P == list(expected)
        assert shading.value_P == pytest.approx(list(expected.values()), rel=1e-4)
    assert any(len(activity.shading[name][window].value_P) > 1 for window in windows)
    density = activity.density[name]
    assert density.tokens == len(values)
    if name != "every":  # whose density is over its vectors, of which a token has several
        share_F = torch.stack([value_F != 0 for value_F in values.values()]).double().mean(0)
        assert density.share_F.tolist() == pytest.approx(share_F.tolist(), abs=2 / len(values))
    assert density.share_F.sum() == pytest.approx(4, rel=0.02)  # k


def test_only_windows_are_read_where_density_is_not_sampled(stages: Stages) -> None:
    saes = load_saes({"fixed": stages.runs["fixed"]}, stages.reader, "cpu")
    windows = [Window(0, 0, 0, 5), Window(1, 4, 3, 9)]
    calls = []
    saes["fixed"].sae.register_forward_hook(lambda *_: calls.append(0))
    original = saes["fixed"].sae.read

    def count(x_NLD: torch.Tensor, **rest: Any) -> Any:
        calls.append(len(x_NLD))
        return original(x_NLD, **rest)

    saes["fixed"].sae.read = count  # type: ignore[method-assign]
    plan = ActivityPlan(windows={"fixed": windows}, passages=[], density_tokens=0)
    assert read_activity(stages.reader, saes, plan).density == {}
    assert sum(calls) == 5 + 7  # the first position of a row is not read


def test_routing_of_a_passage(stages: Stages) -> None:
    passages = choose_passages(stages.reader, 3, 20)
    assert len(passages) == 3
    assert all(0 < passage.first < passage.last < 64 for passage in passages)
    assert all(passage.last - passage.first < 20 for passage in passages)
    saes = load_saes({"route": stages.runs["route"]}, stages.reader, "cpu")
    plan = ActivityPlan(windows={}, passages=passages, density_tokens=0)
    (read,) = read_activity(stages.reader, saes, plan).routing.values()
    values = dense_values(stages, "route")
    for passage, routing in zip(passages, read, strict=True):
        assert len(routing.layer_T) == passage.last - passage.first + 1
        assert routing.router_TL.sum(1) == pytest.approx(1, abs=1e-5)
        assert routing.router_TL.argmax(1).tolist() == routing.layer_T
        for offset, latents in enumerate(routing.latents_T):
            value_F = values[passage.row, passage.first + offset]
            top = value_F.topk(4)
            assert [latent for latent, _ in latents] == top.indices[top.values > 0].tolist()
            found = [value for _, value in latents]
            assert found == pytest.approx(top.values[top.values > 0].tolist(), rel=1e-4)


def test_negative_activations_are_not_shown(stages: Stages) -> None:
    saes = load_saes({"fixed": stages.runs["fixed"]}, stages.reader, "cpu")
    coder = saes["fixed"].sae.coder
    bias_F = next(p for p in coder.parameters() if p.shape == (64,))
    bias_F.data.fill_(-100.0)  # of a TopK the largest are kept, whatever their sign
    plan = ActivityPlan(windows={}, passages=[], density_tokens=300)
    share_F = read_activity(stages.reader, saes, plan).density["fixed"].share_F
    assert share_F.sum() == pytest.approx(4, rel=0.02)
    window = Window(int(share_F.argmax()), 1, 1, 40)
    plan = ActivityPlan(windows={"fixed": [window]}, passages=[], density_tokens=0)
    assert read_activity(stages.reader, saes, plan).shading["fixed"][window] == ([], [])


def test_a_passage_is_a_piece_of_one_document() -> None:
    documents = '[[0, {"title": "first"}], [20, {"title": "second"}], [70, {}]]'
    assert passage_of(7, 80, documents, 30) == (7, 20, 49, "second")
    assert passage_of(7, 80, documents, 10) == (7, 20, 29, "second")
    assert passage_of(7, 19, documents, 30) == (7, 1, 18, "first")
    assert passage_of(7, 80, documents, 60) == (7, 20, 68, "second")  # up to its separator
    assert passage_of(7, 64, "[]", 60) == (7, 1, 60, "")


def test_passages_stay_within_a_document(stages: Stages) -> None:
    separator = stages.reader.spec.tokenizer["separator_id"]
    titled = 0
    for passage in choose_passages(stages.reader, 5, 40):
        chunk, row = divmod(passage.row, stages.reader.spec.chunk_rows)
        ids_T = stages.reader.rows(chunk).tokens_RT[row]
        assert separator not in ids_T[passage.first : passage.last + 1]
        titled += HARM in passage.title
    assert titled


@pytest.mark.parametrize("text", SENTENCES)
def test_pieces_are_the_text(text: str, stages: Stages) -> None:
    tokenizer = origin_tokenizer(stages.reader.spec, model=str(stages.model))
    ids = tokenizer.encode([text])[0].tolist()
    pieces = TokenText(tokenizer).pieces(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text
    assert "�" not in "".join(pieces)


stretches = st.builds(
    lambda row, first, length: Stretch(row, first, first + length),
    *(st.integers(0, most) for most in (2, 30, 8)),
)


@given(st.lists(stretches))
def test_merged_stretches_hold_the_same_positions(found: list[Stretch]) -> None:
    def positions(parts: list[Stretch]) -> list[tuple[int, int]]:
        return [(p.row, at) for p in parts for at in range(p.first, p.last + 1)]

    whole = positions(merged(found))
    assert whole == sorted(set(positions(found)))
    for a, b in zip(merged(found), merged(found)[1:], strict=False):
        assert a.row < b.row or a.last + 1 < b.first


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma"])
def test_promoted_tokens(
    architecture: str, tiny_model: Any, tiny_tokenizer: Any, stages: Stages, tmp_path: Path
) -> None:
    model = tiny_model(architecture)
    decoder = model.get_decoder()
    norm = decoder.ln_f if architecture == "gpt2" else decoder.norm
    torch.manual_seed(1)
    norm.weight.data += torch.randn_like(norm.weight)
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    sae, _ = load_run(stages.runs["fixed"])
    (effects,) = token_effects(load_lm(str(tmp_path), dtype="float32"), sae, [5], 6)
    direction_D = sae.direction_FD()[5].detach()
    if architecture == "gpt2":
        direction_D = direction_D - direction_D.mean()
    gain_D = norm.weight + (architecture == "gemma")
    logits_V = model.get_output_embeddings().weight @ (gain_D * direction_D)
    logits_V = logits_V.detach()
    order = logits_V.argsort(descending=True).tolist()
    assert [token for token, _ in effects.promoted] == order[:6]
    assert [token for token, _ in effects.suppressed] == order[-6:][::-1]
    factor = effects.promoted[0][1] / float(logits_V[order[0]])
    assert effects.suppressed[0][1] / float(logits_V[order[-1]]) == pytest.approx(factor, rel=1e-3)


def test_neighbours(stages: Stages) -> None:
    sae, _ = load_run(stages.runs["route"])
    decoder_FD = sae.direction_FD().detach()
    (found,) = neighbours(sae, [7], 3)
    cosine_F = torch.cosine_similarity(decoder_FD[7], decoder_FD, dim=-1)
    assert [n.latent for n in found] == cosine_F.argsort(descending=True)[1:4].tolist()
    assert found[0].cosine == pytest.approx(float(cosine_F[found[0].latent]), abs=1e-6)


def test_the_browsers_data(page: str, stages: Stages) -> None:
    text, browser = part(page, "text"), part(page, "latents-0")
    record = json.loads(stages.contexts("route").read_text())
    values = dense_values(stages, "route")
    assert [one["latent"] for one in browser["latents"]] == sorted(map(int, record["latents"]))
    for one in browser["latents"]:
        assert one["count"] == record["latents"][str(one["latent"])]["activations"]
        for segment, start, length, marked, layer, activation, offsets, shades in one["contexts"]:
            assert layer == 2
            assert len(text["segments"][segment][start : start + length]) == length
            assert shades[offsets.index(marked)] == pytest.approx(activation, rel=0.01)
    first = browser["latents"][0]["contexts"][0]
    words = [text["strings"][i] for i in text["segments"][first[0]]]
    contexts = record["latent_context_map"][str(browser["latents"][0]["latent"])]
    best = max((c for group in contexts.values() for c in group), key=lambda c: c["activation"])
    shown = "".join(words[first[1] : first[1] + first[2]])
    expected = best["context"].replace("<ACTIVATED>", "").replace("</ACTIVATED>", "")
    assert shown.replace("�", "").strip() in expected or "�" in expected
    assert values  # and the store was read


def test_a_page_lets_nothing_in_and_nothing_out(page: str) -> None:
    head, _, body = page.partition("</head>")
    found = re.search(r'Content-Security-Policy" content="(.*?)"', head)
    assert found
    rules = dict(rule.split(" ", 1) for rule in found[1].split("; "))
    assert rules["default-src"] == "'none'"
    scripts = re.findall(r"<script>(.*?)</script>", body, re.DOTALL)
    style = re.findall(r"<style>(.*?)</style>", head, re.DOTALL)

    def hashes(parts: list[str]) -> str:
        digests = (hashlib.sha256(text.encode()).digest() for text in parts)
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

    assert rules["script-src"] == hashes(scripts)
    assert rules["style-src"] == hashes(style)
    assert len(scripts) == 2
    markup = re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL)
    assert not re.search(r"\b(src|href)=\"(?!#)", markup)
    assert HARM not in page
    assert "window.harmed" in page  # as data


def test_policy_changes_with_the_script() -> None:
    assert policy(["a"], "b") != policy(["c"], "b")


@given(st.recursive(st.none() | st.text() | st.floats(), lambda x: st.lists(x, max_size=3)))
def test_embedded_data_ends_no_element(value: Any) -> None:
    text = embedded([value, "</script><!--", {"a": float("nan")}])
    assert "<" not in text
    assert json.loads(text)[1:] == ["</script><!--", {"a": None}]


def test_table_marks_the_best(stages: Stages) -> None:
    runs = {run.id: run for run in discover(stages.root)}
    table = build_table(list(runs.values()))
    columns = [column["key"] for column in table.columns]
    words = ("l0", "nmse", "kl", "delta_ce", "recovered", "interpretable", "score", "dead")
    assert all(word in columns for word in words)
    nmse = {row["id"]: row["nmse"][0] for row in table.rows}
    assert table.best["nmse"] == [min(nmse, key=lambda id: nmse[id])]
    assert table.best["kl"] == [stages.runs["route"].name]
    assert table.best["recovered"] == [stages.runs["fixed"].name]
    assert table.best["score"] == []  # one alone is not the best
    assert table.missing == []
    rows = {row["name"]: row for row in csv.DictReader(io.StringIO(table.csv()))}
    assert rows[stages.runs["route"].name]["kl_se"] == "0.01"
    assert rows[stages.runs["all"].name]["kl_se"] == ""
    assert {row["architecture"] for row in rows.values()} == {
        "RouteSAE",
        "TopK",
        "MLSAE",
        "crosscoder+topk",
    }


def test_missing_stages_are_named(stages: Stages, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    shutil.copytree(stages.root / "saes", root)
    (root / "broken.json").write_text("{")
    config = ReportConfig(root=root, out=tmp_path / "r.html")
    made = build_report(config)
    sentences = " ".join(f"{m.title} {m.sentence}" for m in made.missing)
    assert "`routesae contexts`" in sentences
    assert "`routesae interpret`" in sentences
    assert "--model" in sentences  # a local folder is recorded by its name alone
    page = config.out.read_text("utf-8")
    overview = part(page, "overview")
    assert any("evaluate --spliced" in sentence for _, sentence in overview["missing"])
    assert made.latents == 0
    assert part(page, "latents") == []
    assert part(page, "routing") is None


def test_without_store_and_model_contexts_are_shown_as_they_are(
    stages: Stages, tmp_path: Path
) -> None:
    root = copied(stages, tmp_path / "runs")
    for file in [*root.rglob("config.json"), *root.rglob("*_0.10.json"), root / "eval.json"]:
        text = json.dumps(read_json(file)).replace(str(stages.reader.path), "/nowhere/s.zarr")
        file.write_text(text)
    made = build_report(ReportConfig(root=root, out=tmp_path / "r.html"))
    assert any("--store" in m.sentence for m in made.missing)
    page = (tmp_path / "r.html").read_text("utf-8")
    text, browser = part(page, "text"), part(page, "latents-0")
    record = json.loads(stages.contexts("route").read_text())
    one = browser["latents"][0]
    segment, start, length, marked, *_ = one["contexts"][0]
    pieces = [text["strings"][i] for i in text["loose"][-segment - 1]]
    assert (start, length, marked) == (0, 3, 1)
    context = f"{pieces[0]}<ACTIVATED>{pieces[1]}</ACTIVATED>{pieces[2]}"
    groups = record["latent_context_map"][str(one["latent"])].values()
    assert context in [c["context"] for group in groups for c in group]
    assert "promoted" not in one


def test_contexts_of_another_store_are_not_read_from_this_one(
    stages: Stages, tmp_path: Path
) -> None:
    root = copied(stages, tmp_path / "runs")
    (tmp_path / "other.zarr").mkdir()
    file = next(root.rglob(stages.contexts("route").name))
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | {"store": str(tmp_path / "other.zarr")}))
    config = ReportConfig(root=root, out=tmp_path / "r.html", model=str(stages.model))
    build_report(config)
    page = config.out.read_text("utf-8")
    browsers = {part(page, f"latents-{i}")["run"]: part(page, f"latents-{i}") for i in (0, 1)}
    segments = {
        name: {context[0] < 0 for one in browser["latents"] for context in one["contexts"]}
        for name, browser in browsers.items()
    }
    assert segments[stages.runs["route"].name] == {True}
    assert segments[stages.runs["fixed"].name] == {False}


def test_results_from_another_place_find_their_run(stages: Stages, tmp_path: Path) -> None:
    root = copied(stages, tmp_path / "moved")
    runs = {run.folder.name: run for run in discover(root)}
    route = runs[stages.runs["route"].name]
    assert route.folder.is_relative_to(root)
    assert route.evaluation is not None
    assert route.spliced is not None
    assert route.contexts is not None
    assert route.interpretation is not None
    assert runs[stages.runs["fixed"].name].interpretation is None


def test_runs_of_one_name_are_told_apart(stages: Stages, tmp_path: Path) -> None:
    run = stages.runs["fixed"]
    for place in "ab":
        shutil.copytree(run, tmp_path / place / run.name)
    assert [found.id for found in discover(tmp_path)] == [f"a/{run.name}", f"b/{run.name}"]
    shutil.copytree(tmp_path / "a", tmp_path / ".replaced")
    assert len(discover(tmp_path)) == 2


def test_the_newest_evaluation_counts(stages: Stages, tmp_path: Path) -> None:
    root = copied(stages, tmp_path / "runs")
    record = json.loads((root / "eval.json").read_text())
    for result in record["results"]:
        result |= {"nmse": 0.5, "spliced": None}
    (root / "later.json").write_text(json.dumps(record))
    (root / "train.json").write_text(json.dumps(record | {"split": "train"}))
    found = {run.folder.name: run for run in discover(root)}[stages.runs["route"].name]
    assert found.evaluation is not None
    assert found.evaluation["nmse"] == 0.5
    assert found.evaluation["split"] == "eval"
    assert found.spliced is not None  # an evaluation without splicing does not undo it


def test_latents_are_capped_over_all_saes(stages: Stages, tmp_path: Path) -> None:
    config = ReportConfig(
        root=stages.root, out=tmp_path / "r.html", latents=7, model=str(stages.model)
    )
    assert build_report(config).latents == 7
    page = config.out.read_text("utf-8")
    assert sorted(len(part(page, f"latents-{place}")["latents"]) for place in (0, 1)) == [3, 4]
    (run,) = (run for run in discover(stages.root) if run.interpretation)
    assert run.interpretation is not None
    assert run.contexts is not None
    few, all_of_them = (choose_latents(run, most, from_store=True) for most in (4, 1000))
    assert set(few.latents) == set(map(int, run.interpretation["latents"]))
    assert len(all_of_them.latents) == run.contexts.record["total_latents"]


def test_assets(page: str, stages: Stages) -> None:
    folder = stages.root / "assets"
    keys = [plot["key"] for plot in part(page, "plots")]
    expected = ("kl_l0", "nmse_l0", "interpretable_threshold", "interpretable_l0", "score_l0")
    more = ("routing", "training_nmse", "density", "store_bits", "store_distortion")
    assert set(keys) >= {*expected, *more}
    for key in keys:
        assert (folder / f"{key}.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / f"{key}.svg").read_text().startswith("<svg")
        assert len((folder / f"{key}.csv").read_text().splitlines()) > 1
    assert len((folder / "saes.csv").read_text().splitlines()) == 1 + len(SAES)
    rows = csv.DictReader(io.StringIO((folder / "latents.csv").read_text("utf-8")))
    assert {row["run"] for row in rows} == {stages.runs[n].name for n in ("route", "fixed")}
    assert not list(folder.glob("*.partial"))


def test_no_cell_is_a_formula() -> None:
    assert harmless("=HYPERLINK(1)") == "'=HYPERLINK(1)"
    assert (harmless("plain"), harmless(-1.5)) == ("plain", -1.5)


def test_five_thousand_latents_stay_small() -> None:
    contexts = [[120, 300, 60, 31, 12, 3.14, [3, 20, 31], [1.16, 0.42, 3.14]]] * 10
    pairs = [[12345, 10.25]] * 8
    one = {"latent": 4000, "count": 1234, "max": 3.14, "mean": 1.01, "layers": [100] * 16}
    one |= {"tokens": [12345] * 20, "contexts": contexts, "near": [[4000, 0.31]] * 6}
    one |= {"histogram": {"edges": [1.25] * 17, "counts": [100] * 16}}
    one |= {"promoted": pairs, "suppressed": pairs, "explained": {"text": "x" * 200}}
    assert 10 * len(embedded({"latents": [one] * 500})) < 10e6


@pytest.mark.parametrize(
    ("values", "axis", "inside"),
    [
        ([32.0], Axis(field="x", title=""), (30, 36)),
        ([0.0], Axis(field="x", title=""), (-2, 2)),
        ([0.1, 10.0], Axis(field="x", title="", scale="log"), (0.05, 20)),
        ([5.0, 10.0], Axis(field="x", title="", zero=True), (-1, 11)),
    ],
)
def test_axes_hold_their_values(values: list[float], axis: Axis, inside: tuple[int, int]) -> None:
    low, high = domain(values, axis)
    assert inside[0] - 2 < low < min(values)
    assert max(values) < high <= inside[1]


def test_short_numbers() -> None:
    assert [short(x) for x in (0.012345, 1234.5, -2.0, 0.0, np.inf)] == [0.0123, 1230, -2, 0, 0]


def test_what_cannot_be_reported(stages: Stages, tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="expected a folder with runs"):
        discover(tmp_path / "nothing")
    with pytest.raises(ReportError, match="routesae train"):
        discover(tmp_path)
    root = copied(stages, tmp_path / "runs")
    (root / "bad.json").write_text('{"kind": "contexts"}')
    with pytest.raises(ReportError, match=r"bad\.json: expected the contexts .* found no run"):
        discover(root)
    other = tmp_path / "model"
    shutil.copytree(stages.model, other)
    tokens = json.loads((other / "tokenizer.json").read_text())
    tokens["normalizer"] = {"type": "Lowercase"}
    (other / "tokenizer.json").write_text(json.dumps(tokens))
    config = ReportConfig(root=stages.root, out=tmp_path / "r.html", model=str(other))
    with pytest.raises(ModelError, match="not the"):
        build_report(config)
    assert not (tmp_path / "r.html").exists()


def test_the_command(stages: Stages, tmp_path: Path) -> None:
    command = ["report", str(stages.root), "--out", str(tmp_path / "r.html"), "--device", "cpu"]
    done = CliRunner().invoke(app, [*command, "--model", str(stages.model), "--latents", "5"])
    assert done.exit_code == 0, done.output
    assert "4 SAEs, 5 latents to browse" in done.stdout
    assert (tmp_path / "r.html").exists()
    for options, words in (
        (["--latents", "-1"], "at least 0"),
        (["--out", str(tmp_path)], "is a folder"),
        (["--assets", str(tmp_path / "r.html")], "is a file"),
        (["--store", str(tmp_path / "no.zarr")], "nothing there"),
    ):
        refused = CliRunner().invoke(app, [*command, *options])
        assert refused.exit_code == 2
        assert words in " ".join(refused.stderr.split())
