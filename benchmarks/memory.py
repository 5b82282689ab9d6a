"""Peak memory of whole processes, harvesting and training, with ten times the tokens."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.common import FOLDER, show

FEW, MANY = 32_768, 327_680
ROUTESAE = str(Path(sys.executable).with_name("routesae"))


def main() -> None:
    peaks: dict[str, list[float]] = {"harvest": [], "train": []}
    for tokens in (FEW, MANY):
        store, runs = FOLDER / f"memory-{tokens}.zarr", FOLDER / "memory-runs"
        for path in (store, runs):
            shutil.rmtree(path, ignore_errors=True)
        common = ["--tokens", str(tokens), "--eval-tokens", "8192", "--out", str(store)]
        peaks["harvest"].append(_peak_mb("harvest", *common))
        saes = ["--sae", "routesae", "--sae", "topk", "--k", "32", "--latents", "2304"]
        where = ["--batch-tokens", "2048", "--out", str(runs)]
        peaks["train"].append(_peak_mb("train", str(store), *saes, *where))
        for path in (store, runs):
            shutil.rmtree(path)
    show(
        "Peak memory of the process",
        ("command", f"{FEW:,} tokens", f"{MANY:,} tokens", "ratio"),
        [
            (name, f"{few:,.0f} MB", f"{many:,.0f} MB", f"{many / few:.3f}")
            for name, (few, many) in peaks.items()
        ],
    )


def _peak_mb(*arguments: str) -> float:
    process = subprocess.Popen([ROUTESAE, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, f"{arguments} ended with {process.returncode}"
    return usage.ru_maxrss / 1000


if __name__ == "__main__":
    main()
