"""A harvest, a training and copies through an object store that fails, waits and hangs up.

The server is moto's, over HTTP on loopback; what it does wrong is drawn at random, with a seed.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stores import objects
from stores.copy import copy_store
from stores.errors import CorruptChunkError
from stores.places import as_place
from stores.writer import StoreWriter
from tests.command_helpers import routesae
from tests.faults.tally import Tally
from tests.object_server import BUCKET, CREDENTIALS, ObjectServer, object_server
from tests.store_helpers import fill_store, store_bytes, store_spec

URL = f"s3://{BUCKET}/s.zarr"
KINDS = ("error", "lost", "slow", "cut")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectServer]:
    with object_server() as running:
        for name, value in CREDENTIALS.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        yield running


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("whole") / "s.zarr"
    fill_store(path, store_spec(train_rows=30))
    return store_bytes(path)


def expect(whole: dict[str, bytes]) -> None:
    """The store at URL is this one, byte for byte, and nothing else is there."""
    place = as_place(URL)
    assert {key: place.read(key) for key in whole} == whole
    assert place.total_size() == sum(map(len, whole.values()))


@pytest.mark.parametrize("seed", range(5))
def test_written_and_read_through_faults(
    server: ObjectServer, whole: dict[str, bytes], seed: int, tally: Tally
) -> None:
    server.at_random(seed, 0.2, *KINDS)
    reader = fill_store(as_place(URL), store_spec(train_rows=30))
    assert dict(reader.verify()) == dict.fromkeys(range(11), None)
    assert all(server.faults[kind] > 10 for kind in KINDS)
    tried = server.faults.total()
    server.well()
    expect(whole)
    tally.add("object store: bad answers", tried=tried, survived=tried)


def test_a_connection_that_is_lost_for_a_while(
    server: ObjectServer, whole: dict[str, bytes]
) -> None:
    place = as_place(URL)
    fill_store(place, store_spec(train_rows=30), chunks=range(3))
    server.choose = lambda method, path: "cut"
    threading.Timer(4.0, server.well).start()
    fill_store(place, store_spec(train_rows=30))
    expect(whole)


def test_what_is_damaged_on_the_way_is_not_believed(server: ObjectServer) -> None:
    """A body that is whole but wrong: nobody says so but the checksums."""
    place = as_place(URL)
    reader = fill_store(place, store_spec())
    content = place.read("residuals/2/low/c/1/0/0")
    place.write("residuals/2/low/c/1/0/0", bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(CorruptChunkError, match="chunk 1 of array residuals/2/low"):
        reader.residuals(1, (2,))


@pytest.mark.parametrize("there", [True, False])
def test_copied_through_faults(
    server: ObjectServer, whole: dict[str, bytes], tmp_path: Path, there: bool
) -> None:
    path = tmp_path / "s.zarr"
    fill_store(path, store_spec(train_rows=30))
    if not there:
        copy_store(path, URL)
    server.at_random(3, 0.2, *KINDS)
    if there:
        copy_store(path, URL)
        server.well()
        expect(whole)
    else:
        copy_store(URL, tmp_path / "back.zarr")
        assert store_bytes(tmp_path / "back.zarr") == whole


_WRITER = """
import sys
from tests.store_helpers import fill_store, store_spec
from stores.places import as_place
fill_store(as_place(sys.argv[1]), store_spec(train_rows=30))
"""


def _process(source: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", source, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def test_killed_again_and_again(
    server: ObjectServer, whole: dict[str, bytes], tally: Tally
) -> None:
    """Its locks are taken over at once: a process of this machine that is gone is known to be."""
    server.slowness = 0.02
    server.choose = lambda method, path: "slow"
    killed = 0
    for pause in (0.1, 0.4, 0.8, 1.2, 1.6):
        server.requests.clear()
        process = _process(_WRITER, URL)
        while not server.requests and process.poll() is None:
            time.sleep(0.02)
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        process.communicate()
    assert killed > 2
    server.well()
    done = _process(_WRITER, URL)
    assert done.wait() == 0, done.communicate()
    done.communicate()
    expect(whole)
    tally.add("object store: writers", tried=killed, survived=killed)


_SHARE = """
import sys
from tests.store_helpers import encoded_chunk, token_rows
from stores.writer import StoreWriter
with StoreWriter(sys.argv[1], shared=True) as writer:
    for chunk in writer.pending():
        if writer.claim(chunk):
            layers, stats = encoded_chunk(writer.spec, chunk)
            writer.write_chunk(chunk, token_rows(writer.spec, chunk), layers, stats)
            print("wrote", chunk)
