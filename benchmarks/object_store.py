"""Training from an object store on loopback, with a warm local cache and without, and from disk.

The server is moto's, in a process of its own on the same cores; it keeps the store in memory
(`--tokens` of residuals, 3 MB a thousand). `python -m benchmarks.object_store --rounds 1
--tokens 16384` tries it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.common import FOLDER, interleaved, recoded, show, spread
from routesae_cache.kernels import keep_freed_memory
from routesae_cache.saes.config import SaeConfig
from routesae_cache.train import train
from routesae_cache.train_plan import TrainConfig
from stores.cache import CachedPlace
from stores.codecs import DeltaCodec
from stores.copy import copy_store
from stores.place import Place
from stores.places import as_place
from stores.reader import StoreReader

ROUNDS, TOKENS, BATCH_TOKENS, CACHE_GB = 5, 65_536, 2048, 4.0
BUCKET = "bench"
SAE = SaeConfig(selector="route", coder="topk", layers=tuple(range(7, 23)), latents=2304, k=32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    asked = parser.parse_args()
    keep_freed_memory()
    local = as_place(recoded(DeltaCodec(), "delta-0.20"))
    cache = FOLDER / "object-cache"
    shutil.rmtree(cache, ignore_errors=True)
    with _server():
        remote = as_place(f"s3://{BUCKET}/delta-0.20.zarr")
        copy_store(local, remote)
        cached = CachedPlace(remote, cache, CACHE_GB)
        cold = _rate(cached, asked.tokens)
        rows = interleaved(
            asked.rounds,
            [lambda place=place: _rate(place, asked.tokens) for place in (local, cached, remote)],
        )
    disk, warm, bare = zip(*rows, strict=True)
    show(
        f"RouteSAE on 16 layers, {SAE.latents} latents, {asked.tokens:,} tokens",
        ("figure", "median (least-most)"),
        [
            ("from local disk, tokens/s", spread(disk, ",.0f")),
            ("object store, warm cache, tokens/s", spread(warm, ",.0f")),
            ("object store, no cache, tokens/s", spread(bare, ",.0f")),
            ("object store, cache filling, tokens/s", f"{cold:,.0f}"),
            ("warm cache / local disk", spread([row[1] / row[0] for row in rows])),
            ("no cache / local disk", spread([row[2] / row[0] for row in rows])),
        ],
    )


def _rate(place: Place, tokens: int) -> float:
    out = FOLDER / "object-runs"
    shutil.rmtree(out, ignore_errors=True)
    config = TrainConfig(out=out, tokens=tokens, batch_tokens=BATCH_TOKENS)
    reader = StoreReader(place)
    start = time.perf_counter()
    train(reader, [(SAE, 0)], config)
    return tokens / (time.perf_counter() - start)


@contextmanager
def _server() -> Iterator[None]:
    """moto's S3 on a port of its own, with an empty bucket, in the environment."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _make_bucket(f"{url}/{BUCKET}")
        os.environ |= {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "bench",
            "AWS_SECRET_ACCESS_KEY": "bench",
            "AWS_REGION": "us-east-1",
        }
        yield
    finally:
        server.terminate()
        server.wait()


def _make_bucket(url: str) -> None:
    for _ in range(120):
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="PUT")).close()
            return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(f"no server at {url}")


if __name__ == "__main__":
    main()
