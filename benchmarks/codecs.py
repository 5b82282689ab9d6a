"""Bits a value on disk, everything counted, and NMSE on raw activations, for each codec."""

from __future__ import annotations

import numpy as np

from benchmarks.common import raw_store, recoded, show
from stores.codecs import Bf16Codec, DeltaCodec, Int8Codec, ResidualCodec
from stores.reader import StoreReader
from stores.stats import split_stats, stored_bytes

CODECS: dict[str, ResidualCodec] = {
    "bf16": Bf16Codec(),
    "int8": Int8Codec(),
    "delta-0.10": DeltaCodec(step=0.10),
    "delta-0.15": DeltaCodec(step=0.15),
    "delta-0.20": DeltaCodec(step=0.20),
    "delta-0.30": DeltaCodec(step=0.30),
    "delta-0.20-key4": DeltaCodec(step=0.20, keyframe_every=4),
}
CHECKED_CHUNKS = 3


def main() -> None:
    raw = StoreReader(raw_store())
    rows = []
    for name, codec in CODECS.items():
        path = raw.path if name == "bf16" else recoded(codec, name)
        reader = StoreReader(path)
        spec = reader.spec
        bits = 8 * stored_bytes(path) / (spec.tokens * spec.values_per_token)
        recorded = split_stats(reader).distortion_L
        rows.append(
            (
                name,
                f"{bits:.2f}",
                f"{16 / bits:.1f}",
                f"{recorded.mean():.2e}",
                f"{recorded.max():.2e}",
                f"{_true_nmse(raw, reader):.2e}",
            )
        )
    show(
        f"Codecs, layers 7-22 of smollm2-135m, {raw.spec.tokens:,} tokens",
        ("codec", "bits/value", "x under bf16", "NMSE", "worst layer", "measured afresh"),
        rows,
    )


def _true_nmse(raw: StoreReader, reader: StoreReader) -> float:
    """On some chunks, from the decoded values of both stores in float64."""
    found = []
    for chunk in raw.committed[:: len(raw.committed) // CHECKED_CHUNKS]:
        counted_N = raw.rows(chunk).counted_RT().reshape(-1)
        for layer in raw.spec.layers[:: len(raw.spec.layers) // 4]:
            x_ND, y_ND = (
                r.residuals(chunk, [layer])[counted_N, 0].astype(np.float64) for r in (raw, reader)
            )
            found.append(((x_ND - y_ND) ** 2).mean(-1) / x_ND.var(-1))
    return float(np.concatenate(found).mean())


if __name__ == "__main__":
    main()
