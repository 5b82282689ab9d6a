"""The report: everything that was found, read again where needed, on one page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from routesae_cache.lm import LanguageModel
from routesae_cache.report.activity import (
    Activity,
    ActivityPlan,
    Passage,
    choose_passages,
    load_saes,
    read_activity,
)
from routesae_cache.report.assets import write_assets
from routesae_cache.report.browser import Chosen, Details, browser_data, choose_latents
from routesae_cache.report.charts import Look, theme
from routesae_cache.report.directions import neighbours, token_effects
from routesae_cache.report.discover import FoundRun, discover
from routesae_cache.report.origins import NO_STORE, open_model, open_store, open_text, same_store
from routesae_cache.report.page import render
from routesae_cache.report.parts import overview_part, plot_part, routing_part
from routesae_cache.report.plot_data import PlotData
from routesae_cache.report.plots import build_plots
from routesae_cache.report.table import ARCHITECTURES, Missing, architecture, build_table
from routesae_cache.report.text import Segments, Stretch, Strings, TokenText
from routesae_cache.sources import ModelSource
from routesae_cache.trained import TrainedSae
from routesae_cache.whole_files import whole_file
from stores.places import Where
from stores.reader import StoreReader
from stores.spec import Record

PASSAGES = 8
PASSAGE_TOKENS = 180
DENSITY_TOKENS = 40_000
EFFECTS = 8
"""Tokens that a direction promotes, and as many that it suppresses."""
NEIGHBOURS = 6

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What a report is made of, and where it goes."""

    root: Path
    """The folder below which everything is found."""
    out: Path
    assets: Path | None = None
    """A folder for every plot as a picture and every table as a file."""
    latents: int = 8000
    """The most latents that the browser shows, over all SAEs."""
    model: str | ModelSource | None = None
    """Where the store's model is; by default the name the store has."""
    store: Where | None = None
    """By default where the runs say that it is."""
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.latents < 0:
            raise ValueError(f"latents: expected at least 0, found {self.latents}")
        if self.out.is_dir():
            raise ValueError(f"{self.out} is a folder; expected a file's name, as report.html")
        if self.assets is not None and self.assets.exists() and not self.assets.is_dir():
            raise ValueError(f"{self.assets} is a file; expected a folder for pictures and tables")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was written."""

    out: Path
    bytes: int
    runs: int
    latents: int
    """In the browser."""
    missing: list[Missing]
    """What the page has no data for."""
    assets: list[Path]


def build_report(
    config: ReportConfig, progress: Progress = lambda what, done, total: None
) -> Report:
    """Find everything, read what is missing from the store and the model, and write the page.

    `progress(what, done, total)` tells what is being done. ReportError where there is nothing to
    report on; ModelError and StoreError for a model or a store that was asked for and is not
    there. One that was not asked for leaves its parts of the page out.
    """
    runs = discover(config.root)
    missing: list[Missing] = []
    reader = open_store(config.store, config.root, runs)
    text = open_text(reader, config.model, missing)
    chosen = _choose(runs, reader, config)
    missing += _why_no_latents(runs, chosen, config)
    lm = open_model(reader, config.model, config.device, missing) if reader and chosen else None
    read = _read(config, reader, runs, chosen, progress)
    if not read.activity.routing:
        missing.append(Missing("Routing on text", _why_no_routing(runs, reader)))
    architectures = {run.id: architecture(run.config.sae) for run in runs}
    look = Look.of(architectures, tuple(ARCHITECTURES.values()))
    table = build_table(runs)
    plots, absent = build_plots(
        PlotData(runs=runs, look=look, density=read.activity.density, reader=reader)
    )
    missing += absent + table.missing
    words = _Words(reader, text, chosen, read.passages)
    browsers = []
    for done, one in enumerate(chosen):
        progress("Latents", done, len(chosen))
        browsers.append(words.browser(one, _details(one, read, words, lm)))
    progress("Writing", 1, 1)
    configs = {id: sae.config.sae for id, sae in read.saes.items()}
    parts = {
        "overview": overview_part(config.root.resolve().name, reader, table, look, missing),
        "plots": [plot_part(plot) for plot in plots],
        "themes": {"light": theme("light"), "dark": theme("dark")},
        "routing": routing_part(read.activity, read.passages, words.segments, configs),
        **{f"latents-{place}": browser for place, browser in enumerate(browsers)},
        "latents": [{"run": browser["run"]} for browser in browsers],
        "text": words.part(),
    }
    page = render(parts).encode("utf-8", "replace")  # half a surrogate pair is no character
    _write(config.out, page)
    return Report(
        out=config.out,
        bytes=len(page),
        runs=len(runs),
        latents=sum(len(browser["latents"]) for browser in browsers),
        missing=missing,
        assets=write_assets(config.assets, table, plots, browsers) if config.assets else [],
    )


class _Read(NamedTuple):
    """What was read from the store."""

    saes: dict[str, TrainedSae]
    passages: list[Passage]
    activity: Activity


class _Words:
    """The text of everything that the page shows."""

    def __init__(
        self,
        reader: StoreReader | None,
        text: TokenText | None,
        chosen: Sequence[Chosen],
        passages: Sequence[Passage],
    ) -> None:
        self._text, self._strings = text, Strings()
        self._loose: list[list[int]] = []
        shown = [c.stretch for one in chosen if one.from_store for c in one.contexts()]
        shown += [Stretch(*passage[:3]) for passage in passages]
        self.segments = Segments(reader, text, self._strings, shown) if reader and text else None

    def browser(self, chosen: Chosen, details: Details) -> Record:
        token_text = self._text.alone if self._text else None
        return browser_data(chosen, details, self._strings, self._loose, token_text)

    def part(self) -> Record:
        return {
            "strings": self._strings.table,
            "segments": self.segments.tokens if self.segments else [],
            "loose": self._loose,
        }


def _choose(
    runs: Sequence[FoundRun], reader: StoreReader | None, config: ReportConfig
) -> list[Chosen]:
    """The browser's latents; the SAEs share the number equally, and take what others leave."""
    sizes = {run.id: len(run.contexts.record["latents"]) for run in runs if run.contexts}
    left, found = config.latents, {}
    waiting = sorted((run for run in runs if run.contexts), key=lambda run: sizes[run.id])
    for place, run in enumerate(waiting):
        from_store = same_store(run, reader, config.root)
        one = choose_latents(run, left // (len(waiting) - place), from_store=from_store)
        left -= len(one.latents)
        found[run.id] = one
    return [found[run.id] for run in runs if run.id in found and found[run.id].latents]


def _read(
    config: ReportConfig,
    reader: StoreReader | None,
    runs: Sequence[FoundRun],
    chosen: Sequence[Chosen],
    progress: Progress,
) -> _Read:
    """What the SAEs do on the text that the page shows."""
    if reader is None:
        return _Read({}, [], Activity(shading={}, routing={}, density={}))
    progress("Opening the SAEs", 0, 1)
    saes = load_saes({run.id: run.folder for run in runs}, reader, config.device)
    routed = any(sae.config.sae.selector == "route" for sae in saes.values())
    passages = choose_passages(reader, PASSAGES, PASSAGE_TOKENS) if routed else []
    plan = ActivityPlan(
        windows={
            one.run.id: [context.window for context in one.contexts()]
            for one in chosen
            if one.from_store and one.run.id in saes
        },
        passages=passages,
        density_tokens=DENSITY_TOKENS,
    )

    def count(done: int, total: int) -> None:
        progress("Reading the store", done, total)

    return _Read(saes, passages, read_activity(reader, saes, plan, count))


def _details(chosen: Chosen, read: _Read, words: _Words, lm: LanguageModel | None) -> Details:
    latents, trained = list(chosen.latents), read.saes.get(chosen.run.id)
    return Details(
        shading=read.activity.shading.get(chosen.run.id, {}),
        segments=words.segments if chosen.from_store else None,
        effects=token_effects(lm, trained.sae, latents, EFFECTS) if lm and trained else None,
        neighbours=neighbours(trained.sae, latents, NEIGHBOURS) if trained else None,
    )


def _why_no_latents(
    runs: Sequence[FoundRun], chosen: Sequence[Chosen], config: ReportConfig
) -> list[Missing]:
    title = "The latent browser"
    if chosen or config.latents == 0:
        return []
    if not any(run.contexts for run in runs):
        return [Missing.of(title, "contexts")]
    sentence = "No latent is interpretable at the threshold; `routesae contexts --threshold`"
    return [Missing(title, f"{sentence} takes a lower one.")]


def _why_no_routing(runs: Sequence[FoundRun], reader: StoreReader | None) -> str:
    if not any(run.config.sae.selector == "route" for run in runs):
        return Missing.of("", "train --sae routesae").sentence
    if reader is None:
        return NO_STORE
    return "The store has no held-out text that the routed SAEs can read."


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path, len(content)) as temporary:
        temporary.write_bytes(content)
