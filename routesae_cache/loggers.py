"""Where a run's metrics go: JSON lines always, Weights & Biases and TensorBoard when asked for.

All of them lie in the run's own directory, so a run that moves or is deleted takes them along.
"""

from __future__ import annotations

import importlib.util
import logging
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from routesae_cache.checkpoint import METRICS, RunConfig, RunError
from routesae_cache.json_files import (
    DamagedJsonError,
    json_line,
    parse_json,
    read_json,
    write_json,
)
from routesae_cache.whole_files import whole_file

logger = logging.getLogger(__name__)

Record = Mapping[str, Any]
"""A line of metrics: numbers, lists with a number for each of the SAE's layers, or objects."""
RunStatus = Literal["training", "done", "failed", "interrupted"]
WandbMode = Literal["online", "offline", "disabled"]

WANDB_FILE = "wandb.json"
TENSORBOARD_FOLDER = "tensorboard"
_ALWAYS = ("step", "loss", "nmse", "l0", "dead_share", "seconds")  # in every line
_CHART_EVERY = 20  # lines from one bar chart to the next


class LoggerError(ValueError):
    """A logger that cannot be had, or that stopped working."""


class Logger(Protocol):
    """Takes the metrics of one run."""

    def log(self, record: Record) -> None:
        """Add a line; `step` counts up, also over a resumed run."""

    def finish(self, status: RunStatus) -> None:
        """Close, once; `training` where an error ended the pass."""


OpenLogger = Callable[[Path, RunConfig, int], Logger]
"""Opens a run's logger: its directory, its configuration, the steps it has taken."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Loggers beside the JSON lines."""

    to: tuple[str, ...] = ()
    """Keys of `LOGGERS`."""
    wandb_project: str = "routesae"
    wandb_name: str = "{run}"
    """`{run}` stands for the name of the run's directory."""
    wandb_group: str | None = None
    wandb_mode: WandbMode | None = None
    """None: as the environment says, online without it."""

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.to) - set(LOGGERS)):
            raise ValueError(
                f"there is no logger {', '.join(unknown)}; there are {', '.join(LOGGERS)} "
                "(JSON lines are always written)"
            )
        if self.wandb_mode is not None and self.wandb_mode not in get_args(WandbMode):
            modes = ", ".join(get_args(WandbMode))
            raise ValueError(f"wandb mode: expected one of {modes}, found {self.wandb_mode!r}")


def prepare_loggers(config: LogConfig, runs: int) -> list[OpenLogger]:
    """Check what can be checked before any work, for a pass over so many runs.

    Raises:
        ValueError: where a package is missing (with what to install), nobody is logged in, or
            several runs would have one name.
    """
    if "wandb" in config.to and runs > 1 and "{run}" not in config.wandb_name:
        raise ValueError(
            f"{runs} runs would all be called {config.wandb_name!r}; put {{run}} into the name, "
            "it stands for the name of a run's directory"
        )
    return [LOGGERS[name](config) for name in dict.fromkeys(config.to)]


