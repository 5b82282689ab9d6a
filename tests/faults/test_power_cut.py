"""The power is cut before every second step of a harvest that is resumed and extended."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.faults.tally import Tally
from tests.lossy_disk import check_after, cut_at, steps
from tests.store_helpers import store_bytes

_PARTS = 4
_STRIDE = 2


@pytest.mark.parametrize("part", range(_PARTS))
def test_at_the_steps(tmp_path: Path, part: int, tally: Tally) -> None:
    (tmp_path / "whole").mkdir()
    n_steps = steps(tmp_path / "whole")
    whole = store_bytes(tmp_path / "whole" / "s.zarr")
    for cut in range(_STRIDE * part, n_steps, _STRIDE * _PARTS):
        before, after = tmp_path / "before", tmp_path / "after"
        disk = cut_at(cut, before)
        check_after(disk, after, seed=cut)
        assert store_bytes(after / "s.zarr") == whole
        tally.add("power cut")
        shutil.rmtree(before)
        shutil.rmtree(after)
