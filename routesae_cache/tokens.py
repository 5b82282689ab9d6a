"""Documents to rows of exactly `context` tokens."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import tokenizers
import transformers
from numpy.typing import NDArray

from routesae_cache.lm import loading, pretrained
from routesae_cache.sources import ModelError, ModelSource, resolve_model
from routesae_cache.text import Document

Packing = Literal["joined", "document"]
Ids = NDArray[np.int32]

# What ends a text, where a tokenizer has it. An instruct model's own end-of-sequence token ends
# a turn of a dialogue instead (<|im_end|>, <|eot_id|>).
END_OF_TEXT = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>")

# Documents are tokenised so many at a time, and fewer where they are long.
_BATCH_DOCUMENTS = 64
_BATCH_CHARACTERS = 2**20


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A tokenizer and the tokens that rows are laid out with."""

    hf: Any
    """The transformers tokenizer, for decoding and chat templates."""
    backend: tokenizers.Tokenizer
    """Ours alone, set to read the names of special tokens in a text as text."""
    bos_id: int | None
    """What every row begins with; None for tokenizers without."""
    separator_id: int
    """What comes after every document where documents are joined."""
    pad_id: int
    """What fills a row up; it means nothing beyond the row's length."""
    fingerprint: str
    """sha256 of the serialised tokenizer, the same in every process."""

    def identity(self) -> dict[str, Any]:
        """What decides the rows made from a text, as JSON has it."""
        return {
            "bos_id": self.bos_id,
            "separator_id": self.separator_id,
            "pad_id": self.pad_id,
            "fingerprint": self.fingerprint,
        }

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text, nothing added; special tokens' names in it are plain text."""
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]


class Row(NamedTuple):
    """One window of `context` tokens."""

    tokens: Ids
    """(T,), filled up with padding."""
    length: int
    """How many of them are not padding."""
    documents: list[tuple[int, dict[str, str]]]
    """Position and metadata of each document that begins in this row."""


class _Piece(NamedTuple):
    """A document's tokens, with its separator where it has one, and its metadata."""

    ids: Ids
    metadata: dict[str, str]


def load_tokenizer(name: str | ModelSource) -> Tokenizer:
    """Load the tokenizer of a model by the names that `load_lm` takes.

    Raises what `resolve_model` does, and ModelError for a tokenizer without a fast version, or
    with nothing to put between documents.
    """
    source = resolve_model(name)
    where = pretrained(source)
    with loading(source):
        hf = transformers.AutoTokenizer.from_pretrained(**where)
    return wrap_tokenizer(hf, source.name)


def wrap_tokenizer(hf: Any, name: str) -> Tokenizer:
    """A transformers tokenizer as ours; `name` is for messages. ModelError as `load_tokenizer`."""
    if not hf.is_fast:
        raise ModelError(f"the tokenizer of {name!r} has no fast version (a tokenizer.json)")
    backend = tokenizers.Tokenizer.from_str(hf.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    fingerprint = hashlib.sha256(backend.to_str().encode()).hexdigest()
    backend.encode_special_tokens = True
    special = {str(token): i for i, token in hf.added_tokens_decoder.items() if token.special}
    separators = [special[text] for text in END_OF_TEXT if text in special]
    separator_id = separators[0] if separators else hf.eos_token_id
    if separator_id is None:
        raise ModelError(
            f"the tokenizer of {name!r} has nothing to put between documents: no end-of-sequence "
            f"token and none of {', '.join(END_OF_TEXT)}"
        )
    return Tokenizer(
        hf=hf,
        backend=backend,
        bos_id=hf.bos_token_id,
        separator_id=separator_id,
        pad_id=separator_id if hf.pad_token_id is None else hf.pad_token_id,
        fingerprint=fingerprint,
    )


def rows(
    documents: Iterable[Document], tokenizer: Tokenizer, *, context: int, packing: Packing
) -> Iterator[Row]:
    """Rows of exactly `context` tokens, each beginning with BOS where the tokenizer has one.

    `joined`: documents follow each other, a separator after each, and are cut wherever a row is
    full; only the last row is padded. `document`: each document begins a row of its own and goes
    over as many as it needs, the last of them padded. No token is lost. Documents without a
    token are passed over. ValueError where a row has no room for text.
    """
    head = np.array([] if tokenizer.bos_id is None else [tokenizer.bos_id], dtype=np.int32)
    width = context - len(head)
    if width < 1:
        raise ValueError(f"context must be at least {len(head) + 1} tokens, found {context}")
    pieces = _tokenised(documents, tokenizer)
    if packing == "joined":
        separator = np.array([tokenizer.separator_id], dtype=np.int32)
        windows = _cut((_Piece(np.append(ids, separator), about) for ids, about in pieces), width)
    else:
        windows = (window for piece in pieces for window in _cut([piece], width))
    for text, documents_begun in windows:
        row = np.full(context, tokenizer.pad_id, dtype=np.int32)
        length = len(head) + len(text)
        row[: len(head)] = head
        row[len(head) : length] = text
        yield Row(row, length, [(len(head) + begin, about) for begin, about in documents_begun])


def _cut(
    pieces: Iterable[_Piece], width: int
) -> Iterator[tuple[Ids, list[tuple[int, dict[str, str]]]]]:
    """Windows of `width` tokens (the last may be shorter), and what begins where in each."""
    held: list[Ids] = []
    count = 0
    begun: list[tuple[int, dict[str, str]]] = []
    for ids, about in pieces:
        begun.append((count, about))
        held.append(ids)
        count += len(ids)
        if count < width:
            continue
        # only the last piece crosses a window's end, so all that began did so in the first window
        stream = np.concatenate(held)
        whole = count // width * width
        for start in range(0, whole, width):
            yield stream[start : start + width], begun
            begun = []
        held, count = [stream[whole:]], count - whole
    if count:
        yield np.concatenate(held), begun


def _tokenised(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[_Piece]:
    for batch in _batches(documents):
        ids_of_each = tokenizer.encode([document.text for document in batch])
        for document, ids in zip(batch, ids_of_each, strict=True):
            if len(ids):
                yield _Piece(ids, document.metadata)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