class JsonLinesLogger:
    """`metrics.jsonl`: a line for each record."""

    def __init__(self, folder: Path, step: int) -> None:
        """Goes on after the lines up to `step`; later ones, of a lost checkpoint, are dropped."""
        self._path = folder / METRICS
        kept = [record for record in read_metrics(folder) if record["step"] <= step]
        self.seconds = float(kept[-1]["seconds"]) if kept else 0.0
        """Training time that the kept lines account for."""
        with whole_file(self._path) as temporary:
            temporary.write_bytes(b"".join(map(json_line, kept)))

    def log(self, record: Record) -> None:
        with self._path.open("ab") as file:
            file.write(json_line(record))

    def finish(self, status: RunStatus) -> None:
        """Every line is on disk already."""


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`, none where there is no such file.

    A last line that was cut off while it was written is passed over; RunError for any other that
    is damaged.
    """
    path = folder / METRICS
    records: list[dict[str, Any]] = []
    *lines, cut = path.read_bytes().split(b"\n") if path.exists() else [b""]
    for number, line in enumerate(lines, 1):
        try:
            records.append(_metrics(parse_json(line)))
        except DamagedJsonError as error:
            raise RunError(
                f"{path}, line {number}: {error}; remove the line, or the file to do without it"
            ) from error
    with suppress(DamagedJsonError):
        records += [_metrics(parse_json(cut))]
    return records


def _metrics(record: Any) -> dict[str, Any]:
    known = record if isinstance(record, dict) else {}
    if odd := [key for key in _ALWAYS if type(known.get(key)) not in (int, float)]:
        raise DamagedJsonError(f"expected metrics, found no number for {', '.join(odd)}")
    return known


def scalars(record: Record, layers: Sequence[int]) -> dict[str, float]:
    """A record's numbers under flat names: `terms/l1`, and `layer_use/12` for a value per layer."""
    flat: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}/{name}": number for name, number in value.items()}
        elif isinstance(value, list):
            flat |= {f"{key}/{layer}": x for layer, x in zip(layers, value, strict=True)}
        else:
            flat[key] = value
    return flat


class _TensorBoardLogger:
    """Event files in the run's `tensorboard/`."""

    def __init__(self, folder: Path, config: RunConfig, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._layers = config.sae.layers
        self._writer: Any = SummaryWriter(
            str(folder / TENSORBOARD_FOLDER),
            purge_step=step + 1 if step else None,  # hides what a lost checkpoint's steps wrote
        )

    def log(self, record: Record) -> None:
        numbers = scalars(record, self._layers)
        step = numbers.pop("step")
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def finish(self, status: RunStatus) -> None:
        self._writer.close()


def _prepare_tensorboard(_: LogConfig) -> OpenLogger:
    _need("tensorboard")
    return _TensorBoardLogger


class _WandbLogger:
    """A run of Weights & Biases, whose files are in the run's `wandb/`."""

    def __init__(self, options: LogConfig, folder: Path, config: RunConfig) -> None:
        import wandb

        self._wandb, self._layers = wandb, config.sae.layers
        self._lines, self._use_L = 0, list[float]()
        with _named_errors(wandb.Error):
            self._run = wandb.init(
                project=options.wandb_project,
                name=options.wandb_name.replace("{run}", config.name),
                group=options.wandb_group,
                id=_wandb_id(folder),
                resume="allow",
                mode=options.wandb_mode,
                dir=str(folder),
                config=config.to_dict(),
                reinit="create_new",  # runs of one pass live side by side
                settings=wandb.Settings(console="off", silent=True),
            )
        # own steps, so that lines that a resumed run repeats fall onto the ones before
        self._run.define_metric("*", step_metric="step")
        self._announce()

    def log(self, record: Record) -> None:
        values: dict[str, Any] = dict(scalars(record, self._layers))
        self._use_L = record.get("layer_use") or []
        if self._use_L and self._lines % _CHART_EVERY == 0:
            values |= self._chart()
        self._lines += 1
        self._send(values)

    def finish(self, status: RunStatus) -> None:
        if self._use_L:
            self._send(self._chart())
        with _named_errors(self._wandb.Error):
            self._run.finish(exit_code=0 if status == "done" else 1)

    def _send(self, values: dict[str, Any]) -> None:
        with _named_errors(self._wandb.Error):
            self._run.log(values)

    def _chart(self) -> dict[str, Any]:
        rows = [[f"{layer:02}", use] for layer, use in zip(self._layers, self._use_L, strict=True)]
        table = self._wandb.Table(columns=["layer", "share"], data=rows)
        title = "Share of tokens read from each layer"
        return {"layer use": self._wandb.plot.bar(table, "layer", "share", title=title)}

    def _announce(self) -> None:
        if self._run.disabled:
            return
        if self._run.offline:
            folder = Path(self._run.dir).parent
            logger.info("wandb: offline; `wandb sync %s` sends it later", folder)
        else:
            logger.info("wandb: %s", self._run.url)


@contextmanager
def _named_errors(error_kind: type[Exception]) -> Iterator[None]:
    try:
        yield
    except (error_kind, ConnectionError) as error:
        raise LoggerError(f"wandb: {error}; --resume goes on with the runs") from error


def _wandb_id(folder: Path) -> str:
    """The same for a resumed run, another for a run that is trained anew."""
    path = folder / WANDB_FILE
    if not path.exists():
        write_json(path, {"id": uuid.uuid4().hex[:12]})
    record = read_json(path)
    found = record.get("id") if isinstance(record, dict) else None
    if not isinstance(found, str) or not found.isalnum():
        raise RunError(f"{path}: expected the id of a run of wandb, found {found!r}; remove it")
    return found


def _prepare_wandb(config: LogConfig) -> OpenLogger:
    _need("wandb")
    import wandb

    try:
        if (config.wandb_mode or wandb.setup().settings.mode) == "online":
            wandb.login(verify=True)
    except wandb.Error as error:
        raise ValueError(
            f"wandb: {error} (--wandb-mode offline needs no account and no network)"
        ) from error
    return lambda folder, run, _: _WandbLogger(config, folder, run)


def _need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f"--log {package} needs a package that is not installed; "
            f"run `pip install 'routesae-cache[{package}]'`"
        )


LOGGERS: Mapping[str, Callable[[LogConfig], OpenLogger]] = {
    "wandb": _prepare_wandb,
    "tensorboard": _prepare_tensorboard,
}
"""Name -> what checks that a logger can be had, and returns what opens it for a run."""
