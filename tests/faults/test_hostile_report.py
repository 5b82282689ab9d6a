"""A corpus, explanations and names built to attack the report: all is shown, none of it runs."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from routesae_cache.json_files import read_json, write_json
from routesae_cache.report.build import ReportConfig, build_report
from routesae_cache.report.page import render
from tests import report_helpers
from tests.faults.tally import Tally
from tests.report_helpers import Stages, make_stages

RUN = "window.harmed=1"
ATTACKS = (
    f"</script><script>{RUN}</script>",
    f"<!--<script>{RUN}//-->",
    f"--!><svg/onload={RUN}>]]>",
    f"</textarea></title></style><img src=x onerror={RUN}>",
    f"\u2028{RUN}\u2029//",
    "\u202egpj.exe\u2066 \u200f\u2069 left",
    "{{policy}}{{data}}{{page}}{{",
    f"${{{RUN}}}`'\"\\",
    f"javascript:{RUN}//<a href='javascript:{RUN}'>x</a>",
    "\x01\x7f\ufeff\ufffe\x1b[2J",
    f'{{"a": 1}}<iframe srcdoc="<script>{RUN}</script>">',
    f"&lt;script&gt;{RUN}&#60;/script>",
)
NAMES = ("__proto__", "constructor", f"<img src=x onerror={RUN}>", "' onclick='x")


class Elements(HTMLParser):
    """The elements of a page, and what is inside those that hold data."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, str]] = []
        self.data: list[str] = []
        self._is_data = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = dict(attrs)
        self.tags.append((tag, str({k: v for k, v in names.items() if k != "content"})))
        self._is_data = names.get("type") == "application/json"

    def handle_endtag(self, tag: str) -> None:
        self._is_data = False

    def handle_data(self, data: str) -> None:
        if self._is_data:
            self.data.append(data)


@pytest.mark.parametrize("attack", ATTACKS)
def test_data_is_data(attack: str, tally: Tally) -> None:
    """Whatever is in it, the page has the same elements, and the data is read back."""
    parts = {"overview": {attack: [attack, {"a": attack}]}, "text": attack}
    harmless = {"overview": {"a": ["a", {"a": "a"}]}, "text": "a"}
    page, plain = (Elements(render(each)) for each in (parts, harmless))
    assert page.tags == plain.tags
    assert [json.loads(data) for data in page.data] == list(parts.values())
    assert all("<" not in data for data in page.data)
    tally.add("attacks on the report")


@pytest.fixture(scope="module")
def stages(tiny_model_dir: Path, tmp_path_factory: Any) -> Stages:
    """Documents, titles and explanations of attacks, and runs with names that are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_helpers, "SENTENCES", tuple(" ".join(ATTACKS[i::3]) for i in range(3)))
        patch.setattr(report_helpers, "HARM", " ".join(ATTACKS))
        patch.setattr(report_helpers, "EXPLANATION", " ".join(ATTACKS))
        stages = make_stages(tmp_path_factory.mktemp("hostile"), tiny_model_dir)
    renamed = dict(zip((run.name for run in stages.runs.values()), NAMES, strict=True))
    for file in stages.root.rglob("*.json"):
        if ".zarr" in str(file):
            continue
        record = read_json(file)
        for one in (record, *record.get("results", ())):
            if one.get("name") in renamed:
                one["name"] = renamed[one["name"]]
        write_json(file, record)
    return stages


@pytest.fixture(scope="module")
def address(stages: Stages) -> str:
    out = stages.root / "report.html"
    assets = stages.root / "assets"
    build_report(ReportConfig(root=stages.root, out=out, assets=assets, model=str(stages.model)))
    return out.as_uri()


def test_every_view_shows_it_and_runs_none(
    driver: Any, address: str, stages: Stages, tally: Tally
) -> None:
    latents = list(read_json(stages.contexts("route"))["latents"])
    places = ["/overview", "/plots", "/latents"]
    places += [f"/routing/{name}/{n}" for name in ("x", NAMES[0]) for n in range(1, 9)]
    places += [f"{name}/{latent}" for name in NAMES[:2] for latent in latents[:6]]
    shown = ""
    for place in places:
        driver.get("about:blank")
        driver.get(f"{address}#{place}")
        script = "return document.querySelector('main').textContent"
        shown += driver.execute_script(script)
        assert driver.execute_script("return window.harmed") is None, place
        selector = "main script, main img, main iframe, main a[href^=javascript]"
        assert driver.execute_script(f"return document.querySelectorAll({selector!r}).length") == 0
        assert driver.get_log("browser") == [], place
    for name in NAMES:
        assert name in shown
    for attack in ATTACKS[:3]:
        assert attack in shown
    tally.add("attacks on the report", tried=len(places), survived=len(places))


def test_a_token_turns_its_own_direction_alone(driver: Any, address: str, tally: Tally) -> None:
    driver.get("about:blank")
    driver.get(f"{address}#/routing")
    every = "[...document.querySelectorAll('.token')]"
    styles = driver.execute_script(f"return {every}.map((e) => getComputedStyle(e).unicodeBidi)")
    assert set(styles) == {"isolate"}
    tally.add("attacks on the report")


def test_pictures_and_tables_are_harmless(address: str, stages: Stages, tally: Tally) -> None:
    """SVG is shown by browsers, CSV is opened by spreadsheets."""
    files = sorted((stages.root / "assets").iterdir())
    assert {file.parent for file in files} == {stages.root / "assets"}
    for file in files:
        text = file.read_bytes().decode("utf-8", "replace")
        if file.suffix == ".svg":
            assert "<script" not in text
            assert "<img" not in text
        if file.suffix == ".csv":
            assert not any(cell.startswith(("=", "@")) for cell in text.split(","))
    tally.add("attacks on the report", tried=len(files), survived=len(files))
