"""Options that several commands have, and what they mean together."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

if TYPE_CHECKING:
    from routesae_cache.ray_cluster import RayConfig
    from routesae_cache.sources import ModelSource
    from stores.codecs import ResidualCodec
    from stores.place import Place

Name = TypeVar("Name", str, str | None)


class CodecKind(StrEnum):
    """The store's codecs; which one does what is in docs/STORE_FORMAT.md."""

    bf16 = "bf16"
    int8 = "int8"
    delta = "delta"


def _set_endpoint(url: str | None) -> str | None:
    if url is not None:
        if not url.startswith(("http://", "https://")):
            raise typer.BadParameter(f"expected http://… or https://…, found {url!r}")
        os.environ["AWS_ENDPOINT_URL"] = url  # of every store that the command opens
    return url


StoreArgument = Annotated[
    str, typer.Argument(help="An activation store: a path or a URL.", metavar="STORE")
]
EndpointUrl = Annotated[
    str | None,
    typer.Option(
        help="Server for stores at s3://…  \\[default: Amazon's, or AWS_ENDPOINT_URL]",
        callback=_set_endpoint,
    ),
]
CacheDir = Annotated[
    Path | None, typer.Option(help="Keep chunks that were read in this folder, for later epochs.")
]
CacheGb = Annotated[
    float | None, typer.Option(help="--cache-dir: its size at most, in GB  \\[default: 100]")
]
Codec = Annotated[CodecKind, typer.Option(help="How residuals are compressed.")]
Step = Annotated[
    float | None,
    typer.Option(help="delta: quantisation step in standard deviations  \\[default: 0.2]"),
]
KeyframeEvery = Annotated[
    int | None,
    typer.Option(help="delta: layers between keyframes; 0: the first alone  \\[default: 0]"),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
Revision = Annotated[str | None, typer.Option(help="Commit of a hub model that --model names.")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run the code that comes with the model that --model names: it can do whatever you "
        "can. Read it first, and choose its --revision.",
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]
Ray = Annotated[
    str | None,
    typer.Option(metavar="local|ADDRESS", help="Share the work on a Ray cluster: local, auto."),
]
Workers = Annotated[int | None, typer.Option(help="--ray: processes that work  \\[default: 1]")]
GpusPerWorker = Annotated[
    float | None, typer.Option(help="--ray: GPUs of each worker  \\[default: 0]")
]


def build_codec(kind: CodecKind, step: float | None, keyframe_every: int | None) -> ResidualCodec:
    """The codec that the options describe; ValueError for options of another codec."""
    from stores.codecs import codec_from_dict

    given = {"step": step, "keyframe_every": keyframe_every}
    parameters = {name: value for name, value in given.items() if value is not None}
    if parameters and kind is not CodecKind.delta:
        names = " and ".join(f"--{name.replace('_', '-')}" for name in parameters)
        raise ValueError(f"{names} belongs to --codec delta, not to {kind.value}; leave it out")
    return codec_from_dict({"kind": kind.value, **parameters})


def chosen_model(model: Name, revision: str | None, trust_remote_code: bool) -> Name | ModelSource:
    """The model that the options choose; ValueError where they are about one that none names.

    Whose code is run is never up to a store, which may be by others: neither model nor revision.
    """
    if revision is None and not trust_remote_code:
        return model
    if model is None:
        option = "--trust-remote-code" if trust_remote_code else "--revision"
        raise ValueError(f"{option} is about the model that --model names; add --model")
    from routesae_cache.lm import with_own_code
    from routesae_cache.sources import resolve_model

    source = resolve_model(model, revision=revision)
    return with_own_code(source) if trust_remote_code else source


def pick_device(name: str) -> str:
    """A torch device's name; ValueError where it cannot be used here."""
    from routesae_cache.devices import resolve_device

    return resolve_device(name)


def ray_config(
    ray: str | None, workers: int | None, gpus_per_worker: float | None, device: str
) -> RayConfig | None:
    """What the options about Ray mean together; ValueError where they mean nothing."""
    if ray is None:
        for name, value in (("--workers", workers), ("--gpus-per-worker", gpus_per_worker)):
            if value is not None:
                raise ValueError(f"{name} belongs to --ray; add --ray local or an address")
        return None
    if device != "auto":
        raise ValueError("--device: with --ray leave it out, --gpus-per-worker says it")
    from routesae_cache.ray_cluster import RayConfig

    return RayConfig(
        address=ray,
        workers=1 if workers is None else workers,
        gpus_per_worker=gpus_per_worker or 0.0,
    )


def open_cached(store: str, folder: Path | None, gigabytes: float | None) -> Place:
    """A store's place, with what is read of it kept in a folder if there is one to be."""
    from stores.cache import CachedPlace
    from stores.places import as_place

    if folder is None:
        if gigabytes is not None:
            raise ValueError("--cache-gb belongs to --cache-dir; name a folder")
        return as_place(store)
    return CachedPlace(as_place(store), folder, 100.0 if gigabytes is None else gigabytes)
