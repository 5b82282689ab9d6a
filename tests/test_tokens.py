"""Documents to rows: nothing lost, nothing added, special tokens only where they belong."""

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st

from routesae_cache import tokens
from routesae_cache.sources import ModelError
from routesae_cache.text import Document
from routesae_cache.tokens import Packing, Row, Tokenizer, load_tokenizer, rows, wrap_tokenizer
from tests.conftest import SENTENCES

DOCUMENTS = st.lists(
    st.one_of(
        st.text(max_size=80),
        st.lists(st.sampled_from(["<|bos|>", "<|endoftext|>", "<|im_end|>", " a", "\n"])).map(
            "".join
        ),
        st.sampled_from(SENTENCES),
    ),
    max_size=12,
).map(lambda texts: [Document(text, {"n": str(n)}) for n, text in enumerate(texts)])


@pytest.fixture(scope="session")
def with_bos(tiny_tokenizer: Any) -> Tokenizer:
    return wrap_tokenizer(tiny_tokenizer, "tiny")


@pytest.fixture(scope="session")
def without_bos(tiny_tokenizer: Any) -> Tokenizer:
    backend = tokenizers.Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    return wrap_tokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=backend), "tiny")


@pytest.fixture(params=["with_bos", "without_bos"], scope="session")
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    wrapped: Tokenizer = request.getfixturevalue(request.param)
    return wrapped


def text_of(row: Row, tokenizer: Tokenizer) -> list[int]:
    """The row's tokens without BOS and padding, both checked."""
    head = 0 if tokenizer.bos_id is None else 1
    assert row.tokens.dtype == np.int32
    assert list(row.tokens[:head]) == [tokenizer.bos_id][:head]
    assert set(row.tokens[row.length :]) <= {tokenizer.pad_id}
    return [int(token) for token in row.tokens[head : row.length]]


@given(documents=DOCUMENTS, context=st.integers(2, 40))
def test_joined_rows_are_the_documents_with_a_separator_after_each(
    tokenizer: Tokenizer, documents: list[Document], context: int
) -> None:
    ids = [[int(i) for i in tokenizer.encode([d.text])[0]] for d in documents]
    expected = [i for text in ids if text for i in [*text, tokenizer.separator_id]]
    made = list(rows(documents, tokenizer, context=context, packing="joined"))
    assert [i for row in made for i in text_of(row, tokenizer)] == expected
    assert all(row.tokens.shape == (context,) for row in made)
    assert all(row.length == context for row in made[:-1])


@given(documents=DOCUMENTS, context=st.integers(2, 40))
def test_document_rows_hold_one_document_each(
    tokenizer: Tokenizer, documents: list[Document], context: int
) -> None:
    made = list(rows(documents, tokenizer, context=context, packing="document"))
    together: list[list[int]] = []
    for row in made:
        if row.documents:
            together.append([])
        together[-1] += text_of(row, tokenizer)
    ids = [[int(i) for i in tokenizer.encode([d.text])[0]] for d in documents]
    assert together == [text for text in ids if text]
    for row, after in itertools.pairwise(made):
        assert row.length == context or after.documents


@given(documents=DOCUMENTS, context=st.integers(2, 40))
@pytest.mark.parametrize("packing", get_args(Packing))
def test_every_document_is_found_where_it_is_said_to_begin(
    tokenizer: Tokenizer, packing: Packing, documents: list[Document], context: int
) -> None:
    expected = {
        d.metadata["n"]: ids[0] for d in documents if len(ids := tokenizer.encode([d.text])[0])
    }
    begun = [
        (about["n"], row.tokens[position])
        for row in rows(documents, tokenizer, context=context, packing=packing)
        for position, about in row.documents
    ]
    assert dict(begun) == expected
    assert [int(n) for n, _ in begun] == sorted(map(int, expected))


@given(text=st.text(max_size=60))
def test_text_comes_back_from_its_tokens(with_bos: Tokenizer, text: str) -> None:
    (ids,) = with_bos.encode([text])
    assert with_bos.hf.decode(ids) == text


