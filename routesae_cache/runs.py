"""One SAE of a training pass: its name, its directory, its steps and what they measured."""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from routesae_cache.batches import Norm
from routesae_cache.checkpoint import (
    CHECKPOINT,
    CONFIG,
    FAILED,
    WEIGHTS,
    RunConfig,
    RunError,
    load_checkpoint,
    read_config,
    save_checkpoint,
    save_weights,
)
from routesae_cache.json_files import write_json
from routesae_cache.loggers import JsonLinesLogger, Logger, OpenLogger, RunStatus, read_metrics
from routesae_cache.losses import normalise_scalar, normalise_token
from routesae_cache.optim import build_optimizer, lr_factor, set_lr
from routesae_cache.parallel import ALONE, World
from routesae_cache.saes.config import SaeConfig
from routesae_cache.saes.output import SaeOutput
from routesae_cache.saes.registry import build_sae, short_name
from routesae_cache.whole_files import PARTIAL

logger = logging.getLogger(__name__)
REPLACED = ".replaced"


class Asked(NamedTuple):
    """One SAE that a pass is to train."""

    sae: SaeConfig
    seed: int
    """Of its weights."""
    lr: float | None = None
    """Its own learning rate; None: the pass's."""


@dataclass(frozen=True)
class RunState:
    """How one SAE of the pass is doing; numbers as last logged, NaN before."""

    name: str
    status: RunStatus
    step: int = 0
    loss: float = math.nan
    nmse: float = math.nan
    l0: float = math.nan
    dead_share: float = math.nan

    def after(self, record: Mapping[str, Any]) -> RunState:
        """With the numbers of a line of metrics."""
        names = ("step", "loss", "nmse", "l0", "dead_share")
        return replace(self, **{name: record[name] for name in names})


class Stream(NamedTuple):
    """What a pass's batches are."""

    layers: tuple[int, ...]
    norm: Norm
    device: str


class Run:
    """An SAE in training, with its optimiser, its place and, where this process leads, its files.

    All processes of `world` make the same calls of `update`, `log` and `save`.
    """

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        stream: Stream,
        open_loggers: Sequence[OpenLogger],
        world: World = ALONE,
    ) -> None:
        self.folder, self.config, self._world = folder, config, world
        self.state = RunState(config.name, "training")
        if world.leads:
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / CONFIG).exists():  # its checkpoint has a checksum of what is in there
                write_json(folder / CONFIG, config.to_dict())
        self.sae = build_sae(config.sae, config.width, config.seed).to(stream.device).train()
        self.sae.join(world)
        self.optimizer = build_optimizer(self.sae.parameters(), config.lr)
        self.step = load_checkpoint(folder, self.sae, self.optimizer)
        self._loss = torch.zeros(())
        self._stream, self._index = stream, _index(config.sae.layers, stream.layers)
        self._seconds_before = 0.0
        self._loggers: list[Logger] = []
        if world.leads:
            self._open(open_loggers)

    def _open(self, open_loggers: Sequence[OpenLogger]) -> None:
        lines = JsonLinesLogger(self.folder, self.step)
        self._seconds_before = lines.seconds
        self._loggers.append(lines)
        with ExitStack() as opened:  # if one cannot be opened, those before it are closed
            opened.callback(self.close)
            self._loggers.extend(
                opening(self.folder, self.config, self.step) for opening in open_loggers
            )
            opened.pop_all()

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.sae.parameters())

    def view(self, x_NLD: Tensor) -> Tensor:
        """The layers of a batch that this SAE reads, normalised as it asks."""
        norm = self.config.sae.norm
        x_NLD = x_NLD[:, self._index]
        if self._stream.norm == "token" or norm == "none":
            return x_NLD
        if norm == "token":
            return normalise_token(x_NLD).x
        return normalise_scalar(x_NLD, self.config.mean_square)

    def update(self, x_NLD: Tensor) -> SaeOutput:
        """One training step, on this process's part of a batch."""
        set_lr(self.optimizer, self.config.lr * lr_factor(self.step, self.config.total_steps))
        output: SaeOutput = self.sae(self.view(x_NLD))
        self._loss = self._world.backward(output.loss, self.sae.parameters())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.sae.after_step(self.step)
        return output

    def log(self, output: SaeOutput, seconds: float) -> None:
        """Write a line of metrics; gives the run up where its loss is not finite."""
        record = _metrics(self, output, self._world)
        record["seconds"] = round(self._seconds_before + seconds, 3)
        self.state = self.state.after(record)
        for each in self._loggers:
            each.log(record)
        self._check_finite()

    def save(self) -> None:
        """Write a checkpoint, unless the run turns out to have failed."""
        if self._check_finite() and self._world.leads:
            save_checkpoint(self.folder, self.sae, self.optimizer, self.step)

    def end(self) -> None:
        """Write the finished SAE."""
        self.sae.finish()
        if self._world.leads:
            save_weights(self.folder, self.sae)
        self.state = replace(self.state, status="done")

    def interrupt(self) -> None:
        """Write what `resume` goes on from."""
        self.save()
        if self.state.status == "training":
            self.state = replace(self.state, status="interrupted")

    def close(self) -> None:
        """Tell the loggers how it went."""
        while self._loggers:
            self._loggers.pop().finish(self.state.status)

    def _check_finite(self) -> bool:
        loss = float(self._loss)
        if math.isfinite(loss):
            return True
        reason = f"the loss was {loss} at step {self.step}"
        if self._world.leads:
            write_json(self.folder / FAILED, {"step": self.step, "reason": reason})
        self.state = replace(self.state, status="failed", step=self.step, loss=loss)
        logger.error("%s: %s; the run was stopped", self.config.name, reason)
        return False


