"""A store after a power cut: nothing that is committed is lost."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from stores.places import as_place
from tests.lossy_disk import LossyDisk, check_after, cut_at, history, on, steps
from tests.store_helpers import store_bytes


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    history(folder / "s.zarr")
    return store_bytes(folder / "s.zarr")


def test_nothing_that_is_committed_is_lost(tmp_path: Path, whole: dict[str, bytes]) -> None:
    (tmp_path / "count").mkdir()
    n_steps = steps(tmp_path / "count")
    assert n_steps > 200
    cuts = random.Random(1).sample(range(n_steps), 8)
    for cut in sorted(cuts):
        disk = cut_at(cut, tmp_path / f"before-{cut}")
        check_after(disk, tmp_path / f"after-{cut}", seed=cut)
        assert store_bytes(tmp_path / f"after-{cut}" / "s.zarr") == whole


def test_what_was_finished_is_on_the_disk(tmp_path: Path, whole: dict[str, bytes]) -> None:
    (tmp_path / "before").mkdir()
    disk = LossyDisk(tmp_path / "before")
    with on(disk):
        history(tmp_path / "before" / "s.zarr")
    for seed in range(3):
        disk.restart(tmp_path / f"after-{seed}", random.Random(seed))
        assert store_bytes(tmp_path / f"after-{seed}" / "s.zarr") == whole


@pytest.mark.parametrize("lost", ["contents", "names"])
def test_a_disk_that_loses_more_is_noticed(
    tmp_path: Path, whole: dict[str, bytes], lost: str
) -> None:
    """The tests above can fail: with syncs of one kind left out, something is lost."""
    (tmp_path / "before").mkdir()
    disk = LossyDisk(tmp_path / "before")

    def sync(path: Path) -> None:
        if path.is_dir() == (lost == "contents"):
            disk.sync(path)

    with on(disk, sync=sync):
        history(tmp_path / "before" / "s.zarr")
    disk.restart(tmp_path / "after", random.Random(0))
    path = tmp_path / "after" / "s.zarr"
    assert not as_place(path).exists() or store_bytes(path) != whole
