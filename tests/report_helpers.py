"""A folder as the stages leave it: a tiny store, a few runs, results with text that means harm."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from routesae_cache.checkpoint import load_run
from routesae_cache.evaluate import EvaluateConfig, evaluate
from routesae_cache.origin import origin_tokenizer
from routesae_cache.train import train
from routesae_cache.train_plan import TrainConfig
from stores.reader import StoreReader
from tests.pipeline_helpers import all_tokens, config, run, topk

HARM = "<script>window.harmed=1</script><img src=x onerror=window.harmed=1>"
SENTENCES = (
    f'He said "stop" & went on {HARM} to the end.',
    "A sparse autoencoder’s latents — naïve ones, too — read </script> and <!-- -->.",
    "The router reads one of many layers: the “deepest” one, mostly 🙂.",
)
EXPLANATION = f'Quotes "like these" & {HARM}'
SAES = {
    "route": topk((1, 2, 3), route_estimator="factor"),
    "fixed": topk((3,)),
    "every": topk((1, 2, 3), selector="every"),
    "all": topk((1, 2, 3), selector="all"),
}


@dataclass(frozen=True)
class Stages:
    """What the stages have left."""

    root: Path
    reader: StoreReader
    model: Path
    runs: dict[str, Path]
    """By the names in SAES."""

    def contexts(self, name: str) -> Path:
        return self.root / "contexts" / f"{self.runs[name].name}_0.10.json"


def make_stages(folder: Path, model: Path) -> Stages:
    """Harvest and train in a folder, and leave results about two of the runs."""
    corpus = folder / "corpus.jsonl"
    records = [
        {"text": " ".join(SENTENCES[(i + j) % 3] for j in range(2)), "title": f"{i} {HARM}"}
        for i in range(30)
    ]
    corpus.write_text("".join(json.dumps(record) + "\n" for record in records))
    reader = run(config(model, corpus, folder / "s.zarr", context=64, tokens=600, eval_tokens=300))
    options = TrainConfig(out=folder / "saes", batch_tokens=128)
    folders = train(reader, [(sae, 1) for sae in SAES.values()], options).folders
    stages = Stages(folder, reader, model, dict(zip(SAES, folders, strict=True)))
    _write(folder / "eval.json", _evaluation(stages))
    (folder / "contexts").mkdir()
    for name in ("route", "fixed"):
        contexts = _contexts(stages, name)
        _write(stages.contexts(name), contexts)
    latents = json.loads(stages.contexts("route").read_text())["latents"]
    interpretation = _interpretation(stages, list(latents)[:4])
    _write(stages.contexts("route").with_suffix(".interpretation.json"), interpretation)
    return stages


def dense_values(stages: Stages, name: str) -> dict[Any, torch.Tensor]:
    """(row, position) -> every latent's value there, the largest over layers; one by one."""
    sae, run_config = load_run(stages.runs[name])
    found = {}
    for key, x_LD in all_tokens(stages.reader, run_config.sae.layers, "eval").items():
        x = torch.from_numpy(x_LD).double()
        x = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6)
        output = sae.inference(x[None].float())
        found[key] = output.latents.dense(run_config.sae.latents).amax(0)
    return found


def _evaluation(stages: Stages) -> dict[str, Any]:
    results = evaluate(stages.reader, list(stages.runs.values()), EvaluateConfig())
    records = [json.loads(json.dumps(result.to_dict())) for result in results]
    for place, record in enumerate(records):
        record["spliced"] = None
        if place < 2:
            measured = {"mean": 0.2 + place, "se": 0.01}
            both = dict.fromkeys(("kl", "delta_ce", "recovered"), measured)
            record["spliced"] = both | {"rows": 5, "per_layer": None}
    return {
        "kind": "evaluation",
        "store": str(stages.reader.path),
        "split": "eval",
        "results": records,
    }


def _contexts(stages: Stages, name: str) -> dict[str, Any]:
    """Every place where a latent is its token's strongest, as contexts of seven tokens."""
    _, run_config = load_run(stages.runs[name])
    tokenizer = origin_tokenizer(stages.reader.spec, model=str(stages.model))
    ids = {
        stages.reader.spec.chunk_range(chunk).start + index: row.tolist()
        for chunk in stages.reader.chunks("eval")
        for index, row in enumerate(stages.reader.rows(chunk).tokens_RT)
    }
    places: dict[str, list[Any]] = {}
    for (row, position), value_F in dense_values(stages, name).items():
        latent = int(value_F.argmax())
        places.setdefault(str(latent), []).append((float(value_F[latent]), row, position))
    latents, contexts = {}, {}
    for latent, found in sorted(places.items(), key=lambda item: int(item[0])):
        values = [value for value, _, _ in found]
        counts, edges = np.histogram(values, bins=4)
        latents[latent] = {
            "activations": len(values),
            "max": max(values),
            "mean": float(np.mean(values)),
            "layers": {"2": len(values)} if len(run_config.sae.layers) > 1 else None,
            "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        }
        contexts[latent] = {}
        for value, row, position in sorted(found, reverse=True):
            first, last = max(1, position - 3), min(len(ids[row]) - 1, position + 3)
            before, token, after = (
                tokenizer.hf.decode(ids[row][start:end])
                for start, end in (
                    (first, position),
                    (position, position + 1),
                    (position + 1, last + 1),
                )
            )
            context = {
                "context": f"{before}<ACTIVATED>{token}</ACTIVATED>{after}",
                "activation": value,
                "row": row,
                "position": position,
                "layer": 2,
                "first": first,
                "last": last,
            }
            contexts[latent].setdefault(token.strip().lower(), []).append(context)
    at = [{"threshold": t, "interpretable": len(latents) - i} for i, t in enumerate((0.1, 0.2))]
    return {
        "kind": "contexts",
        "run": str(stages.runs[name]),
        "name": run_config.name,
        "store": str(stages.reader.path),
        "split": "eval",
        "tokens": 300,
        "total_latents": len(latents),
        "threshold": 0.1,
        "summary": {"by_threshold": at},
        "latents": latents,
        "latent_context_map": contexts,
    }


def _interpretation(stages: Stages, latents: list[str]) -> dict[str, Any]:
    explained = {
        latent: {
            "category": "low-level" if place else "high-level",
            "score": 1 + place,
            "explanation": EXPLANATION if place == 0 else f"explained {place}",
            "detection": {"balanced_accuracy": 0.8, "asked": 4},
        }
        for place, latent in enumerate(latents)
    }
    return {
        "kind": "interpretation",
        "contexts": str(stages.contexts("route")),
        "name": json.loads(stages.contexts("route").read_text())["name"],
        "model": "a <b>model</b>",
        "averages": {"all": {"count": 4, "score": {"mean": 2.5, "se": 0.6}}},
        "latents": explained,
    }


def _write(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, ensure_ascii=False), "utf-8")
