"""A finished run -> a directory that another library loads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from routesae_cache.checkpoint import RunConfig, load_run
from routesae_cache.interchange.activations import gather
from routesae_cache.interchange.folders import check_free, whole_directory
from routesae_cache.interchange.folding import fold, input_scale
from routesae_cache.interchange.formats import Format, find_format
from routesae_cache.interchange.readme import folders_of, limits, readme
from routesae_cache.interchange.verify import Comparison, Difference
from routesae_cache.saes.sae import Sae
from stores.places import Where


class ExportError(ValueError):
    """A run that a format has no place for, or options that do not fit it."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What to write, and how to check it."""

    format: str
    """A key of `formats.FORMATS`."""
    out: Path
    model: str | None = None
    """What the other library calls the language model; None: the name in the run's store."""
    verify: bool = False
    """Load the result back with the library itself and compare reconstructions."""
    store: Where | None = None
    """Residuals to compare on; None: the run's own store, or made-up ones where it is gone."""
    tokens: int = 1024
    """How many of them."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"tokens: expected at least 1, found {self.tokens}")
        if self.store is not None and not self.verify:
            raise ValueError("a store is for verifying: add --verify, or leave --store out")


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What was written."""

    out: Path
    layers: tuple[int, ...]
    limits: Sequence[str]
    """What the format has no place for."""
    differences: Sequence[Difference]
    """One a layer; empty where it was not verified."""
    origin: str
    """What it was verified on."""

    @property
    def ok(self) -> bool:
        """Whether everything that was compared agreed."""
        return all(difference.ok for difference in self.differences)


def export_run(
    run: Path,
    config: ExportConfig,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ExportResult:
    """Write a run's SAE for another library; a coder shared by several layers once for each.

    Raises ExportError for what the format has no place for, RunError for what is no finished run,
    ValueError where `out` is there already, the library is needed and not installed, or the store
    does not fit. `progress(done, total)` counts layers.
    """
    target = find_format(config.format)
    if config.verify and not target.installed:
        raise ExportError(
            f"--verify reads the result back with {target.package}, which is not installed here: "
            f"pip install {target.package}, or leave --verify out"
        )
    check_free(config.out)
    sae, run_config = load_run(run)
    _check(run, run_config, target)
    folders = folders_of(run_config)
    folded = fold(sae, input_scale(run_config))
    model = config.model or run_config.store_spec["model"]["name"]
    lost = limits(run_config, sae)
    with whole_directory(config.out) as partial:
        for layer, folder in folders:
            (partial / folder).mkdir(exist_ok=True)
            target.write(partial / folder, run_config, folded, layer, model)
        differences: list[Difference] = []
        origin = ""
        if config.verify:
            differences, origin = _verify(sae, run_config, target, config, partial, progress)
        names = [(layer, str(folder)) for layer, folder in folders]
        page = readme(run_config, target, names, lost, differences, origin)
        (partial / "README.md").write_text(page, "utf-8")
    return ExportResult(
        out=config.out,
        layers=tuple(layer for layer, _ in folders),
        limits=lost,
        differences=differences,
        origin=origin,
    )


def _check(run: Path, run_config: RunConfig, target: Format) -> None:
    sae = run_config.sae
    if sae.selector == "all":
        raise ExportError(
            f"{run} is a crosscoder: it codes {len(sae.layers)} layers at once, and "
            f"{target.title} has SAEs on one layer each; it cannot be exported"
        )
    if sae.selector == "route" and not sae.hard:
        raise ExportError(
            f"{run} routes softly: its coder reads a mixture of {len(sae.layers)} layers, which "
            "no single hook gives; only hard routing can be exported"
        )
    if why := target.refusal(run_config):
        raise ExportError(f"{run} cannot be exported to {target.title}: {why}")


def _verify(
    sae: Sae,
    run_config: RunConfig,
    target: Format,
    config: ExportConfig,
    out: Path,
    progress: Callable[[int, int], None],
) -> tuple[list[Difference], str]:
    activations = gather(run_config, sae, config.store, config.tokens)
    comparison = Comparison(sae, run_config, activations)
    differences = []
    folders = folders_of(run_config)
    for index, (_, folder) in enumerate(folders):
        differences.append(comparison.layer(index, target.load(out / folder)))
        progress(index + 1, len(folders))
    return differences, activations.origin
