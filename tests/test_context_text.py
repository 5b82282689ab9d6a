"""Token types and sentences, against decoding by the tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers

from routesae_cache.contexts.mining import NO_TYPE
from routesae_cache.contexts.text import _BYTE_OF_LETTER, _SENTENCE_END, CLOSE, OPEN, StoreText
from routesae_cache.text import Document
from routesae_cache.tokens import Packing, Tokenizer, rows, wrap_tokenizer
from stores.layout import TokenRows

TEXTS = (
    "Der Wörterbuchatom heißt auf Englisch “dictionary atom”. Is it ONE? Yes it is!",
    "日本語のテキストと絵文字 🙂👩‍🚀🙂 mitten im Satz. Ein Ä am Ende: Ä",
    'She said: "No." Then she left, without a word more and without looking back',
    "x 🙂\n\n  y\t\tz 한국어 Ω≈ç√ 𝔘𝔫𝔦 — done. 3.14?",
)
CONTEXT, CHUNK_ROWS = 24, 3


@pytest.fixture(scope="module", params=["byte-level", "without BOS", "byte-fallback"])
def tokenizer(request: pytest.FixtureRequest, tiny_tokenizer: Any) -> Tokenizer:
    if request.param == "byte-level":
        return wrap_tokenizer(tiny_tokenizer, "tiny")
    if request.param == "byte-fallback":
        return wrap_tokenizer(sentencepiece_like(), "tiny-sp")
    backend = tiny_tokenizer.backend_tokenizer
    hf = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    return wrap_tokenizer(hf, "tiny")


def sentencepiece_like() -> Any:
    """Words begin with ▁, a character without a token is spelled in bytes, as in Llama 2."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    letters = sorted({c for c in "".join(TEXTS).replace(" ", "▁") if c.isascii() or c == "▁"})
    pieces = [*names, *letters, "▁i", "▁is", "▁w", "▁wi", "th", "▁with", "ou", "t."]
    merges = [("▁", "i"), ("▁i", "s"), ("▁", "w"), ("▁w", "i"), ("t", "h"), ("▁wi", "th")]
    merges += [("o", "u"), ("t", ".")]
    backend = tokenizers.Tokenizer(
        models.BPE(
            {piece: index for index, piece in enumerate(pieces)},
            merges,
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


class Rows:
    """As much of a store's reader as text needs."""

    def __init__(self, tokens_RT: Any, lengths_R: Any) -> None:
        self.tokens_RT = np.array(tokens_RT, np.int32)
        self.lengths_R = np.array(lengths_R, np.int32)
        self.spec = SimpleNamespace(chunk_rows=CHUNK_ROWS, context=self.tokens_RT.shape[1])

    def rows(self, chunk: int) -> TokenRows:
        part = slice(chunk * CHUNK_ROWS, (chunk + 1) * CHUNK_ROWS)
        return TokenRows(self.tokens_RT[part], self.lengths_R[part], [])

    def positions(self) -> list[tuple[int, int]]:
        return [
            (row, position)
            for row, length in enumerate(self.lengths_R.tolist())
            for position in range(1, length)
        ]


def packed(texts: Sequence[str], tokenizer: Tokenizer, packing: Packing) -> Rows:
    documents = [Document(text, {}) for text in texts]
    found = list(rows(documents, tokenizer, context=CONTEXT, packing=packing))
    return Rows([row.tokens for row in found], [row.length for row in found])


def text_of(reader: Any, tokenizer: Tokenizer) -> StoreText:
    return StoreText(reader, tokenizer)


def numbers(where: list[tuple[int, int]]) -> Any:
    return np.array([row * CONTEXT + position for row, position in where])


def decoded(tokenizer: Tokenizer, ids: Any) -> str:
    """After a letter, so that no space at the beginning is lost."""
    before = tokenizer.encode(["a"])[0].tolist()
    text = tokenizer.backend.decode([*before, *map(int, ids)], skip_special_tokens=False)
    return text.removeprefix("a")


def begin_of_text(tokenizer: Tokenizer) -> int:
    return 0 if tokenizer.bos_id is None else 1


def piece(reader: Rows, tokenizer: Tokenizer, row: int, position: int) -> tuple[int, int] | None:
    """The fewest tokens around a position that are whole characters, found by trying."""
    begin, length = begin_of_text(tokenizer), int(reader.lengths_R[row])
    for size in range(1, length + 1):
        for first in range(max(begin, position - size + 1), position + 1):
            last = first + size - 1
            ids = reader.tokens_RT[row, first : last + 1]
            if last < length and "\ufffd" not in decoded(tokenizer, ids):
                return first, last
    return None


@pytest.mark.parametrize("packing", ["joined", "document"])
def test_types(tokenizer: Tokenizer, packing: Packing) -> None:
    reader = packed(TEXTS * 2, tokenizer, packing)
    text, where = text_of(reader, tokenizer), reader.positions()
    expected = []
    for row, position in where:
        if (bounds := piece(reader, tokenizer, row, position)) is None:
            expected.append(None)
        else:
            ids = reader.tokens_RT[row, bounds[0] : bounds[1] + 1]
            expected.append(decoded(tokenizer, ids).lower().strip())
    assert None in expected  # rows cut characters
    assert {"🙂", "ä", "s", ""} <= set(expected)
    token_N = numbers(where)
    for size in (1, 7, len(where)):  # the batches do not matter
        parts = [text.types(token_N[i : i + size]) for i in range(0, len(where), size)]
        found = np.concatenate(parts)
        names = [None if t == NO_TYPE else text.type_names[t] for t in found.tolist()]
        assert names == expected


@pytest.mark.parametrize("packing", ["joined", "document"])
@pytest.mark.parametrize("max_tokens", [1, 6, 64])
def test_contexts_are_whole(tokenizer: Tokenizer, packing: Packing, max_tokens: int) -> None:
    reader = packed(TEXTS * 2, tokenizer, packing)
    text, where = text_of(reader, tokenizer), reader.positions()
    types = text.types(numbers(where))
    where = [w for w, number in zip(where, types.tolist(), strict=True) if number != NO_TYPE]
    found = text.contexts(numbers(where), max_tokens)
    for (row, position), context in zip(where, found, strict=True):
        bounds = piece(reader, tokenizer, row, position)
        assert bounds is not None
        first, last = context.first, context.last
        assert (
            begin_of_text(tokenizer)
            <= first
            <= bounds[0]
            <= position
            <= bounds[1]
            <= last
            < reader.lengths_R[row]
        )
        ids = reader.tokens_RT[row, first : last + 1]
        plain = context.text.replace(OPEN, "").replace(CLOSE, "")
        assert plain.strip() == decoded(tokenizer, ids).strip()
        assert "\ufffd" not in context.text
        mark = context.text.split(OPEN)[1].split(CLOSE)[0]
        marked_ids = reader.tokens_RT[row, bounds[0] : bounds[1] + 1]
        assert mark.strip() == decoded(tokenizer, marked_ids).strip()
        assert last - first + 1 <= max(max_tokens, bounds[1] - bounds[0] + 1)
        if tokenizer.separator_id in ids:
            assert len(ids) == 1  # nothing goes across the border of documents


def context_at(text: str, part: str, tokenizer: Tokenizer, max_tokens: int = 64) -> str:
    """The context, in a row of its own, of the token where a part of a text begins."""
    ids = [tokenizer.bos_id, *tokenizer.encode([text])[0].tolist()]
    position = 1 + len(tokenizer.encode([text[: text.index(part)]])[0])
    (context,) = text_of(Rows([ids], [len(ids)]), tokenizer).contexts(
        np.array([position]), max_tokens
    )
    return context.text


@pytest.mark.parametrize(
    ("text", "part", "expected"),
    [
        ("One. Two z it! Three", "z", "Two <ACTIVATED>z</ACTIVATED> it!"),
        ("One? Two z it", "z", "Two <ACTIVATED>z</ACTIVATED> it"),
        ('"Two z it" so', "z", 'Two <ACTIVATED>z</ACTIVATED> it"'),
        ('"No" z it (ok.) so', "z", "<ACTIVATED>z</ACTIVATED> it (ok."),
        ("One, two; z: three", "z", "One, two; <ACTIVATED>z</ACTIVATED>: three"),
        ("Ein 🙂 Bild. Zwei", "🙂", "Ein <ACTIVATED>🙂</ACTIVATED> Bild."),
        ("x\n\ny. z", "\n", "x<ACTIVATED>\n</ACTIVATED>\ny."),
        ("a. b", ".", "a<ACTIVATED>.</ACTIVATED>"),
    ],
)
def test_sentences(text: str, part: str, expected: str, tiny_tokenizer: Any) -> None:
    assert context_at(text, part, wrap_tokenizer(tiny_tokenizer, "tiny")) == expected


@pytest.mark.parametrize(
    ("tokens", "ends"),
    [
        ([".", "!", "?", '"', "...", "?!", '."', ".)", ".”", " .", ".\n\n", '"\n'], True),
        ([' "', '("', ",", ":", "a.", "3.", "", " ", '",', "<|endoftext|>"], False),
    ],
)
def test_tokens_that_end_a_sentence(tokens: list[str], ends: bool) -> None:
    assert [bool(_SENTENCE_END.fullmatch(token)) for token in tokens] == [ends] * len(tokens)


def test_long_sentences_are_cut_around_the_token(tiny_tokenizer: Any) -> None:
    tokenizer = wrap_tokenizer(tiny_tokenizer, "tiny")
    text = "987654021"  # a token each
    assert len(tokenizer.encode([text])[0]) == len(text)
    assert context_at(text, "5", tokenizer, 6) == "876<ACTIVATED>5</ACTIVATED>40"
    assert context_at(text, "5", tokenizer, 5) == "76<ACTIVATED>5</ACTIVATED>40"
    assert context_at(text, "9", tokenizer, 4) == "<ACTIVATED>9</ACTIVATED>876"
    assert context_at(text, "1", tokenizer, 4) == "402<ACTIVATED>1</ACTIVATED>"
    # four tokens of an emoji are one piece: shrunk to the one side, kept whole if it is the mark
    assert context_at("🙂1🙂", "1", tokenizer, 5) == "<ACTIVATED>1</ACTIVATED>"
    assert context_at("🙂1🙂", "1", tokenizer, 9) == "🙂<ACTIVATED>1</ACTIVATED>🙂"
    assert context_at("1🙂2", "🙂", tokenizer, 1) == "<ACTIVATED>🙂</ACTIVATED>"


def test_every_token_of_a_character_marks_it_whole(tiny_tokenizer: Any) -> None:
    tokenizer = wrap_tokenizer(tiny_tokenizer, "tiny")
    ids = [tokenizer.bos_id, *tokenizer.encode(["x🙂"])[0].tolist()]
    assert len(ids) == 6
    text = text_of(Rows([ids], [6]), tokenizer)
    found = text.contexts(np.arange(2, 6), 64)
    assert {context.text for context in found} == {"x<ACTIVATED>🙂</ACTIVATED>"}
    assert [text.type_names[t] for t in text.types(np.arange(1, 6))] == ["x", *["🙂"] * 4]


def test_separator_is_on_its_own(tiny_tokenizer: Any) -> None:
    tokenizer = wrap_tokenizer(tiny_tokenizer, "tiny")
    first, second = (tokenizer.encode([text])[0].tolist() for text in ("ab", "cd"))
    ids = [tokenizer.bos_id, *first, tokenizer.separator_id, *second]
    found = text_of(Rows([ids], [len(ids)]), tokenizer).contexts(np.arange(1, len(ids)), 64)
    texts = [context.text.replace(OPEN, "").replace(CLOSE, "") for context in found]
    assert texts == ["ab", "ab", "<|endoftext|>", "cd", "cd"]


def test_replacement_character_of_the_text_is_a_character(tiny_tokenizer: Any) -> None:
    tokenizer = wrap_tokenizer(tiny_tokenizer, "tiny")
    marked = "x <ACTIVATED>\ufffd</ACTIVATED> y"
    assert context_at("x \ufffd y", "\ufffd", tokenizer) == marked


def test_letters_of_bytes() -> None:
    assert set(_BYTE_OF_LETTER) == set(pre_tokenizers.ByteLevel.alphabet())
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    for text in (*map(chr, range(0x250)), "日本語🙂"):
        spelled = "".join(part for part, _ in spell(text))
        assert bytes(_BYTE_OF_LETTER[letter] for letter in spelled) == text.encode()
