"""Harvest tokens/s over tokens/s of the bare forward pass, cut after the last layer."""

from __future__ import annotations

import shutil
import time

import torch

from benchmarks.common import FOLDER, interleaved, show, spread
from routesae_cache.harvest import harvest
from routesae_cache.harvest_plan import HarvestConfig, plan_harvest
from routesae_cache.lm import load_lm
from stores.reader import StoreReader

ROUNDS, TOKENS = 5, 16384
OUT = FOLDER / "speed.zarr"


def main() -> None:
    config = HarvestConfig(
        model="smollm2-135m", dataset="news", out=OUT, tokens=TOKENS, eval_tokens=0
    )
    lm = load_lm("smollm2-135m")

    def harvesting() -> float:
        shutil.rmtree(OUT, ignore_errors=True)
        result = harvest(plan_harvest(config))
        return result.tokens / result.seconds

    def forward() -> float:
        reader = StoreReader(OUT)
        last, size = max(reader.spec.layers), reader.spec.batch_rows
        ids = torch.cat([torch.from_numpy(reader.rows(c).tokens_RT) for c in reader.committed])
        start = time.perf_counter()
        for batch in ids.split(size):
            lm.residuals(batch, [last])
        return ids.numel() / (time.perf_counter() - start)

    harvesting(), forward()
    rows = interleaved(ROUNDS, [harvesting, forward])
    shutil.rmtree(OUT)
    harvests, forwards = zip(*rows, strict=True)
    show(
        f"Harvest of smollm2-135m, layers 7-22, delta, {ROUNDS} rounds of {TOKENS} tokens",
        ("figure", "median (least-most)"),
        [
            ("harvest, tokens/s", spread(harvests, ",.0f")),
            ("bare forward pass, tokens/s", spread(forwards, ",.0f")),
            ("ratio", spread([h / f for h, f in rows])),
        ],
    )


if __name__ == "__main__":
    main()
