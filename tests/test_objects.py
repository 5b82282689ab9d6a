"""Stores in an object store: a server that speaks S3, on loopback."""

from __future__ import annotations

import json
import pickle
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from routesae_cache.train import train
from routesae_cache.train_plan import TrainConfig
from stores import leases, objects
from stores.cache import CachedPlace
from stores.codecs import Int8Codec
from stores.copy import copy_store
from stores.errors import (
    CorruptChunkError,
    LockLostError,
    NotAStoreError,
    PlaceError,
    StoreError,
    StoreLockedError,
)
from stores.obstore import reason
from stores.place import Place
from stores.places import as_place
from stores.reader import StoreReader
from stores.recode import recode
from stores.writer import StoreWriter
from tests.command_helpers import refused, routesae
from tests.object_server import BUCKET, CREDENTIALS, ObjectServer, object_server
from tests.pipeline_helpers import topk
from tests.store_helpers import (
    chunk_file,
    encoded_chunk,
    fill_store,
    grown,
    residuals,
    store_bytes,
    store_spec,
    token_rows,
)


@pytest.fixture(scope="module")
def running() -> Iterator[ObjectServer]:
    with object_server() as server:
        yield server


@pytest.fixture
def server(running: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> ObjectServer:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
    running.well()
    running.requests.clear()
    return running


@pytest.fixture
def place(server: ObjectServer, request: pytest.FixtureRequest) -> objects.ObjectPlace:
    found = as_place(f"s3://{BUCKET}/{request.node.name}/s.zarr")
    assert isinstance(found, objects.ObjectPlace)
    return found


def objects_of(place: Place, like: Path) -> dict[str, bytes]:
    """The objects with the keys that a local store has, and that there are no others."""
    found = {key: place.read(key) for key in store_bytes(like)}
    assert place.total_size() == sum(map(len, found.values()))
    return found


def test_the_same_bytes_as_on_a_disk(place: objects.ObjectPlace, tmp_path: Path) -> None:
    spec = store_spec()
    small, path = grown(spec, 3), tmp_path / "s.zarr"
    fill_store(place, small, chunks=(0,))
    assert StoreReader(place).committed == [0]
    reader = fill_store(place, spec)  # goes on, and extends
    fill_store(path, spec)
    assert objects_of(place, path) == store_bytes(path)
    assert list(reader.verify()) == [(0, None), (1, None), (2, None)]
    codec = spec.codec
    expected = StoreReader(path).residuals(2, spec.layers)
    np.testing.assert_array_equal(reader.residuals(2, spec.layers), expected)
    assert codec == reader.spec.codec
    group = zarr.open_group(place.zarr_store(), mode="r")
    np.testing.assert_array_equal(group["tokens"][3:6], token_rows(spec, 1).tokens_RT)
    assert pickle.loads(pickle.dumps(place)) == place


def test_training_while_a_harvest_fills_the_store(
    place: objects.ObjectPlace, tmp_path: Path
) -> None:
    """From local copies, too: what is not committed is not kept."""
    spec = store_spec(layers=(2,), train_rows=12)
    small = fill_store(tmp_path / "s.zarr", grown(spec, 6))
    fill_store(place, spec, chunks=(0, 1, 2, 4))
    cached = CachedPlace(place, tmp_path / "cache", 1)
    sae = topk((2,), latents=16, norm="scalar")

    def go(reader: StoreReader, out: str, **options: Any) -> Path:
        stopped = options.pop("stopped", lambda: False)
        wanted = TrainConfig(out=tmp_path / out, batch_tokens=4, epochs=2, **options)
        (folder,) = train(reader, [(sae, 3)], wanted, stopped=stopped).folders
        return folder / "sae.safetensors"

    assert not go(StoreReader(cached), "cut", so_far=True, stopped=lambda: True).exists()
    fill_store(place, spec)
    resumed = go(StoreReader(cached), "cut", resume=True)
    assert resumed.read_bytes() == go(small, "whole").read_bytes()


def test_what_is_read_is_asked_for_at_once(
    place: objects.ObjectPlace, server: ObjectServer
) -> None:
    reader = fill_store(place, store_spec())
    server.slowness = 0.5
    server.choose = lambda method, path: "slow"
    start = time.perf_counter()
    reader.codes(0, (0, 1, 2))  # ten files
    assert time.perf_counter() - start < 3


# locks


def test_one_alone_or_many_that_share(place: objects.ObjectPlace) -> None:
    fill_store(place, store_spec(), chunks=())
    before = place.total_size()
    with StoreWriter(place, shared=True) as first, StoreWriter(place, shared=True) as second:
        with pytest.raises(StoreLockedError):
            StoreWriter(place)
        assert first.claim(1)
        assert first.claim(1)
        assert not second.claim(1)
        assert second.claim(2)
        layers, stats = encoded_chunk(first.spec, 1)
        first.write_chunk(1, token_rows(first.spec, 1), layers, stats)
        assert not second.claim(1)
    with StoreWriter(place), pytest.raises(StoreLockedError):
        StoreWriter(place, shared=True)
    assert place.names(".locks") == []
    assert place.total_size() > before


def _abandoned(place: objects.ObjectPlace, *, shared: bool) -> leases.LeaseLocks:
    """The locks of a process that was killed: nothing is given back, nothing beats."""
    locks = place.lock(shared=shared)
    assert locks is not None
    locks._stopped.set()
    return locks


@pytest.mark.parametrize("shared", [False, True])
def test_locks_of_the_dead_are_taken_over(
    place: objects.ObjectPlace, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    fill_store(place, store_spec(), chunks=())
    dead = _abandoned(place, shared=shared)
    if shared:
        assert dead.take_chunk(1)
    with pytest.raises(StoreLockedError):
        StoreWriter(place)
    if shared:
        with StoreWriter(place, shared=True) as writer:
            assert not writer.claim(1)
    monkeypatch.setattr(leases, "EXPIRY_S", -5.0)  # the server tells whole seconds
    with StoreWriter(place, shared=True) as writer:
        assert writer.claim(1)
    later = StoreWriter(place)
    monkeypatch.setattr(leases, "EXPIRY_S", 600.0)
    dead.close()  # it was only slow: it gives back nothing that is another's
    with pytest.raises(StoreLockedError):
        StoreWriter(place)
    later.close()
    assert place.names(".locks") == []


def test_a_process_that_died_here_is_known_to_be_dead(
    place: objects.ObjectPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_store(place, store_spec(), chunks=())
    monkeypatch.setattr("stores.leases.os.getpid", lambda: 2**22 + 1)  # beyond the largest
    _abandoned(place, shared=False)
    monkeypatch.undo()
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    StoreWriter(place).close()


def test_of_two_that_take_over_one_gets_it(
    place: objects.ObjectPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert place.create("lock", b"first")
    assert not place.create("lock", b"second")
    entry = place.entry("lock")
    assert entry is not None
    assert place.replace("lock", b"third", entry)
    assert not place.replace("lock", b"fourth", entry)
    assert place.read("lock") == b"third"


def test_who_gave_no_sign_for_too_long_writes_no_more(
    place: objects.ObjectPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = store_spec()
    fill_store(place, spec, chunks=())
    layers, stats = encoded_chunk(spec, 1)
    with StoreWriter(place) as writer:
        monkeypatch.setattr(leases, "TRUST_S", -1.0)
        before = place.total_size()
        with pytest.raises(LockLostError, match="another process may have taken it"):
            writer.write_chunk(1, token_rows(spec, 1), layers, stats)
        assert place.total_size() == before
        monkeypatch.undo()


def test_signs_of_life_are_given(
    place: objects.ObjectPlace, server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_store(place, store_spec(), chunks=())
    monkeypatch.setattr(leases, "BEAT_S", 0.02)
    with StoreWriter(place):
        server.requests.clear()
        time.sleep(0.3)
    assert len({key for key in server.keys("PUT") if ".locks/pulse-alone/" in key}) == 1
    assert len(server.keys("PUT")) > 2


# what goes wrong


def test_lost_answers_and_errors_are_tried_again(
    place: objects.ObjectPlace, server: ObjectServer, tmp_path: Path
) -> None:
    spec = store_spec(layers=(4,))
    server.faults.clear()
    place.exists()
    server.at_random(7, 0.15, "error", "cut", "lost")
    reader = fill_store(place, spec)
    assert list(reader.verify()) == [(0, None), (1, None), (2, None)]
    server.well()
    fill_store(tmp_path / "s.zarr", spec)
    assert objects_of(place, tmp_path / "s.zarr") == store_bytes(tmp_path / "s.zarr")
    assert min(server.faults[kind] for kind in ("error", "cut", "lost")) > 0


def test_an_answer_that_was_cut_off_is_asked_for_again(
    place: objects.ObjectPlace, server: ObjectServer
) -> None:
    fill_store(place, store_spec())
    for ask in (lambda: sorted(place.names("committed/c")), lambda: place.read("lengths/c/1")):
        expected, left = ask(), ["cut"] * 3
        server.choose = lambda method, path, left=left: left.pop() if left else None
        assert ask() == expected
        assert not left


def test_a_server_that_is_gone_is_no_corrupt_chunk(
    place: objects.ObjectPlace, server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "RETRIES_S", 0.3)
    reader = fill_store(place, store_spec())
    server.choose = lambda method, path: "error"
    with pytest.raises(PlaceError, match=r"500"):
        reader.rows(0)
    server.well()
    place.remove("lengths/c/1")
    with pytest.raises(CorruptChunkError, match="the file is missing"):
        reader.rows(1)


def test_errors_that_a_user_makes(
    place: objects.ObjectPlace, server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = time.perf_counter()
    refused(routesae("store", "info", "s3://no-such/s.zarr"), "there is no such bucket")
    refused(routesae("store", "info", str(place)), "found nothing there")
    refused(routesae("store", "info", "ftp://a/b"), "s3://BUCKET/PREFIX", "found ftp://a/b")
    refused(routesae("store", "info", f"s3://{BUCKET}"), "s3://BUCKET/PREFIX")
    for url in (f"s3://key:hidden@{BUCKET}/s", f"s3://{BUCKET}/s?token=hidden"):
        result = routesae("store", "info", url)
        refused(result, "credentials do not belong in the URL")
        assert "hidden" not in result.output
    command = ("store", "info", str(place), "--endpoint-url")
    refused(routesae(*command, "http://127.0.0.1:9"), "it cannot be reached")
    assert routesae(*command, "127.0.0.1:9").exit_code == 2
    monkeypatch.setitem(sys.modules, "obstore", None)
    refused(routesae("store", "info", str(place)), "pip install 'routesae-cache[cloud]'")
    assert time.perf_counter() - start < 60  # not the minutes that retries would take


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("Error performing PUT http://169.254.169.254/latest: 403 Forbidden", "no credentials"),
        ("<Code>SignatureDoesNotMatch</Code> 403 Forbidden", "the secret key is wrong"),
        ("<Code>InvalidAccessKeyId</Code> 403 Forbidden", "the access key is not known"),
        ("Server returned non-2xx status code: 403 Forbidden", "access is denied"),
        ("something else\nand pages of it", "something else"),
    ],
)
def test_what_an_object_store_says_in_a_line(said: str, meant: str) -> None:
    found = reason(ValueError(said))
    assert found.startswith(meant)
    assert "\n" not in found


# copies


def test_copied_there_and_back(place: objects.ObjectPlace, tmp_path: Path) -> None:
    spec = store_spec()
    path = Path(fill_store(tmp_path / "s.zarr", spec, chunks=(0, 2)).path)
    told: list[tuple[int, int]] = []
    copied = copy_store(path, place, on_chunk=lambda *now: told.append(now))
    assert (copied.chunks, copied.copied, copied.left) == (2, 2, 1)
    assert told == [(1, 2), (2, 2)]
    fill_store(path, spec)
    assert copy_store(path, place).copied == 1
    assert objects_of(place, path) == store_bytes(path)
    result = routesae("store", "copy", place, tmp_path / "back.zarr")
    assert result.exit_code == 0, result.output
    assert "3 chunks are in" in result.output
    assert store_bytes(tmp_path / "back.zarr") == store_bytes(path)
    assert routesae("store", "verify", place).exit_code == 0
    assert json.loads(routesae("store", "info", place, "--json").output)["chunks"] == 3
    recode(place, tmp_path / "other.zarr", Int8Codec())
    recode(path, tmp_path / "same.zarr", Int8Codec())
    assert store_bytes(tmp_path / "other.zarr") == store_bytes(tmp_path / "same.zarr")


def test_a_copy_goes_on_where_it_stopped(
    place: objects.ObjectPlace, server: ObjectServer, tmp_path: Path
) -> None:
    path = Path(fill_store(tmp_path / "s.zarr", store_spec()).path)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copy_store(path, place, on_chunk=stop)
    assert StoreReader(place).committed == [0]
    server.requests.clear()
    assert copy_store(path, place).copied == 2
    assert not [key for key in server.keys("PUT") if key.endswith("/low/c/0/0/0")]
    assert objects_of(place, path) == store_bytes(path)


def test_a_copy_finds_what_is_bad(place: objects.ObjectPlace, tmp_path: Path) -> None:
    path = Path(fill_store(tmp_path / "s.zarr", store_spec()).path)
    file = chunk_file(path, "residuals/2/low", 1)
    file.write_bytes(chunk_file(path, "residuals/2/low", 0).read_bytes())
    with pytest.raises(CorruptChunkError, match="chunk 1 of array residuals/2/low"):
        copy_store(path, place)
    assert StoreReader(place).committed == [0]


def test_a_copy_reads_back_what_it_wrote(
    place: objects.ObjectPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(fill_store(tmp_path / "s.zarr", store_spec()).path)
    original = objects.ObjectPlace.write

    def forgetful(self: objects.ObjectPlace, key: str, content: bytes, **more: bool) -> None:
        original(self, key, content[:-1] if key.endswith("scale/c/2/0") else content, **more)

    monkeypatch.setattr(objects.ObjectPlace, "write", forgetful)
    with pytest.raises(StoreError, match="does not read back"):
        copy_store(path, place)
    assert StoreReader(place).committed == [0, 1]


def test_half_made_is_made_again(place: objects.ObjectPlace) -> None:
    place.write("tokens/zarr.json", b"{}")
    with pytest.raises(NotAStoreError, match="nothing there"):
        StoreReader(place)
    reader = fill_store(place, store_spec())
    np.testing.assert_allclose(
        reader.residuals(0, (1,))[:, 0], residuals(reader.spec, 0)[0], atol=0.5
    )
    with pytest.raises(StoreError, match="exists already"):
        StoreWriter.create(place, store_spec())
    place.remove_all()
    assert place.total_size() == 0
