"""NormMSE on raw activations of a TopK trained from each codec, over one trained from raw."""

from __future__ import annotations

import shutil
import statistics

from benchmarks.codecs import CODECS
from benchmarks.common import FOLDER, raw_store, recoded, show, spread
from routesae_cache.evaluate import EvaluateConfig, evaluate
from routesae_cache.saes.config import SaeConfig
from routesae_cache.train import train
from routesae_cache.train_plan import TrainConfig
from stores.reader import StoreReader

COMPARED = ("bf16", "delta-0.15", "delta-0.20")
SEEDS, EPOCHS, BATCH_TOKENS = (0, 1, 2), 2, 512
SAE = SaeConfig(selector="fixed", coder="topk", layers=(22,), latents=2304, k=32)


def main() -> None:
    raw = StoreReader(raw_store())
    found = {name: _nmse(raw, name) for name in COMPARED}
    reference = statistics.mean(found["bf16"])
    show(
        f"TopK, layer 22, 2304 latents, k 32, {EPOCHS} epochs; evaluated on raw activations",
        ("trained from", f"NormMSE of {len(SEEDS)} seeds", "mean / mean from raw"),
        [
            (name, spread(values, ".4f"), f"{statistics.mean(values) / reference:.4f}")
            for name, values in found.items()
        ],
    )


def _nmse(raw: StoreReader, name: str) -> list[float]:
    path = raw.path if name == "bf16" else recoded(CODECS[name], name)
    out = FOLDER / "quality"
    shutil.rmtree(out, ignore_errors=True)
    config = TrainConfig(out=out, epochs=EPOCHS, batch_tokens=BATCH_TOKENS)
    result = train(StoreReader(path), [(SAE, seed) for seed in SEEDS], config)
    return [r.reconstruction.nmse for r in evaluate(raw, result.folders, EvaluateConfig())]


if __name__ == "__main__":
    main()
