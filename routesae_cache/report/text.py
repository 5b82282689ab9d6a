"""Token ids as the pieces of text they stand for, and the tables that keep a page small."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from routesae_cache.tokens import Tokenizer
from stores.reader import StoreReader

_UNFINISHED = "\ufffd"  # the end of a text whose last character has bytes still to come


class TokenText:
    """What each token adds to a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._hf = tokenizer.hf
        self._before = tokenizer.separator_id
        self._known: dict[tuple[int, ...], str] = {}

    def pieces(self, ids: Sequence[int], before: int | None = None) -> list[str]:
        """The text of each token; together they are the text.

        A character of several tokens belongs to the last of them, and the others are empty.

        Args:
            before: the token before these, on which a space at the beginning may depend.
        """
        found: list[str] = []
        context = [self._before if before is None else before]
        shown = self._decode(context)
        for id in ids:
            context.append(int(id))
            text = self._decode(context)
            if text.endswith(_UNFINISHED) and len(context) < 6:
                found.append("")
                continue
            found.append(text[len(shown) :])
            context = [int(id)]
            shown = self._decode(context)
        return found

    def alone(self, id: int) -> str:
        """The text of one token after any other."""
        text = self._decode([self._before, id])
        return text[len(self._decode([self._before])) :]

    def _decode(self, ids: Sequence[int]) -> str:
        key = tuple(ids)
        if key not in self._known:
            self._known[key] = self._hf.decode(
                list(key), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        return self._known[key]


class Strings:
    """A table of strings, each once."""

    def __init__(self) -> None:
        self.table: list[str] = []
        self._index: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        """Its place in the table."""
        place = self._index.setdefault(text, len(self.table))
        if place == len(self.table):
            self.table.append(text)
        return place


class Stretch(NamedTuple):
    """Part of a row of a store."""

    row: int
    first: int
    last: int
    """Included."""


class Segments:
    """The tokens of all stretches that a page shows, each once.

    Args:
        stretches: any order, overlapping or not.
    """

    def __init__(
        self,
        reader: StoreReader,
        text: TokenText,
        strings: Strings,
        stretches: Iterable[Stretch],
    ) -> None:
        self.tokens: list[list[int]] = []
        """Of each segment its pieces, as places in the table of strings."""
        self._starts: dict[int, list[Stretch]] = {}
        self._index: dict[Stretch, int] = {}
        size = reader.spec.chunk_rows
        chunk, rows = -1, None
        for stretch in merged(stretches):
            if stretch.row // size != chunk:
                chunk = stretch.row // size
                rows = reader.rows(chunk).tokens_RT
            assert rows is not None
            ids_T = rows[stretch.row % size].tolist()
            before = ids_T[stretch.first - 1] if stretch.first else None
            pieces = text.pieces(ids_T[stretch.first : stretch.last + 1], before)
            self._index[stretch] = len(self.tokens)
            self.tokens.append([strings(piece) for piece in pieces])
            self._starts.setdefault(stretch.row, []).append(stretch)

    def place(self, stretch: Stretch) -> tuple[int, int]:
        """The segment that a stretch is part of, and where in it the stretch begins."""
        for whole in self._starts[stretch.row]:
            if whole.first <= stretch.first and stretch.last <= whole.last:
                return self._index[whole], stretch.first - whole.first
        raise AssertionError(f"{stretch} is in no segment")


def merged(stretches: Iterable[Stretch]) -> list[Stretch]:
    """The same positions, in stretches that neither overlap nor touch, in order."""
    found: list[Stretch] = []
    for stretch in sorted(stretches):
        last = found[-1] if found else None
        if last and last.row == stretch.row and stretch.first <= last.last + 1:
            found[-1] = last._replace(last=max(last.last, stretch.last))
        else:
            found.append(stretch)
    return found
