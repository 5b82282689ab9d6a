"""The text around a token of a store: which type of token it is, and its sentence.

A byte-level token may be a part of a character. Such tokens are taken together with their
neighbours into pieces of whole characters; every other token is a piece of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from routesae_cache.contexts.mining import NO_TYPE, Ints
from routesae_cache.tokens import Tokenizer
from stores.layout import TokenRows
from stores.reader import StoreReader

OPEN, CLOSE = "<ACTIVATED>", "</ACTIVATED>"
_UNDECODABLE = "\N{REPLACEMENT CHARACTER}"
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")
# punctuation that ends in . ! or ?, and what closes around it; or a " that no space precedes
_SENTENCE_END = re.compile(r"""\s*[^\w\s]*[.!?]["'”’)\]]*\s*|"\s*""")
_CONTINUATION = range(0x80, 0xC0)  # bytes of UTF-8 that no character begins with

Flags = NDArray[np.bool_]


class Context(NamedTuple):
    """A token and the text around it."""

    text: str
    """With the token's piece between `OPEN` and `CLOSE`."""
    first: int
    """Position in the row of the first token that is shown."""
    last: int
    """Of the last one."""


class StoreText:
    """The text of a store's rows.

    Args:
        tokenizer: the one that the store's tokens came from.
    """

    def __init__(self, reader: StoreReader, tokenizer: Tokenizer) -> None:
        self._reader = reader
        self._vocabulary = _Vocabulary(tokenizer)
        self._types_in: dict[int, Ints] = {}  # chunks in use
        self._per_chunk = reader.spec.chunk_rows * reader.spec.context

    @property
    def type_names(self) -> list[str]:
        """The types of token that there were so far, by their numbers.

        A type is the text of a token, or of a piece, in lower case and without outer spaces.
        """
        return self._vocabulary.type_names

    def numbers_of(self, names: list[str]) -> Ints:
        """The number here of each of another store text's types, by their names."""
        return np.array([self._vocabulary.number_of(name) for name in names], np.int64)

    def types(self, token_N: Ints) -> Ints:
        """The type of each token; NO_TYPE where an end of the row cuts its character.

        Args:
            token_N: row of the store times its context, plus the position; ascending.
        """
        chunk_N = token_N // self._per_chunk
        chunks = range(int(chunk_N[0]), int(chunk_N[-1]) + 1)
        known = self._types_in
        self._types_in = {c: known[c] if c in known else self._chunk(c).type_N for c in chunks}
        edges = np.searchsorted(chunk_N, [*chunks, chunks.stop])
        parts = zip(chunks, edges[:-1], edges[1:], strict=True)
        return np.concatenate(
            [self._types_in[c][token_N[a:b] - c * self._per_chunk] for c, a, b in parts]
        )

    def contexts(self, token_C: Ints, max_tokens: int) -> list[Context]:
        """The sentence around each of C tokens that have a type, `max_tokens` of it at most.

        Args:
            token_C: as for `types`, in any order.
        """
        found: dict[int, Context] = {}
        wanted = np.unique(token_C)
        chunks, begins = np.unique(wanted // self._per_chunk, return_index=True)
        for chunk, inside in zip(chunks.tolist(), np.split(wanted, begins)[1:], strict=True):
            contexts = self._chunk(chunk).contexts(inside - chunk * self._per_chunk, max_tokens)
            found |= zip(inside.tolist(), contexts, strict=True)
        return [found[token] for token in token_C.tolist()]

    def _chunk(self, chunk: int) -> _ChunkText:
        return _ChunkText(self._reader.rows(chunk), self._vocabulary)


class _Spans(NamedTuple):
    """For each of some tokens the first and the last one of what it belongs to."""

    first_N: Ints
    last_N: Ints

    def of(self, token_C: Ints) -> _Spans:
        return _Spans(self.first_N[token_C], self.last_N[token_C])


class _ChunkText:
    """The rows of a chunk one after the other; N counts their positions."""

    def __init__(self, rows: TokenRows, vocabulary: _Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._context = rows.tokens_RT.shape[1]
        self._id_N = rows.tokens_RT.ravel()
        first = 0 if vocabulary.tokenizer.bos_id is None else 1
        position_T = np.arange(self._context)
        text_RT = (position_T >= first) & (position_T < rows.lengths_R[:, None])
        self._is_text_N = text_RT.ravel()
        partial_N = vocabulary.partial_V[self._id_N] & self._is_text_N
        goes_on_N = vocabulary.continues_V[self._id_N] & partial_N
        goes_on_N[1:] &= partial_N[:-1]
        goes_on_N[:: self._context] = False
        self._pieces = _spans(~goes_on_N)
        self.type_N = vocabulary.type_V[self._id_N]
        for piece in _runs(np.flatnonzero(partial_N), goes_on_N):
            self.type_N[piece] = vocabulary.type_of_partial(self._id_N[piece].tolist())
        self._separates_N = self._id_N == vocabulary.tokenizer.separator_id

    def contexts(self, token_C: Ints, max_tokens: int) -> list[Context]:
        """As `StoreText.contexts`, of tokens counted from the chunk's first."""
        mark, shown = self._pieces.of(token_C), self._shown(token_C, max_tokens)
        columns = (shown.first_N, shown.last_N, mark.first_N, mark.last_N)
        bounds = list(zip(*(column.tolist() for column in columns), strict=True))
        ids, decode = self._id_N.tolist(), self._vocabulary.decode
        texts = zip(
            decode([ids[first:begin] for first, _, begin, _ in bounds]),
            decode([ids[begin : end + 1] for _, _, begin, end in bounds]),
            decode([ids[end + 1 : last + 1] for _, last, _, end in bounds]),
            strict=True,
        )
        return [
            Context(_marked(*parts), first % self._context, last % self._context)
            for parts, (first, last, _, _) in zip(texts, bounds, strict=True)
        ]

    def _shown(self, token_C: Ints, max_tokens: int) -> _Spans:
        """What is shown of the sentence around each token: whole pieces, its own in any case."""
        sentence, own = self._sentences().of(token_C), self._pieces.of(token_C)
        earliest_C = np.maximum(own.last_N - max_tokens + 1, sentence.first_N)
        latest_C = np.minimum(own.first_N, sentence.last_N - max_tokens + 1)
        latest_C = np.maximum(latest_C, sentence.first_N)
        first_C = np.clip(token_C - max_tokens // 2, earliest_C, latest_C)
        last_C = np.minimum(first_C + max_tokens - 1, sentence.last_N)
        at_first, at_last = self._pieces.of(first_C), self._pieces.of(last_C)
        first_C = np.where(at_first.first_N == first_C, first_C, at_first.last_N + 1)
        last_C = np.where(at_last.last_N == last_C, last_C, at_last.first_N - 1)
        return _Spans(np.minimum(first_C, own.first_N), np.maximum(last_C, own.last_N))

    def _sentences(self) -> _Spans:
        """The sentence of each token, within a document; separators are on their own."""
        shown_N = self._is_text_N & (self.type_N != NO_TYPE) & ~self._separates_N
        begins_N = ~shown_N
        begins_N[1:] |= ~shown_N[:-1] | self._vocabulary.ends_sentence_V[self._id_N[:-1]]
        begins_N[:: self._context] = True
        return _spans(begins_N)


class _Vocabulary:
    """What is known of each token id by itself; V counts ids.

    Partial tokens are those whose bytes are not whole characters; `continues_V` are those of them
    that begin within one.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.type_names: list[str] = []
        self._types: dict[str, int] = {}
        self._types_of_bytes: dict[bytes, int] = {}
        # a text to go on from: decoded alone, a token may lose the space before it
        self._begun = tokenizer.encode(["a"])[0].tolist()
        self._skipped = len(tokenizer.backend.decode(self._begun))
        size = max(tokenizer.backend.get_vocab(with_added_tokens=True).values()) + 1
        text_V = self.decode([[index] for index in range(size)])
        self.type_V = np.array([self._type_of(text) for text in text_V], np.int64)
        self.ends_sentence_V = np.array([bool(_SENTENCE_END.fullmatch(text)) for text in text_V])
        self._bytes = {
            index: content
            for index, text in enumerate(text_V)
            if _UNDECODABLE in text and (content := _partial_bytes(tokenizer, index))
        }
        self.partial_V = np.zeros(len(text_V), np.bool_)
        self.partial_V[list(self._bytes)] = True
        self.continues_V = np.zeros(len(text_V), np.bool_)
        self.continues_V[[i for i, b in self._bytes.items() if b[0] in _CONTINUATION]] = True

    def decode(self, ids: list[list[int]]) -> list[str]:
        """What tokens, whole characters together, add to a text."""
        begun = [self._begun + more for more in ids]
        texts = self.tokenizer.backend.decode_batch(begun, skip_special_tokens=False)
        return [text[self._skipped :] for text in texts]

    def type_of_partial(self, ids: list[int]) -> int:
        """The type of partial tokens together; NO_TYPE where they are no whole characters."""
        content = b"".join(self._bytes[index] for index in ids)
        if content not in self._types_of_bytes:
            try:
                self._types_of_bytes[content] = self._type_of(content.decode())
            except UnicodeDecodeError:
                self._types_of_bytes[content] = NO_TYPE
        return self._types_of_bytes[content]

    def _type_of(self, text: str) -> int:
        return self.number_of(text.lower().strip())

    def number_of(self, name: str) -> int:
        """The number of a type, a new one where there is none of that name."""
        if name not in self._types:
            self._types[name] = len(self.type_names)
            self.type_names.append(name)
        return self._types[name]


def _partial_bytes(tokenizer: Tokenizer, index: int) -> bytes | None:
    """The bytes of a token that are not whole characters; None for one that is text after all."""
    name: str = tokenizer.backend.id_to_token(index) or ""
    if single := _BYTE_FALLBACK.fullmatch(name):
        content = bytes.fromhex(single[1])
    elif all(letter in _BYTE_OF_LETTER for letter in name):
        content = bytes(_BYTE_OF_LETTER[letter] for letter in name)
    else:
        return None
    try:
        content.decode()
    except UnicodeDecodeError:
        return content
    return None


def _byte_of_letter() -> dict[str, int]:
    """The letters that byte-level tokens are spelled with (GPT-2): Latin-1's visible characters
    stand for their own bytes, the letters from 256 on for the others in order."""
    letters = {chr(b): b for b in range(256) if chr(b).isprintable() and chr(b) != " "}
    others = sorted(set(range(256)) - set(letters.values()))
    return letters | {chr(256 + n): b for n, b in enumerate(others)}


_BYTE_OF_LETTER = _byte_of_letter()


def _marked(before: str, part: str, after: str) -> str:
    """The part in its text between marks, its outer spaces outside of them."""
    core = part.strip() or part
    begin = part.index(core)
    end = begin + len(core)
    return f"{before}{part[:begin]}{OPEN}{core}{CLOSE}{part[end:]}{after}".strip()


def _spans(begins_N: Flags) -> _Spans:
    """Each token's first and last companion, where they begin at the flags."""
    starts = np.flatnonzero(begins_N)
    number_N = np.cumsum(begins_N) - 1
    ends = np.append(starts[1:], len(begins_N)) - 1
    return _Spans(starts[number_N], ends[number_N])


def _runs(token_P: Ints, goes_on_N: Flags) -> Iterator[Ints]:
    """Tokens split before each that does not go on with the one before."""
    if len(token_P):
        yield from np.split(token_P, np.flatnonzero(~goes_on_N[token_P])[1:])
