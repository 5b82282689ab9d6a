"""A place where every command finds what it needs, for the tests that then spoil it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from routesae_cache.contexts.records import write_record
from tests.faults.bad_commands import Place, make_paths, stop_before_work
from tests.interchange_helpers import SPEC, WIDTH, make_run, sae_config
from tests.store_helpers import fill_store, store_spec

TOML = '[train]\nlatents = 16\n[[sae]]\nsae = "topk"\nk = 4\n'


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, tiny_corpus: Path
) -> Iterator[Place]:
    """A store, a run, contexts and files, where everything that takes long is not done."""
    folder = tmp_path_factory.mktemp("place")
    sizes = {"width": WIDTH, "context": 16, "eval_rows": 6, "train_rows": 30}
    fill_store(folder / "s.zarr", store_spec(model=SPEC["model"], **sizes))
    make_run(folder / "folder_of_runs" / "run", sae_config("topk", layers=(4,)))
    make_run(folder / "run", sae_config("topk", layers=(4,)))
    words = {"0": {"a": [{"context": "a", "activation": 1.5, "row": 1, "position": 1}]}}
    words["0"]["a"][0] |= {"first": 0, "last": 2, "layer": 1}
    write_record(
        folder / "contexts.json",
        {"kind": "contexts", "name": "run", "total_latents": 1, "summary": {}},
        {"latents": [(0, {})], "latent_context_map": words.items()},
    )
    (folder / "sweep.toml").write_text(TOML)
    (folder / "experiment.toml").write_text(
        f'out = "made"\n[harvest]\nmodel = "{tiny_model_dir}"\n{TOML}'
    )
    shapes = {"encoder.weight": (8, WIDTH), "decoder.weight": (WIDTH, 8)}
    shapes |= {"pre_bias": (WIDTH,), "latent_bias": (8,)}
    torch.save({name: torch.zeros(shape) for name, shape in shapes.items()}, folder / "state.pt")
    every = {"store": "s.zarr", "source": "s.zarr", "target": "made", "runs": "run", "run": "run"}
    every |= {"contexts": "contexts.json", "sae": "topk:k=4", "file": "sweep.toml"}
    own = {
        "harvest": {"model": str(tiny_model_dir), "dataset": str(tiny_corpus), "context": "64"},
        "report": {"runs": "folder_of_runs"},
        "interpret": {"base_url": "http://localhost:9"},
        "steer": {"latent": "1", "add": "1", "prompt": "a"},
        "pipeline": {"file": "experiment.toml"},
        "export": {"format_name": "saelens"},
        "import-reference": {"file": "state.pt"},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("OPENAI_API_KEY", raising=False)
        stop_before_work(patch)
        yield Place(folder, every, own, make_paths(folder))
