"""Who may know whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HARVEST_SIDE = {
    *("text", "corpus_files", "tokens", "hub", "sources", "identity", "presets"),
    *("lm", "gguf", "harvest", "harvest_plan", "workers", "ray_harvest"),
}
TRAINING_SIDE = {
    "batches",
    "batch_parts",
    "batch_slots",
    "train",
    "ray_train",
    "parallel",
    "launch",
    "runs",
    "sweep",
    "loggers",
    "evaluate",
    "checkpoint",
    "metrics",
    "kernels",
    "optim",
    "interchange",
}
ALONE = {
    "transformers": {"routesae_cache.lm", "routesae_cache.tokens"},
    "wandb": {"routesae_cache.loggers"},
    "openai": {"routesae_cache.interpretation.chat"},
    "vl_convert": {"routesae_cache.report.assets", "routesae_cache.report.page"},
    "ray": {"routesae_cache.ray_cluster"},
    "torch.distributed": {"routesae_cache.parallel"},
    "obstore": {"stores.obstore"},
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
    return found


FILES = {
    module_name(path): imports(path)
    for package in ("stores", "routesae_cache", "cli")
    for path in (ROOT / package).rglob("*.py")
}


def packages_of(module: str) -> set[str]:
    return {name.split(".")[0] for name in FILES[module]}


@pytest.mark.parametrize("module", FILES)
def test_packages_are_imported_one_way(module: str) -> None:
    allowed_not = {
        "stores": {"torch", "transformers", "routesae_cache", "cli"},
        "routesae_cache": {"cli", "typer", "rich"},
        "cli": {"torch", "transformers", "datasets"},
    }
    assert not packages_of(module) & allowed_not[module.split(".")[0]]


def test_harvest_and_training_meet_at_the_store() -> None:
    for module, imported in FILES.items():
        inside = {name.split(".")[1] for name in imported if name.startswith("routesae_cache.")}
        side = module.split(".")[1] if module.startswith("routesae_cache.") else ""
        if side in HARVEST_SIDE:
            assert not inside & (TRAINING_SIDE | {"saes"}), module
        if side in TRAINING_SIDE | {"saes"}:
            assert not inside & HARVEST_SIDE, module


@pytest.mark.parametrize("library", ALONE)
def test_some_libraries_have_few_users(library: str) -> None:
    users = {
        module
        for module, imported in FILES.items()
        if any(f"{name}.".startswith(f"{library}.") for name in imported)
    }
    assert users == ALONE[library]


def test_help_needs_no_heavy_import() -> None:
    script = "import sys, cli.app; print(sorted({'torch', 'zarr', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr
