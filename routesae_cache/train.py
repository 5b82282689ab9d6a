"""Training any number of SAEs in lockstep, from one stream of batches."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from routesae_cache.batches import BatchConfig, BatchSource, Norm, first_tokens
from routesae_cache.checkpoint import (
    CONFIG,
    FAILED,
    METRICS,
    WEIGHTS,
    RunConfig,
    RunError,
    load_checkpoint,
    read_config,
    save_checkpoint,
    save_weights,
    write_json,
)
from routesae_cache.losses import normalise_scalar, normalise_token
from routesae_cache.optim import build_optimizer, lr_factor, set_lr
from routesae_cache.saes.config import SaeConfig
from routesae_cache.saes.output import SaeOutput
from routesae_cache.saes.registry import build_sae, short_name
from stores.reader import StoreReader
from stores.stats import split_stats

logger = logging.getLogger(__name__)
_BIAS_SAMPLE = 2048
_LARGEST_BATCH, _SMALLEST_BATCH, _FEWEST_STEPS = 32768, 256, 1000


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What all SAEs of a pass share."""

    out: Path
    """Each run becomes a directory in it."""
    epochs: int = 1
    tokens: int | None = None
    """Stop after so many tokens; None: after all of them, `epochs` times."""
    batch_tokens: int | None = None
    """None: 64 rows of 512 as in the paper, or what leaves a small store about 1000 steps."""
    lr: float = 5e-4
    seed: int = 42
    device: str = "cpu"
    resume: bool = False
    """Go on with runs that were interrupted, and leave those that have ended alone."""
    log_every: int | None = None
    """Steps between lines of metrics.jsonl; None: about 200 lines a run."""
    checkpoint_seconds: float = 120.0

    def __post_init__(self) -> None:
        for name in ("epochs", "tokens", "batch_tokens", "log_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, found {value}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr: expected a positive number, found {self.lr}")


@dataclass(frozen=True)
class RunState:
    """How one SAE of the pass is doing."""

    name: str
    status: Literal["training", "done", "failed"]
    step: int
    nmse: float
    l0: float
    dead_share: float


@dataclass(frozen=True)
class TrainProgress:
    """How far a pass is."""

    step: int
    total_steps: int
    tokens: int
    runs: Sequence[RunState]


@dataclass(frozen=True)
class TrainResult:
    """What a pass did."""

    runs: Sequence[RunState]
    folders: Sequence[Path]
    tokens: int
    """Read in this call."""
    seconds: float


Progress = Callable[[TrainProgress], None]


def train(
    reader: StoreReader,
    saes: Sequence[tuple[SaeConfig, int]],
    config: TrainConfig,
    progress: Progress = lambda _: None,
) -> TrainResult:
    """Train each (configuration, seed) on the store's train split, all from the same batches.

    A run whose loss is not finite is stopped and marked, the others go on. Raises RunError where
    a run's directory is there already with other settings, or unfinished without `resume`.
    """
    plan = _Plan(reader, saes, config)
    folders = [config.out / c.name for c in plan.runs]
    for folder, run_config in zip(folders, plan.runs, strict=True):
        _check_folder(folder, run_config, config.resume)
    runs = [_Run(f, c, config) for f, c in zip(folders, plan.runs, strict=True)]
    live = [run for run in runs if run.state.status == "training"]
    if not live:
        return TrainResult([run.state for run in runs], folders, 0, 0.0)
    plan.initialise_biases([run for run in live if run.step == 0])
    begin, start = time.perf_counter(), min(run.step for run in live)
    with plan.source.batches(start) as batches:
        _loop(plan, live, runs, batches, start, progress)
    seconds = time.perf_counter() - begin
    tokens = (plan.total_steps - start) * plan.batch_tokens
    return TrainResult([run.state for run in runs], folders, tokens, seconds)