def test_names_of_special_tokens_in_a_text_are_text(tokenizer: Tokenizer) -> None:
    special = set(tokenizer.hf.added_tokens_decoder)
    assert len(special) == 3
    text = "a<|bos|><|endoftext|> b <|im_end|>"
    (ids,) = tokenizer.encode([text])
    assert not special & set(ids.tolist())
    assert tokenizer.hf.decode(ids) == text
    tokenizer.hf(text)  # using the transformers tokenizer, with its own settings, changes nothing
    assert np.array_equal(tokenizer.encode([text])[0], ids)


def test_separator_is_the_end_of_a_text_not_of_a_turn(with_bos: Tokenizer) -> None:
    assert with_bos.hf.convert_ids_to_tokens(with_bos.separator_id) == "<|endoftext|>"
    assert with_bos.hf.convert_ids_to_tokens(with_bos.bos_id) == "<|bos|>"
    assert with_bos.hf.eos_token == "<|im_end|>"
    assert with_bos.pad_id == with_bos.separator_id


def bare_tokenizer(vocabulary: list[str], special: list[str], **named: str) -> Any:
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(vocabulary)}, "?")
    backend = tokenizers.Tokenizer(model)
    backend.add_special_tokens(special)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def test_a_tag_in_the_vocabulary_is_no_separator() -> None:
    hf = bare_tokenizer(["?", "</s>", "<eos>"], ["<eos>"], eos_token="<eos>")
    assert wrap_tokenizer(hf, "tags").separator_id == 2


def test_end_of_sequence_separates_where_nothing_else_does() -> None:
    hf = bare_tokenizer(["?", "stop"], ["stop"], eos_token="stop", pad_token="?")
    wrapped = wrap_tokenizer(hf, "stops")
    assert (wrapped.separator_id, wrapped.pad_id, wrapped.bos_id) == (1, 0, None)


def test_a_tokenizer_with_no_separator_is_refused() -> None:
    with pytest.raises(ModelError, match=r"nothing to put between documents.*<\|endoftext\|>"):
        wrap_tokenizer(bare_tokenizer(["?", "a"], []), "none")


def test_context_must_have_room_for_text(with_bos: Tokenizer, without_bos: Tokenizer) -> None:
    documents = [Document("abc", {})]
    assert len(list(rows(documents, without_bos, context=1, packing="document"))) == 3
    with pytest.raises(ValueError, match="at least 2"):
        next(rows(documents, with_bos, context=1, packing="joined"))


def test_few_characters_are_tokenised_at_a_time(
    with_bos: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "_BATCH_CHARACTERS", 10)
    batches = list(tokens._batches(Document(text, {}) for text in ["aaaa"] * 5 + ["b" * 100, "c"]))
    assert [len(batch) for batch in batches] == [3, 3, 1]


def test_rows_come_while_documents_are_still_to_come(with_bos: Tokenizer) -> None:
    documents = (Document(SENTENCES[0], {"n": str(n)}) for n in range(10**9))
    made = rows(documents, with_bos, context=16, packing="joined")
    assert [next(made).length for _ in range(3)] == [16] * 3


def test_loading_and_fingerprint(tiny_model_dir: Path, with_bos: Tokenizer) -> None:
    loaded = load_tokenizer(str(tiny_model_dir))
    assert loaded.fingerprint == with_bos.fingerprint
    (ids,) = loaded.encode([SENTENCES[3]])
    assert np.array_equal(ids, with_bos.encode([SENTENCES[3]])[0])
    assert (loaded.bos_id, loaded.separator_id) == (with_bos.bos_id, with_bos.separator_id)
    program = "import sys; from routesae_cache.tokens import load_tokenizer as load; "
    elsewhere = subprocess.run(
        [sys.executable, "-c", program + "print(load(sys.argv[1]).fingerprint)", tiny_model_dir],
        check=True,
        capture_output=True,
        text=True,
    )
    assert elsewhere.stdout.strip() == loaded.fingerprint


def test_fingerprint_tells_tokenizers_apart(with_bos: Tokenizer, without_bos: Tokenizer) -> None:
    assert with_bos.fingerprint == without_bos.fingerprint  # the vocabulary is the same
    other = wrap_tokenizer(bare_tokenizer(["?", "<eos>"], ["<eos>"]), "other")
    assert other.fingerprint != with_bos.fingerprint


def test_a_tokenizer_without_a_fast_version_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match=r"'slow' has no fast version"):
        wrap_tokenizer(Slow(), "slow")


def test_the_hubs_failures_are_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="could not be reached"):
        load_tokenizer("owner/never-downloaded")
