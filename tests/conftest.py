"""Fixtures shared by all tests: tiny random models, a tokenizer, a corpus. No network."""

# ruff: noqa: E402  (the environment is set before the libraries that read it are imported)

import atexit
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="routesae-tests-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

import hypothesis
import pytest
import tokenizers
import torch
import transformers

from tests.browser import driver  # noqa: F401  (a fixture)
from tests.chat_server import chat_environment, server  # noqa: F401  (fixtures)

torch.set_num_threads(1)  # of tiny tensors: more would only wait for each other

# a busy machine is no failure
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

BLOCKS, WIDTH, VOCAB = 4, 32, 300
ARCHITECTURES = ("llama", "gpt2", "gpt_neox", "qwen2", "gemma")
SENTENCES = (
    "The router looks at every layer and reads one of them.",
    "A sparse autoencoder explains a residual by a few of its many latents.",
    "On Monday, 12 of the 30 blocks were read: nothing was lost.",
    "Der Wörterbuchatom heißt auf Englisch “dictionary atom”.",
)


NAMED_ALONE = ("cluster", "faults")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Folders whose tests take long run when they are named: `make test-cluster`, `test-faults`."""
    name = collection_path.name
    named = any(name in Path(argument.split("::")[0]).parts for argument in config.args)
    return True if name in NAMED_ALONE and not named else None


@pytest.fixture(autouse=True)
def _loggers_as_they_were() -> Iterator[None]:
    """Commands send the library's messages to the screen; other tests want them elsewhere."""
    yield
    for name in ("routesae_cache", "stores"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.setLevel(logging.NOTSET)
        logger.propagate = True


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """Build a random model of an architecture, the same one each time, in float32."""

    def build(architecture: str) -> Any:
        sizes = {
            "vocab_size": VOCAB,
            "hidden_size": WIDTH,
            "num_hidden_layers": BLOCKS,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
        }
        if architecture != "gpt2":
            sizes["intermediate_size"] = 64
        if architecture == "gemma":
            sizes["head_dim"] = 8
        if architecture in ("llama", "qwen2", "gemma"):
            sizes["num_key_value_heads"] = 2
        # weights large enough for the blocks to matter
        config = transformers.AutoConfig.for_model(architecture, **sizes, initializer_range=0.2)
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).eval()

    return build


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """Byte-level BPE with BOS, and an end of sequence that is not the end of a text."""
    names = ["<|endoftext|>", "<|bos|>", "<|im_end|>"]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=names,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|im_end|>"
    )


@pytest.fixture(scope="session")
def tiny_model_dir(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
) -> Path:
    """A folder with the tiny Llama and the tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty documents as JSON lines, with text, title and url."""
    path = tmp_path_factory.mktemp("corpus") / "tiny.jsonl"
    records = (
        {
            "text": " ".join(SENTENCES[(i + j) % len(SENTENCES)] for j in range(1 + i % 5)),
            "title": f"Document {i}",
            "url": f"https://example.org/{i}",
        }
        for i in range(40)
    )
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
