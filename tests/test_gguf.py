"""A GGUF file is converted once, whole, and the model is the one in the file."""

import json
import threading
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import transformers

from routesae_cache.gguf import cache_folder, conversion_folder, converted
from routesae_cache.lm import load_lm
from routesae_cache.tokens import load_tokenizer
from tests.conftest import BLOCKS, SENTENCES, VOCAB, WIDTH

HIDDEN = 64


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ROUTESAE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "some.gguf"
    path.write_bytes(bytes(range(256)) * 40)
    return path


def write_marker(file: Path, folder: Path) -> None:
    (folder / "made").write_text(file.name)


def test_converts_once(file: Path, cache: Path) -> None:
    made: list[Path] = []

    def convert(file: Path, folder: Path) -> None:
        made.append(folder)
        write_marker(file, folder)

    folder = converted(file, convert)
    assert folder == converted(file, convert) == conversion_folder(file)
    assert len(made) == 1
    assert [path.name for path in folder.iterdir()] == ["made"]
    assert list((cache / "gguf").iterdir()) == [folder]


def test_a_changed_file_is_another(file: Path) -> None:
    folder = converted(file, write_marker)
    content = bytearray(file.read_bytes())
    content[5000] ^= 1
    file.write_bytes(content)
    assert converted(file, write_marker) != folder


def test_large_files_are_sampled_from_end_to_end(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("routesae_cache.gguf._BLOCKS", 5)
    monkeypatch.setattr("routesae_cache.gguf._BLOCK_BYTES", 8)
    before = conversion_folder(file)
    content = file.read_bytes()
    for position in (0, len(content) // 2, len(content) - 1):
        changed = bytearray(content)
        changed[position] ^= 1
        file.write_bytes(changed)
        assert conversion_folder(file) != before


def test_a_copy_of_the_file_is_the_same(file: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    copy = tmp_path / "copy" / file.name
    copy.write_bytes(file.read_bytes())
    assert conversion_folder(copy) == conversion_folder(file)


def test_an_interrupted_conversion_leaves_nothing(file: Path, cache: Path) -> None:
    def interrupted(file: Path, folder: Path) -> None:
        write_marker(file, folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        converted(file, interrupted)
    assert list((cache / "gguf").iterdir()) == []
    assert (converted(file, write_marker) / "made").exists()


def test_of_two_at_once_one_stays(file: Path, cache: Path) -> None:
    both_began = threading.Barrier(2)
    folders: list[Path] = []

    def convert(file: Path, folder: Path) -> None:
        write_marker(file, folder)
        both_began.wait(timeout=20)

    def run() -> None:
        folders.append(converted(file, convert))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders == [conversion_folder(file)] * 2
    assert list((cache / "gguf").iterdir()) == [folders[0]]


def test_the_users_cache_folder_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROUTESAE_CACHE_DIR")
    assert cache_folder().name == "routesae-cache"


def write_llama(path: Path, tokenizer: Any) -> dict[str, Any]:
    """A tiny Llama with random weights in GGUF; returns the weights by their GGUF names."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(BLOCKS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    special = set(tokenizer.added_tokens_decoder)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([token for token, _ in vocabulary])
    kinds = gguf.TokenType
    writer.add_token_types([kinds.CONTROL if i in special else kinds.NORMAL for _, i in vocabulary])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    weights = random_weights()
    for name, values in weights.items():
        writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def random_weights() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (VOCAB, WIDTH), "output_norm": (WIDTH,), "output": (VOCAB, WIDTH)}
    for block in range(BLOCKS):
        for name, shape in {
            "attn_norm": (WIDTH,),
            "attn_q": (WIDTH, WIDTH),
            "attn_k": (WIDTH // 2, WIDTH),
            "attn_v": (WIDTH // 2, WIDTH),
            "attn_output": (WIDTH, WIDTH),
            "ffn_norm": (WIDTH,),
            "ffn_gate": (HIDDEN, WIDTH),
            "ffn_up": (HIDDEN, WIDTH),
            "ffn_down": (WIDTH, HIDDEN),
        }.items():
            shapes[f"blk.{block}.{name}"] = shape
    return {name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}


def test_the_model_and_tokenizer_of_a_file(
    tmp_path: Path,
    tiny_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "tiny.gguf"
    weights = write_llama(path, tiny_tokenizer)
    tokenizer = load_tokenizer(str(path))
    lm = load_lm(str(path), dtype="float32")
    assert capfd.readouterr() == ("", "")
    assert lm.identity.name == "tiny.gguf"
    assert lm.n_layers == BLOCKS
    state = lm.model.state_dict()
    for theirs, ours in {
        "model.embed_tokens": "token_embd",
        "lm_head": "output",
        "model.layers.3.mlp.down_proj": "blk.3.ffn_down",
        "model.layers.0.self_attn.v_proj": "blk.0.attn_v",
    }.items():
        assert np.array_equal(state[f"{theirs}.weight"].numpy(), weights[ours])
    for sentence in SENTENCES:
        expected = tiny_tokenizer(sentence, add_special_tokens=False).input_ids
        assert tokenizer.encode([sentence])[0].tolist() == expected
    assert tokenizer.bos_id == tiny_tokenizer.bos_token_id
    assert tokenizer.hf.convert_ids_to_tokens(tokenizer.separator_id) == "<|endoftext|>"

    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError("converted twice")

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", fail)
    assert load_lm(str(path), dtype="float32").identity == lm.identity
