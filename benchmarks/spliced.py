"""Tokens/s of an SAE's KL over two bare forward passes, and the memory of a KL over 128k logits."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers

from benchmarks.common import FOLDER, interleaved, recoded, show, spread
from routesae_cache.kernels import keep_freed_memory
from routesae_cache.lm import LanguageModel, ModelIdentity
from routesae_cache.origin import origin_lm
from routesae_cache.saes.config import SaeConfig
from routesae_cache.splicing.evaluate import SplicedConfig, evaluate_spliced
from routesae_cache.splicing.predictions import compare_predictions
from routesae_cache.train import train
from routesae_cache.train_plan import TrainConfig
from routesae_cache.trained import TrainedSae
from stores.codecs import DeltaCodec
from stores.reader import StoreReader

ROUNDS, ROWS, BATCH_TOKENS = 5, 16, 2048
LAYERS = tuple(range(7, 23))
SAES = [
    SaeConfig(selector="route", coder="topk", layers=LAYERS, latents=4608, k=32),
    SaeConfig(selector="fixed", coder="topk", layers=(22,), latents=4608, k=32),
]
VOCABULARY, WIDTH, TOKENS = 128 * 1024, 256, 4096


def main() -> None:
    if sys.argv[1:]:
        _print_peak(int(sys.argv[1]))
    else:
        _speed()
        _memory()


def _speed() -> None:
    keep_freed_memory()
    reader = StoreReader(recoded(DeltaCodec(), "delta-0.20"))
    lm = origin_lm(reader.spec)
    routed, fixed = (TrainedSae(run, reader.spec) for run in _runs(reader))
    tokens_RT = torch.from_numpy(reader.rows(0).tokens_RT)[:ROWS]
    tokens = tokens_RT.numel()

    def two_passes() -> float:
        start = time.perf_counter()
        for batch in tokens_RT.split(BATCH_TOKENS // tokens_RT.shape[1]):
            lm.logits(batch)
            lm.logits(batch)
        return tokens / (time.perf_counter() - start)

    def kl(sae: TrainedSae, **changes: object) -> float:
        config = SplicedConfig(rows=ROWS, batch_tokens=BATCH_TOKENS, **{"ablation": None} | changes)
        start = time.perf_counter()
        evaluate_spliced(reader, lm, [sae], config)
        return tokens / (time.perf_counter() - start)

    measures = [two_passes, lambda: kl(routed), lambda: kl(fixed)]
    measures.append(lambda: kl(routed, ablation="zero"))
    two_passes()
    rows = interleaved(ROUNDS, measures)
    names = ("two bare forward passes", "KL, RouteSAE", "KL, TopK", "KL and Recovered, RouteSAE")
    figures = [
        (f"{name}, tokens/s", spread(column, ",.0f"))
        for name, column in zip(names, zip(*rows, strict=True), strict=True)
    ]
    ratios = [
        (f"{name} / two bare passes", spread([row[index] / row[0] for row in rows]))
        for index, name in enumerate(names)
    ]
    title = f"Splicing into smollm2-135m, {tokens:,} tokens a round, {ROUNDS} rounds"
    show(title, ("figure", "median (least-most)"), figures + ratios[1:])


def _runs(reader: StoreReader) -> list[Path]:
    """A routed and a fixed SAE, barely trained."""
    out = FOLDER / "spliced"
    shutil.rmtree(out, ignore_errors=True)
    config = TrainConfig(out=out, tokens=16_384, batch_tokens=1024)
    return list(train(reader, [(sae, 0) for sae in SAES], config).folders)


def _memory() -> None:
    counts = (TOKENS, 4 * TOKENS)
    command = [sys.executable, "-m", "benchmarks.spliced"]
    runs = [
        subprocess.run([*command, str(n)], stdout=subprocess.PIPE, check=True, text=True)
        for n in counts
    ]
    show(
        f"Peak memory that a KL adds, vocabulary of {VOCABULARY:,}, bfloat16",
        ("", *(f"{n:,} tokens" for n in counts)),
        [
            ("measured", *(f"{float(run.stdout):,.0f} MB" for run in runs)),
            (
                "the logits of one pass as float32",
                *(f"{n * VOCABULARY * 4 / 1e6:,.0f} MB" for n in counts),
            ),
        ],
    )


def _print_peak(tokens: int) -> None:
    """MB that a KL adds to the process's peak."""
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.AutoConfig.for_model("llama", vocab_size=VOCABULARY, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    identity = ModelIdentity(name="", revision=None, config_hash="", weights="", dtype="bfloat16")
    lm = LanguageModel(model, identity)
    a_ND, b_ND = torch.randn(2, tokens, WIDTH, dtype=torch.bfloat16)
    next_N = torch.zeros(tokens, dtype=torch.long)
    lm.logits(torch.zeros(1, 8))
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _peak_mb()
    with torch.inference_mode():
        compare_predictions(lm, a_ND, [b_ND], next_N)
    print(_peak_mb() - before)


def _peak_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM"))
    return float(peak) / 1000


if __name__ == "__main__":
    main()
