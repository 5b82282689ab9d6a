"""What two processes do together, for the tests to look at what they leave behind."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from routesae_cache import parallel
from routesae_cache.devices import own_cores
from routesae_cache.parallel import PeerError, World
from routesae_cache.runs import Run
from routesae_cache.saes.config import SaeConfig
from routesae_cache.saes.sae import Sae
from routesae_cache.train import TrainResult, train
from routesae_cache.train_plan import TrainConfig
from stores.reader import StoreReader
from tests.sae_grid import CODERS, SELECTORS
from tests.store_helpers import chunk_file

STEPS, STOP_AT, FAILS_FROM = 10, 4, 6
BATCH_TOKENS = 128
F, D = 96, 8  # of the matrices that `primitives` sums


def sae(selector: str, coder: str, **changes: Any) -> SaeConfig:
    """Of the grid, with few latents active, so that some die and are revived."""
    options = {"layers": (1, 2, 3), "latents": 64, "dead_window_tokens": 256}
    config = options | {"selector": "all"} | SELECTORS.get(selector, {}) | CODERS[coder] | changes
    return SaeConfig(**config | ({"layers": (3,)} if selector == "fixed" else {}))


SAES = (
    sae("fixed", "topk", k=2, auxk=8),
    sae("route-score", "topk", init_bias="mean"),
    sae("fixed", "batchtopk", k=2, auxk=8),
    sae("fixed", "jumprelu"),
    sae("fixed", "gated"),
    sae("crosscoder", "relu", crosscoder_weighting="decoder-norm"),
)
FAILING = sae("fixed", "relu")


def go(world: World, store: Path, out: Path, **options: Any) -> TrainResult:
    """The pass that is compared, or part of it."""
    stopped = options.pop("stopped", lambda: False)
    sizes: dict[str, Any] = {
        "tokens": STEPS * BATCH_TOKENS,
        "batch_tokens": BATCH_TOKENS,
        "log_every": 5,
        "lr": 2e-3,
        "so_far": True,
    }
    asked = [(each, 3) for each in (*SAES, FAILING)]
    config = TrainConfig(out=out, **sizes | options)
    return train(StoreReader(store), asked, config, stopped=stopped, world=world)


def work(store: Path, folder: Path) -> None:
    """One of two processes."""
    torch.set_num_threads(1)
    parallel._SMALL = 256  # so that these small matrices are summed as large ones are
    with parallel.join("cpu") as (world, _):
        torch.save(primitives(world), folder / f"primitives{world.rank}.pt")
        train_and_keep(world, store, folder)
        torch.save(refusals(world), folder / f"refusals{world.rank}.pt")
        if not world.leads:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            world.wait()
        except PeerError as error:
            (folder / "lost.txt").write_text(str(error))
            raise SystemExit(75) from None


def train_and_keep(world: World, store: Path, folder: Path) -> None:
    """Stop on one process's word, go on, and keep what each process ended with."""
    end, forward = Run.end, Sae.forward

    def ended(run: Run) -> None:
        end(run)
        save_file(run.sae.state_dict(), folder / f"{run.config.name}.{world.rank}")

    def forward_or_fail(sae: Sae, x_NLD: torch.Tensor) -> Any:
        output = forward(sae, x_NLD)
        bad = sae.config == FAILING and int(sae.step) >= FAILS_FROM and not world.leads
        return output._replace(loss=output.loss * float("inf")) if bad else output

    Run.end, Sae.forward = ended, forward_or_fail  # type: ignore[method-assign]
    steps = iter(range(1, STOP_AT + 1))

    def stopped() -> bool:
        return next(steps) == STOP_AT and not world.leads

    first = go(world, store, folder / "two", stopped=stopped, checkpoint_seconds=0)
    world.first(lambda: _commit_the_rest(store))
    second = go(world, store, folder / "two", resume=True)
    report = [first.tokens, second.tokens, [state.status for state in second.runs]]
    torch.save(report, folder / f"results{world.rank}.pt")


def _commit_the_rest(store: Path) -> None:
    reader = StoreReader(store)
    assert len(reader.prefix("all")) < reader.committed[-1]
    for chunk in set(range(reader.spec.chunks)) - set(reader.committed):
        shutil.copy(chunk_file(store, "committed", 0), store / "committed" / "c" / str(chunk))


def pair(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of one process: gradients with rows of zeros, and values to choose the largest of."""
    generator = torch.Generator().manual_seed(rank)
    sparse_FD, dense_FD = torch.randn(2, F, D, generator=generator)
    sparse_FD[torch.rand(F, generator=generator) < 0.7] = 0
    return sparse_FD, dense_FD, torch.randn(4, F, generator=generator) + rank


def primitives(world: World) -> dict[str, Any]:
    """What the world makes of `pair`, and how many elements it summed at a time."""
    *gradients, value_MF = pair(world.rank)
    parameters = [torch.zeros_like(each, requires_grad=True) for each in (*gradients, value_MF[0])]
    targets = (*gradients, value_MF[0])
    loss = sum((p * g).sum() for p, g in zip(parameters, targets, strict=True)) + world.rank
    sizes: list[int] = []
    reduce = parallel._Group._reduce

    def counted(self: Any, value: torch.Tensor, operation: Any) -> None:
        if value.is_floating_point():
            sizes.append(value.numel())
        reduce(self, value, operation)

    parallel._Group._reduce = counted  # type: ignore[method-assign]
    mean_loss = world.backward(loss, parameters)  # type: ignore[arg-type]
    parallel._Group._reduce = reduce  # type: ignore[method-assign]
    worst_MF = torch.where(value_MF > 1.5, float("nan"), value_MF)
    return {
        "loss": mean_loss,
        "gradients": [p.grad for p in parameters],
        "sizes": sizes,
        "top": world.batch_top(value_MF, 20),
        "top of ties": world.batch_top(value_MF.round(), 20),
        "top of nan": world.batch_top(worst_MF, 100),
        "first": world.first(lambda: f"of {world.rank}"),
        "cores": own_cores(),
        "any": [world.any(flag) for flag in (False, world.leads, not world.leads)],
    }


def refusals(world: World) -> list[str]:
    """How an error that this or that process finds looks in each."""
    found = []
    for failing in ([0], [1], [0, 1]):
        try:
            with world.together():
                if world.rank in failing:
                    raise ValueError(f"mistake of {world.rank}")
        except (ValueError, PeerError) as error:
            found.append(f"{type(error).__name__}: {error}")
    return found
