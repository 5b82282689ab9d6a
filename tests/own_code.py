"""A tiny model that comes with code of its own, which leaves a mark whenever it is run."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import dynamic_module_utils

_MARK = "with open({mark!r}, 'a') as file:\n    file.write(__name__.rpartition('.')[2] + '\\n')\n"
_MODEL = """
from transformers import LlamaConfig, LlamaForCausalLM
from .parts import SCALE

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.embed_tokens.register_forward_hook(lambda module, given, out: out * SCALE)
"""
_TOKENIZER = """
from transformers import PreTrainedTokenizerFast

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@dataclass(frozen=True)
class OwnCode:
    """Such a model."""

    folder: Path
    mark: Path

    def ran(self) -> set[str]:
        """Which of its files were run since the last call; it is as if they never had been."""
        found = set(self.mark.read_text().split()) if self.mark.exists() else set()
        self.mark.unlink(missing_ok=True)
        forget()
        return found

    def rewrite(self, scale: int) -> None:
        """Another code of the same names, which computes something else."""
        (self.folder / "parts.py").write_text(_MARK.format(mark=str(self.mark)) + f"SCALE={scale}")


def forget() -> None:
    """Have Python load code that came with models from its files again."""
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]
    importlib.invalidate_caches()


def make_own(folder: Path, model: Any, tokenizer: Any) -> OwnCode:
    """A Llama and a tokenizer in a folder, as those of classes that are in it, too."""
    own = OwnCode(folder, folder.with_name("mark"))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, source in (("model", _MODEL), ("words", _TOKENIZER)):
        (folder / f"{name}.py").write_text(_MARK.format(mark=str(own.mark)) + source)
    own.rewrite(scale=2)
    classes = {"AutoConfig": "model.OwnConfig", "AutoModelForCausalLM": "model.OwnForCausalLM"}
    change(folder / "config.json", model_type="own", auto_map=classes)
    words = {"AutoTokenizer": [None, "words.OwnTokenizer"]}
    change(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=words)
    return own


def change(file: Path, **changes: Any) -> None:
    """Give a JSON file other values."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@contextmanager
def modules_in(folder: Path) -> Iterator[None]:
    """Have transformers keep such code there, and lose it afterwards. Nobody is ever asked."""

    def ask(prompt: str = "") -> None:
        pytest.fail(f"asked: {prompt}")

    elsewhere = dynamic_module_utils.HF_MODULES_CACHE
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
        patch.setattr(sys, "path", [place for place in sys.path if place != elsewhere])
        patch.setattr("builtins.input", ask)
        forget()
        yield
        forget()