class _Plan:
    """Settings that follow from the store and the SAEs together."""

    def __init__(
        self,
        reader: StoreReader,
        saes: Sequence[tuple[SaeConfig, int]],
        config: TrainConfig,
    ) -> None:
        self.reader, self.config = reader, config
        self.layers = tuple(sorted({layer for sae, _ in saes for layer in sae.layers}))
        self.norm: Norm = "token" if all(s.norm == "token" for s, _ in saes) else "none"
        everything = BatchConfig(
            layers=self.layers,
            batch_tokens=config.batch_tokens or 1,
            norm=self.norm,
            seed=config.seed,
            epochs=config.epochs,
            device=config.device,
        )
        tokens = min(BatchSource(reader, everything).tokens, config.tokens or math.inf)
        self.batch_tokens = config.batch_tokens or _batch_tokens(int(tokens))
        self.total_steps = int(tokens) // self.batch_tokens
        if not self.total_steps:
            raise ValueError(
                f"{int(tokens)} tokens do not fill one batch of {self.batch_tokens}; "
                "ask for smaller --batch-tokens, more --epochs or more --tokens"
            )
        self.source = BatchSource(reader, replace(everything, batch_tokens=self.batch_tokens))
        self.log_every = config.log_every or max(1, self.total_steps // 200)
        self.runs = self._run_configs(saes)

    def _run_configs(self, saes: Sequence[tuple[SaeConfig, int]]) -> list[RunConfig]:
        spec = self.reader.spec
        mean_square_L = split_stats(self.reader, "train").mean_square_L
        runs = [
            RunConfig(
                name=run_name(sae, seed),
                sae=sae,
                width=spec.width,
                seed=seed,
                lr=self.config.lr,
                batch_tokens=self.batch_tokens,
                total_steps=self.total_steps,
                epochs=self.config.epochs,
                store=str(self.reader.path),
                store_spec=spec.to_dict(),
                mean_square=float(mean_square_L[list(spec.positions(sae.layers))].mean()),
            )
            for sae, seed in saes
        ]
        names = [run.name for run in runs]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"the same SAE is asked for twice: {', '.join(twice)}")
        return runs

    def initialise_biases(self, runs: Sequence[_Run]) -> None:
        """Start b_pre from a sample of the data, where a run asks for it."""
        if all(run.config.sae.init_bias == "zero" for run in runs):
            return
        sample_NLD = first_tokens(
            self.reader,
            self.layers,
            "train",
            _BIAS_SAMPLE,
            norm=self.norm,
            seed=self.config.seed,
        ).to(self.config.device)
        for run in runs:
            run.sae.initialise_bias(run.view(sample_NLD, self))


class _Run:
    """One SAE of the pass with its optimiser, its place and its files."""

    def __init__(self, folder: Path, config: RunConfig, train_config: TrainConfig) -> None:
        self.folder, self.config = folder, config
        ended = (folder / WEIGHTS).exists()
        self.state = RunState(
            config.name, "done" if ended else "training", 0, math.nan, math.nan, 0
        )
        if ended:
            return
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CONFIG, config.to_dict())
        (folder / FAILED).unlink(missing_ok=True)
        sae = build_sae(config.sae, config.width, config.seed)
        self.sae = sae.to(train_config.device).train()
        self.optimizer = build_optimizer(self.sae.parameters(), config.lr)
        self.step = load_checkpoint(folder, self.sae, self.optimizer)
        self.seconds = _drop_metrics_after(folder / METRICS, self.step)

    def view(self, x_NLD: Tensor, plan: _Plan) -> Tensor:
        """The layers this SAE reads, normalised as it asks."""
        sae = self.config.sae
        if sae.layers != plan.layers:
            wanted = [plan.layers.index(layer) for layer in sae.layers]
            first, last = wanted[0], wanted[-1]
            contiguous = last - first + 1 == len(wanted)
            x_NLD = x_NLD[:, first : last + 1] if contiguous else x_NLD[:, wanted]
        if plan.norm == "token" or sae.norm == "none":
            return x_NLD
        if sae.norm == "token":
            return normalise_token(x_NLD).x
        return normalise_scalar(x_NLD, self.config.mean_square)

    def update(self, x_NLD: Tensor) -> SaeOutput:
        """One training step."""
        set_lr(self.optimizer, self.config.lr * lr_factor(self.step, self.config.total_steps))
        output: SaeOutput = self.sae(x_NLD)
        output.loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.sae.after_step(self.step)
        return output

    def log(self, output: SaeOutput, seconds: float) -> None:
        """Append a line of metrics; gives the run up where its loss is not finite."""
        loss = float(output.loss.detach())
        record = _metrics(self, output) | {"seconds": round(self.seconds + seconds, 3)}
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        finite = math.isfinite(loss)
        self.state = RunState(
            self.config.name,
            "training" if finite else "failed",
            self.step,
            record["nmse"],
            record["l0"],
            record["dead_share"],
        )
        if not finite:
            reason = f"the loss was {loss} at step {self.step}"
            write_json(self.folder / FAILED, {"step": self.step, "reason": reason})
            logger.error("%s: %s; the run was stopped", self.config.name, reason)

    def end(self) -> None:
        """Write the finished SAE."""
        self.sae.finish()
        save_weights(self.folder, self.sae)
        self.state = replace(self.state, status="done")


