"""What harvesting costs besides the model, and training besides the SAE, in time of one core.

`routesae plan` computes from these. Time is the processor's, of all threads together, so that
it adds up whatever runs at once.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.common import FOLDER, interleaved, raw_store, show, spread
from routesae_cache.batches import BatchConfig, BatchSource
from routesae_cache.harvest import fill_residuals
from routesae_cache.sources import resolve_model
from routesae_cache.text import TextConfig, open_text
from routesae_cache.tokens import load_tokenizer, rows
from stores.codecs import Bf16Codec, DeltaCodec, Int8Codec, ResidualCodec
from stores.reader import StoreReader
from stores.writer import StoreWriter

CODECS: dict[str, ResidualCodec] = {
    "bf16": Bf16Codec(),
    "int8": Int8Codec(),
    "delta, step 0.10": DeltaCodec(step=0.10),
    "delta, step 0.20": DeltaCodec(),
    "delta, step 0.30": DeltaCodec(step=0.30),
}
ROUNDS, BATCH_TOKENS = 5, 2048
OUT = FOLDER / "rates.zarr"


class Remembered:
    """In the model's place: the residuals of the eval split, from the store."""

    device = torch.device("cpu")

    def __init__(self, raw: StoreReader) -> None:
        layers = raw.spec.layers
        chunks = [torch.from_numpy(raw.residuals(c, layers)) for c in raw.chunks("eval")]
        self._x_NLD, self._next = torch.cat(chunks).bfloat16(), 0

    def residuals(self, ids_RT: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Of the next tokens."""
        begin = self._next
        self._next = (begin + ids_RT.numel()) % len(self._x_NLD)
        x_NLD = self._x_NLD[begin : begin + ids_RT.numel()]
        return [x_NLD[:, i].contiguous().unflatten(0, ids_RT.shape) for i in range(len(layers))]


def main() -> None:
    raw = StoreReader(raw_store())
    model = Remembered(raw)
    one_layer = (raw.spec.layers[-1],)
    table = []
    for name, codec in CODECS.items():

        def writing(codec: ResidualCodec = codec) -> float:
            shutil.rmtree(OUT, ignore_errors=True)
            with _with_rows(raw, codec) as writer:
                start = time.process_time()
                tokens = fill_residuals(writer, model, raw.chunks("eval"), lambda _: None)
                return _nanoseconds(start, tokens * raw.spec.values_per_token)

        def reading(layers: tuple[int, ...] = raw.spec.layers) -> float:
            config = BatchConfig(layers=layers, batch_tokens=BATCH_TOKENS, split="eval")
            source = BatchSource(StoreReader(OUT), config)
            start, tokens = time.process_time(), 0
            with source.batches() as batches:
                for batch in batches:
                    tokens += len(batch.row_N)
            return _nanoseconds(start, tokens * len(layers) * raw.spec.width)

        measures = [writing, reading, lambda: reading(one_layer)]
        writes, reads, reads_one = zip(*interleaved(ROUNDS, measures), strict=True)
        table.append((name, *map(spread, (writes, reads, reads_one))))
    shutil.rmtree(OUT)
    show(
        f"Core-ns a value: layers 7-22 of smollm2-135m, {raw.spec.eval_tokens:,} tokens",
        ("codec", "encode and write", "read, decode, normalise", "the last layer alone"),
        table,
    )
    counts = [_tokenising() for _ in range(ROUNDS)]
    show("Text to rows", ("figure", "median (least-most)"), [("core-µs a token", spread(counts))])


def _with_rows(raw: StoreReader, codec: ResidualCodec) -> StoreWriter:
    """A store with the token rows of another and no residuals."""
    spec = dataclasses.replace(raw.spec, codec=codec)
    none = dataclasses.replace(spec, eval_rows=0, train_rows=0, eval_tokens=0, train_tokens=0)
    writer = StoreWriter.create(OUT, none)
    for chunk in range(spec.chunks):
        writer.write_rows(chunk, raw.rows(chunk))
    writer.commit_rows(spec)
    return writer


def _nanoseconds(start: float, values: int) -> float:
    return (time.process_time() - start) / values * 1e9


def _tokenising() -> float:
    text = open_text(TextConfig(dataset="news"))
    tokenizer = load_tokenizer(resolve_model("smollm2-135m"))
    start, tokens = time.process_time(), 0
    for row in rows(text.documents(), tokenizer, context=512, packing="joined"):
        tokens += row.length
        if tokens > 500_000:
            break
    return (time.process_time() - start) / tokens * 1e6


if __name__ == "__main__":
    main()