def settled(folder: Path, name: str) -> RunState | None:
    """How a run came out that needs no further training; None for one that does."""
    status: RunStatus
    if (folder / WEIGHTS).exists():
        status = "done"
    elif (folder / FAILED).exists():
        status = "failed"
        logger.warning("%s failed before and is left alone; remove %s to repeat it", name, folder)
    else:
        return None
    records = read_metrics(folder)
    state = RunState(name, status)
    return state.after(records[-1]) if records else state


def set_aside_changed(folder: Path, config: RunConfig) -> None:
    """Move a run with other settings into the hidden folder `.replaced` beside it."""
    if not (folder / CONFIG).exists() or not read_config(folder).differences(config):
        return
    numbers = itertools.count(1)
    places = (folder.parent / REPLACED / f"{folder.name}.{number}" for number in numbers)
    place = next(place for place in places if not place.exists())
    place.parent.mkdir(exist_ok=True)
    folder.rename(place)
    logger.info("%s was made with other settings; it is in %s now", folder.name, place)


def remove_leftovers(folder: Path) -> None:
    """Remove what a process that was killed left in a run's directory, which is nobody else's."""
    for pattern in (f"*{PARTIAL}", ".tmp??????"):  # the latter safetensors writes to and renames
        for file in folder.glob(pattern):
            file.unlink()
    if (folder / WEIGHTS).exists():
        (folder / CHECKPOINT).unlink(missing_ok=True)


def check_folder(folder: Path, config: RunConfig, resume: bool) -> None:
    """RunError where a run cannot be kept in a folder because of what is there already."""
    if not folder.exists():
        return
    if not (folder / CONFIG).exists():
        if folder.is_dir() and all(file.suffix == PARTIAL for file in folder.iterdir()):
            return  # nothing, or what is left of one that was killed before it began
        raise RunError(f"{folder} is there already and is not a run; choose another --out")
    if differences := read_config(folder).differences(config):
        raise RunError(
            f"{folder} was trained with other settings; choose another --out or remove it:\n  "
            + "\n  ".join(differences)
        )
    if not resume:
        raise RunError(
            f"{folder}: this run {_how(folder)}; --resume goes on with interrupted runs and "
            "leaves ended and failed ones alone"
        )


def run_name(sae: SaeConfig, seed: int, lr: float | None = None) -> str:
    """Directory name of a run: its architecture, what sets it apart, sizes and seed.

    Args:
        lr: its learning rate, where that is its own.
    """
    _, *details = sae.name.split(" ")
    numbers = (re.sub(r"(?<=\d)=", "-", detail).replace("=", "") for detail in details)
    parts = [short_name(sae.selector, sae.coder), *numbers]
    if sae.norm != "token":
        parts.append(sae.norm)
    if lr is not None:
        parts.append(f"lr{lr:g}")
    return "_".join([*parts, f"f{sae.latents}", f"s{seed}"])


def run_names(asked: Sequence[Asked]) -> list[str]:
    """A name for each run; those that would share one also carry the options that differ.

    Raises:
        ValueError: for SAEs that differ in nothing.
    """
    names = [run_name(*each) for each in asked]
    shared = {name for name, count in Counter(names).items() if count > 1}
    for name in shared:
        same = [i for i, other in enumerate(names) if other == name]
        differing = [
            field.name
            for field in fields(SaeConfig)
            if len({getattr(asked[i].sae, field.name) for i in same}) > 1
        ]
        for i in same:
            details = (_detail(key, getattr(asked[i].sae, key)) for key in differing)
            names[i] = "_".join([name, *details])
    if twice := sorted(name for name, count in Counter(names).items() if count > 1):
        raise ValueError(f"the same SAE is asked for twice: {', '.join(twice)}")
    return names


def _detail(option: str, value: Any) -> str:
    text = "+".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()
    return f"{option.replace('_', '-')}-{text}"


def _how(folder: Path) -> str:
    if (folder / WEIGHTS).exists():
        return "has ended"
    return "failed" if (folder / FAILED).exists() else "was interrupted"


def _index(layers: tuple[int, ...], among: tuple[int, ...]) -> slice | list[int]:
    """Where layers are in a batch: a slice, which copies nothing, where they are neighbours."""
    wanted = [among.index(layer) for layer in layers]
    neighbours = wanted[-1] - wanted[0] + 1 == len(wanted)
    return slice(wanted[0], wanted[-1] + 1) if neighbours else wanted


def _metrics(run: Run, output: SaeOutput, world: World) -> dict[str, Any]:
    sae, config = run.sae, run.config
    dead_F = sae.tokens_since_fired_F >= sae.config.dead_window_tokens
    means = {
        "loss": output.loss.detach(),
        "nmse": output.nmse_M.mean(),
        "l0": output.latents.l0_M().float().mean(),
        "dead_share": dead_F.float().mean(),
    }
    shares: dict[str, Tensor] = {}
    if output.router_NL is not None:
        p_NL = output.router_NL
        means["router_entropy"] = torch.special.entr(p_NL).sum(-1).mean()
        shares["router_share"] = p_NL.mean(0)
    if output.layer_M is not None and len(config.sae.layers) > 1:
        use_L = torch.bincount(output.layer_M, minlength=len(config.sae.layers))
        shares["layer_use"] = use_L / output.layer_M.numel()
    parts = [*means.values(), *output.terms.values(), *shares.values()]
    flat = world.mean(torch.cat([part.view(-1).double() for part in parts]))
    values = iter(flat.tolist())
    return {
        "step": run.step,
        "tokens": run.step * config.batch_tokens,
        "lr": run.optimizer.param_groups[0]["lr"],
        **{name: next(values) for name in means},
        "terms": {name: next(values) for name in output.terms},
        **{name: [next(values) for _ in share] for name, share in shares.items()},
    }