def _loop(
    plan: _Plan,
    live: list[_Run],
    runs: list[_Run],
    batches: Any,
    start: int,
    progress: Progress,
) -> None:
    began = saved = time.perf_counter()
    for number, batch in zip(range(start, plan.total_steps), batches, strict=False):
        logging_step = (number + 1) % plan.log_every == 0 or number + 1 == plan.total_steps
        for run in live:
            if run.step > number:  # its checkpoint is newer than another's
                continue
            output = run.update(run.view(batch.x_NLD, plan))
            if logging_step:
                run.log(output, time.perf_counter() - began)
        live = [run for run in live if run.state.status == "training"]
        if not live:
            break
        if time.perf_counter() - saved > plan.config.checkpoint_seconds:
            for run in live:
                save_checkpoint(run.folder, run.sae, run.optimizer, run.step)
            saved = time.perf_counter()
        done = number + 1
        progress(
            TrainProgress(
                done, plan.total_steps, done * plan.batch_tokens, [run.state for run in runs]
            )
        )
    for run in live:
        run.end()


def run_name(sae: SaeConfig, seed: int) -> str:
    """Directory name of a run: its architecture, what sets it apart, sizes and seed."""
    _, *details = sae.name.split(" ")
    parts = [short_name(sae.selector, sae.coder), *(d.replace("=", "") for d in details)]
    if sae.norm != "token":
        parts.append(sae.norm)
    return "_".join([*parts, f"f{sae.latents}", f"s{seed}"])


def _batch_tokens(tokens: int) -> int:
    wanted = 1 << int(math.log2(max(tokens / _FEWEST_STEPS, 1)))
    return min(max(wanted, _SMALLEST_BATCH), _LARGEST_BATCH)


def _check_folder(folder: Path, config: RunConfig, resume: bool) -> None:
    if not folder.exists():
        parent = folder.parent
        parent.mkdir(parents=True, exist_ok=True)
        if not os.access(parent, os.W_OK):
            raise RunError(f"{parent} cannot be written to")
        return
    if not (folder / CONFIG).exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise RunError(f"{folder} is there already and is not a run; choose another --out")
    if (folder / CONFIG).exists():
        if differences := read_config(folder).differences(config):
            raise RunError(
                f"{folder} was trained with other settings; choose another --out or remove it:\n  "
                + "\n  ".join(differences)
            )
        if not resume:
            state = "has ended" if (folder / WEIGHTS).exists() else "was interrupted"
            raise RunError(
                f"{folder}: this run {state}; --resume goes on with interrupted runs and "
                "leaves ended ones alone"
            )


def _drop_metrics_after(path: Path, step: int) -> float:
    """Keep the lines up to a step; returns the seconds of training they account for."""
    if not path.exists():
        return 0.0
    kept = []
    for line in path.read_text("utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # the last line, cut off by a kill
            break
        if record["step"] <= step:
            kept.append(record)
    path.write_text("".join(json.dumps(record) + "\n" for record in kept), "utf-8")
    return float(kept[-1]["seconds"]) if kept else 0.0


def _metrics(run: _Run, output: SaeOutput) -> dict[str, Any]:
    sae, config = run.sae, run.config
    n_tokens = config.batch_tokens
    dead_F = sae.tokens_since_fired_F >= sae.config.dead_window_tokens
    record: dict[str, Any] = {
        "step": run.step,
        "tokens": run.step * n_tokens,
        "lr": run.optimizer.param_groups[0]["lr"],
        "loss": float(output.loss.detach()),
        "nmse": float(output.nmse_M.mean()),
        "l0": float(output.latents.l0_M().float().mean()),
        "dead_share": float(dead_F.float().mean()),
        "terms": {name: float(value) for name, value in output.terms.items()},
    }
    if output.router_NL is not None:
        p_NL = output.router_NL
        record["router_entropy"] = float(torch.special.entr(p_NL).sum(-1).mean())
        record["router_share"] = p_NL.mean(0).tolist()
    if output.layer_M is not None and len(config.sae.layers) > 1:
        use_L = torch.bincount(output.layer_M, minlength=len(config.sae.layers))
        record["layer_use"] = (use_L / output.layer_M.numel()).tolist()
    return record