"""


def test_several_at_once_write_no_chunk_twice(
    server: ObjectServer, whole: dict[str, bytes]
) -> None:
    fill_store(as_place(URL), store_spec(train_rows=30), chunks=())
    server.at_random(5, 0.1, *KINDS)
    processes = [_process(_SHARE, URL) for _ in range(3)]
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    wrote = sorted(int(line.split()[1]) for text in said for line in text.splitlines())
    assert wrote == list(range(11))
    server.well()
    expect(whole)


def test_one_alone_is_alone(server: ObjectServer) -> None:
    fill_store(as_place(URL), store_spec(), chunks=())
    source = (
        "import sys; from stores.writer import StoreWriter; "
        "StoreWriter(sys.argv[1]); print('in', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", source, URL],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "in\n"
    with pytest.raises(ValueError, match="being written to by another process"):
        StoreWriter(URL)
    other.kill()
    other.communicate()
    StoreWriter(URL).close()


def test_an_experiment_from_harvest_to_report(
    server: ObjectServer, tiny_model_dir: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    """Every command, the store in the bucket; the result equals that of a local store."""
    server.at_random(11, 0.05, *KINDS)
    server.slowness = 0.05
    results: dict[str, Any] = {}
    for name, store in (("url", URL), ("path", str(tmp_path / "local.zarr"))):
        out = tmp_path / name
        model = ("--model", tiny_model_dir, "--dataset", tiny_corpus, "--layers", "1-3")
        size = ("--tokens", 600, "--eval-tokens", 100, "--context", 16, "--chunk-rows", 4)
        saes = ("--sae", "routesae:k=4,latents=64", "--sae", "topk:k=4,latents=64")
        twice = ("--epochs", 2, "--batch-tokens", 64, "--out", out / "saes")
        _ran("harvest", *model, *size, "--out", store)
        _ran("harvest", *model, *size, "--out", store, "--worker", "0/2")
        _ran("train", store, *saes, *twice, "--cache-dir", out / "cache", "--cache-gb", 1)
        runs = sorted((out / "saes").iterdir())
        at = ("--model", tiny_model_dir)
        for command in (
            ("evaluate", store, *runs, "--json", out / "evaluation.json", "--spliced", *at),
            ("contexts", store, *runs, "--out", out / "contexts", "--threshold", "0.5", *at),
            ("report", out, "--out", out / "report.html", *at),
            ("store", "verify", store),
            ("store", "info", store, "--json"),
            ("export", runs[1], "--format", "saelens", "--out", out / "export"),
        ):
            results[name, command[0]] = _ran(*command)
        config = json.loads((runs[0] / "config.json").read_text())
        assert config["store"] == store
        results[name] = [(run / "sae.safetensors").read_bytes() for run in runs]
    assert results["url"] == results["path"]
    assert server.faults.total() > 20
    secret = CREDENTIALS["AWS_SECRET_ACCESS_KEY"].encode()
    for file in (tmp_path / "url").rglob("*"):
        assert file.is_dir() or secret not in file.read_bytes()


def _ran(*command: object) -> str:
    result = routesae(*command)
    assert result.exit_code == 0, f"{command}: {result.output}"
    assert CREDENTIALS["AWS_SECRET_ACCESS_KEY"] not in result.output
    return result.output


def test_no_request_lasts_longer_than_a_lease() -> None:
    """So that nothing a writer sent can arrive after its locks were taken over."""
    from stores import leases

    longest = objects.PUT_AGAIN_S + objects.RETRIES_S + objects._REQUEST_S
    assert leases.TRUST_S + longest < leases.EXPIRY_S
    assert leases.BEAT_S * 4 < leases.TRUST_S
