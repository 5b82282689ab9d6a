"""`routesae sweep`: a store and a file that describes many SAEs -> all of them, trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.console import err
from cli.options import (
    CacheDir,
    CacheGb,
    Device,
    EndpointUrl,
    GpusPerWorker,
    Ray,
    StoreArgument,
    Workers,
    open_cached,
    pick_device,
    ray_config,
)
from cli.training import (
    Log,
    Nproc,
    Replace,
    Resume,
    SoFar,
    WandbGroup,
    WandbMode,
    WandbName,
    WandbProject,
    log_config,
    run_pass,
)


def sweep(
    store: StoreArgument,
    file: Annotated[
        Path,
        typer.Argument(
            help="TOML: \\[train] with options of `train`, several [\\[sae]], each with sae = NAME "
            "and its options; a list makes a grid.",
            metavar="SWEEP.toml",
        ),
    ],
    target: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for the runs  \\[default: runs/ and the file's name]"),
    ] = None,
    device: Device = "auto",
    nproc: Nproc = 1,
    ray: Ray = None,
    workers: Workers = None,
    gpus_per_worker: GpusPerWorker = None,
    so_far: SoFar = False,
    resume: Resume = False,
    replace: Replace = False,
    log: Log = None,
    wandb_project: WandbProject = None,
    wandb_name: WandbName = None,
    wandb_group: WandbGroup = None,
    wandb_mode: WandbMode = None,
    endpoint_url: EndpointUrl = None,
    cache_dir: CacheDir = None,
    cache_gb: CacheGb = None,
) -> None:
    """Train all SAEs that a file describes in one pass over a store."""
    cluster = ray_config(ray, workers, gpus_per_worker, device)
    with err.status("Reading the sweep"):
        from routesae_cache.sweep import read_sweep
        from routesae_cache.train_plan import TrainConfig

        described = read_sweep(file)
        config = TrainConfig(
            out=target or Path("runs") / file.stem,
            device=cluster.device if cluster else pick_device(device),
            so_far=so_far,
            resume=resume,
            replace_changed=replace,
            log=log_config(
                log,
                wandb_project=wandb_project,
                wandb_name=wandb_name,
                wandb_group=wandb_group,
                wandb_mode=wandb_mode,
            ),
            **described.train,
        )
    place = open_cached(store, cache_dir, cache_gb)
    run_pass(place, described.specs, config, nproc, cluster)
