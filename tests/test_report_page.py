"""The report in a real browser: what a reader does, and that nothing in the data ever runs."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from routesae_cache.report.build import ReportConfig, build_report
from routesae_cache.report.charts import Look, theme
from routesae_cache.report.page import render
from tests.browser import missing_browser
from tests.report_helpers import EXPLANATION, HARM, SAES, Stages, make_stages

PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
DESK = {"width": 1280, "height": 900, "deviceScaleFactor": 1, "mobile": False}


@pytest.fixture(scope="module")
def stages(tiny_model_dir: Path, tmp_path_factory: Any) -> Stages:
    return make_stages(tmp_path_factory.mktemp("page"), tiny_model_dir)


@pytest.fixture(scope="module")
def address(stages: Stages) -> str:
    out = stages.root / "report.html"
    build_report(ReportConfig(root=stages.root, out=out, model=str(stages.model)))
    return out.as_uri()


class Reader:
    """Somebody who looks at the page."""

    def __init__(self, driver: Any, address: str) -> None:
        self.driver, self.address = driver, address
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", DESK)

    def go(self, place: str) -> None:
        """Open the page anew at an address in it."""
        self.driver.get("about:blank")
        self.driver.get(f"{self.address}#{place}")

    def all(self, selector: str) -> list[Any]:
        return list(self.driver.find_elements(By.CSS_SELECTOR, selector))

    def one(self, selector: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)"
        return list(self.driver.execute_script(script, selector))

    def script(self, text: str, *arguments: Any) -> Any:
        return self.driver.execute_script(text, *arguments)

    def until(self, condition: Callable[[], Any]) -> Any:
        """Wait for something to come true; it is asked once more at the end."""
        end = time.monotonic() + 10
        while time.monotonic() < end:
            if found := condition():
                return found
            time.sleep(0.02)
        return condition()


@pytest.fixture
def reader(driver: Any, address: str) -> Iterator[Reader]:
    reader = Reader(driver, address)
    driver.get_log("browser")
    yield reader
    assert driver.get_log("browser") == []
    assert reader.script("return window.harmed") is None


def test_sorting_the_table(reader: Reader) -> None:
    reader.go("/overview")
    heads = {head.text: head for head in reader.all(".saes thead th")}
    assert {"SAE", "NormMSE", "KL", "Recovered", "Interpretable", "Score"} <= set(heads)

    def values(head: str) -> list[str]:
        place = list(heads).index(head) + 1
        return reader.texts(f".saes tbody tr > :nth-child({place})")

    heads["NormMSE"].find_element(By.TAG_NAME, "button").click()
    ascending = [value.split()[0] for value in values("NormMSE")]
    assert ascending == sorted(ascending, key=float)
    assert "(best)" in values("NormMSE")[0]
    assert heads["NormMSE"].get_attribute("aria-sort") == "ascending"
    heads["NormMSE"].find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
    assert [value.split()[0] for value in values("NormMSE")] == ascending[::-1]
    heads["KL"].find_element(By.TAG_NAME, "button").click()
    assert [value == "–" for value in values("KL")] == [False, False, True, True]


def test_plots_are_drawn_and_obey(reader: Reader) -> None:
    reader.go("/overview")
    reader.script("document.querySelectorAll('.stage').forEach((s) => s.scrollIntoView())")
    stages = reader.all(".stage")
    assert len(stages) >= 10
    for stage in stages:
        reader.script("arguments[0].scrollIntoView()", stage)
        assert reader.until(lambda stage=stage: stage.get_attribute("data-drawn"))

    def points() -> int:
        return len(reader.all("#plot-nmse_l0 .mark-symbol path"))

    assert points() == len(SAES)
    reader.script("document.getElementById('plot-nmse_l0').scrollIntoView({ block: 'center' })")
    chip = reader.one(".legend .chip")
    chip.click()
    assert chip.get_attribute("aria-pressed") == "false"
    assert reader.until(lambda: points() == len(SAES) - 1)
    chip.click()

    def ticks() -> set[str]:
        return set(reader.texts("#plot-nmse_l0 .role-axis-label text"))

    whole = ticks()
    reader.one("#plot-nmse_l0 [title='Zoom in']").click()
    assert reader.until(lambda: ticks() != whole)
    reader.one("#plot-nmse_l0 [title='Reset the zoom']").click()
    assert reader.until(lambda: ticks() == whole)
    reader.one("#plot-nmse_l0 [title='Show the data as a table']").click()
    assert len(reader.all("#plot-nmse_l0 .data tbody tr")) == len(SAES)
    point = reader.one("#plot-nmse_l0 .mark-symbol path")
    webdriver.ActionChains(reader.driver).move_to_element(point).perform()
    assert reader.until(lambda: "NormMSE" in reader.one("#tip").text)
    reader.one("#theme").click()
    assert reader.until(lambda: points() == len(SAES))


def test_searching_and_filtering(reader: Reader, stages: Stages) -> None:
    reader.go("/latents")
    record = json.loads(stages.contexts("route").read_text())
    run = stages.runs["route"].name
    reader.script("document.querySelector('.field select').value = arguments[0]", run)
    reader.go(f"/latents/{run}")
    total = record["total_latents"]
    assert reader.one(".count").text == f"{total} of {total} latents"
    search = reader.one("#search")
    search.send_keys("explained 2")
    assert reader.texts(".row .says") == ["explained 2"]
    search.clear()
    latent, contexts = next(iter(record["latent_context_map"].items()))
    search.send_keys(latent)
    assert latent in reader.texts(".row .index")
    search.clear()
    token = max(contexts, key=len)
    search.send_keys(token.upper())
    assert latent in reader.texts(".row .index")
    search.send_keys("no such thing")
    assert reader.one(".count").text == f"0 of {total} latents"
    search.clear()
    search.send_keys(" ")
    score = reader.one(".filters label:nth-child(2) select")
    score.send_keys("3")
    assert reader.until(lambda: reader.texts(".row .says") == ["explained 2"])
    score.send_keys("a")
    reader.one(".filters label:nth-child(4) select").send_keys("Index")
    shown = [int(index) for index in reader.texts(".row .index")]
    assert shown == sorted(shown)


def test_opening_a_latent(reader: Reader, stages: Stages) -> None:
    run = stages.runs["route"].name
    reader.go(f"/latents/{run}")
    reader.all(".row")[1].click()
    shown = reader.one(".detail h2").text.split()[-1]
    assert reader.script("return location.hash") == f"#{run}/{shown}"
    assert reader.texts(".row[aria-selected=true] .index") == [shown]
    reader.one("#list").send_keys(Keys.ARROW_UP)
    assert reader.one(".detail h2").text.split()[-1] != shown
    record = json.loads(stages.contexts("route").read_text())
    latent, contexts = next(iter(record["latent_context_map"].items()))
    reader.go(f"{run}/{latent}")  # a shared link
    assert reader.one(".explanation").text == EXPLANATION
    titles = " ".join(reader.texts(".part h3"))
    for words in ("Activations", "layer", "Raises", "Lowers", "Nearest"):
        assert words in titles
    assert len(reader.all(".bars li")) == 16
    marks = reader.texts(".context-list mark")
    assert {mark.strip().lower() for mark in marks} <= {*contexts, "·", "↵"}
    reader.one(".part-head .toggle").click()
    assert reader.one(".context-list.numbers")
    most = max(record["latents"], key=lambda key: record["latents"][key]["activations"])
    reader.go(f"{run}/{most}")
    assert reader.all(".context-list .on:not(mark)")
    near = reader.one(".near a")
    name = near.get_attribute("href").split("/")[-1]
    near.click()
    assert reader.one(".detail h2").text.split()[-1] == name
    reader.go(f"{run}/99999")
    assert "does not have it" in reader.one(".detail").text


def test_routing_on_text(reader: Reader, stages: Stages) -> None:
    reader.go("/routing")
    tokens = reader.all(".token")
    assert len(tokens) > 20
    assert "rgb" in reader.script("return arguments[0].style.getPropertyValue('--c')", tokens[0])
    webdriver.ActionChains(reader.driver).move_to_element(tokens[8]).perform()
    assert tokens[8].get_attribute("aria-selected") == "true"
    bars = reader.texts(".distribution .value")
    assert len(bars) == 3
    assert sum(float(bar.rstrip("%") or 0) for bar in bars) == pytest.approx(100, abs=0.3)
    layer = reader.one(".distribution .chosen .index").text
    assert f"layer {layer}," in tokens[8].get_attribute("aria-label")
    assert tokens[8].get_attribute("data-layer") == layer
    tokens[8].send_keys(Keys.ARROW_RIGHT)
    assert tokens[9].get_attribute("aria-selected") == "true"
    assert reader.script("return document.activeElement.id") == "token-9"
    reader.one(".controls .toggle").click()
    assert reader.all(".tokens.numbers")
    reader.one(".key button").click()
    faded = {token.get_attribute("data-layer") for token in reader.all(".token.faded")}
    assert "1" not in faded
    title = reader.one(".page h2").text
    reader.one("[title='Next passage']").click()
    assert reader.until(lambda: reader.one(".page h2").text != title)
    link = reader.one(".inspector .near a")
    name = link.get_attribute("href").split("/")[-1]
    link.click()
    assert reader.one(".detail h2").text.split()[-1] == name


def test_harmful_text_is_text(reader: Reader) -> None:
    reader.go("/routing")
    seen = []
    for place, _ in enumerate(reader.all(".controls select option")):
        reader.go(f"/routing/x/{place + 1}")
        seen.append(reader.one(".page h2").text)
        seen.append("".join(reader.texts(".tokens")))
    assert any(HARM in text for text in seen[::2])
    for harm in ("<script>", "onerror=", "</script>"):  # no passage is long enough for it all
        assert any(harm in text for text in seen[1::2]), harm
    assert reader.all("main script, main img") == []


def test_policy_stops_what_is_not_the_pages_own(driver: Any, address: str) -> None:
    driver.get("about:blank")
    driver.get(address)
    driver.execute_script("""
        const script = document.createElement("script");
        script.textContent = "window.harmed = 1";
        document.body.append(script);
        document.body.insertAdjacentHTML("beforeend", "<img src=x onerror='window.harmed = 1'>");
        fetch("https://example.org/").catch(() => { window.stopped = 1; });
    """)
    time.sleep(0.2)
    assert driver.execute_script("return [window.harmed, window.stopped]") == [None, 1]
    messages = " ".join(entry["message"] for entry in driver.get_log("browser"))
    assert "script-src" in messages
    assert "connect-src" in messages or "default-src" in messages


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_view_fits(size: Any, dark: bool, reader: Reader, stages: Stages) -> None:
    reader.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    reader.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    reader.driver.execute_script("localStorage.clear()")
    run = stages.runs["route"].name
    latent = next(iter(json.loads(stages.contexts("route").read_text())["latents"]))
    colours, background = set(), "return getComputedStyle(document.body).backgroundColor"
    for place in ("/overview", f"/latents/{run}", f"{run}/{latent}", "/routing"):
        reader.go(place)
        assert reader.script("return document.documentElement.scrollWidth") <= size["width"]
        colours.add(reader.script(background))
    themes = ["rgb(246, 247, 249)", "rgb(15, 19, 28)"]
    assert colours == {themes[dark]}
    reader.one("#theme").click()
    assert reader.script(background) == themes[not dark]
    if size is PHONE:
        reader.all(".token")[3].click()
        assert reader.until(reader.one(".inspector.raised").is_displayed)


def test_five_thousand_latents_are_browsed_smoothly(
    driver: Any, tmp_path: Path, reader: Reader
) -> None:
    reader.address = made_up_page(tmp_path / "large.html", 5000)
    reader.go("/latents")
    assert reader.one(".count").text == "5,000 of 5,000 latents"
    assert len(reader.all(".row")) < 50
    reader.one("#list").send_keys(Keys.END)
    assert reader.until(lambda: reader.texts(".row[aria-selected=true] .index") == ["0"])
    assert len(reader.all(".row")) < 50
    seconds = reader.script("""
        const search = document.getElementById("search");
        const start = performance.now();
        for (const word of ["w", "w1", "w12", "w123"]) {
          search.value = word;
          search.dispatchEvent(new Event("input"));
        }
        return (performance.now() - start) / 4000;
    """)
    assert seconds < 0.25
    assert reader.one(".count").text.startswith("11 of")


def made_up_page(path: Path, count: int) -> str:
    """A page with so many latents, which name one token each, w0, w1, …"""
    strings = [f"w{i}" for i in range(count)] + [" and"]
    one = {"count": 3, "mean": 1, "layers": None, "near": [], "histogram": None}
    latents = [
        one | {"latent": i, "max": 1 + i, "tokens": [i], "contexts": [], "histogram": None}
        for i in range(count)
    ]
    for latent in latents:
        latent["histogram"] = {"edges": [0, 1], "counts": [3]}
    browser = {"run": "large", "layers": [1], "threshold": 1, "tokens": 10, "total": count}
    table: dict[str, Any] = {"columns": [], "rows": [], "best": {}}
    look = Look.of({"large": "TopK"}, ())
    overview = {"table": table, "csv": "", "legend": look.legend(), "missing": [], "store": None}
    parts = {
        "overview": overview | {"runs": 1, "folder": "made up"},
        "plots": [],
        "themes": {"light": theme("light"), "dark": theme("dark")},
        "routing": None,
        "latents-0": browser | {"model": None, "latents": latents},
        "text": {"strings": strings, "segments": [], "loose": []},
        "latents": [{"run": "large", "shown": count, "total": count}],
    }
    path.write_text(render(parts), "utf-8")
    return path.as_uri()


def test_a_missing_browser_fails_where_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="apt-get install"):
        missing_browser()
    monkeypatch.delenv("CI")
    with contextlib.redirect_stderr(None), pytest.raises(pytest.skip.Exception, match="NOT TESTED"):
        missing_browser()
