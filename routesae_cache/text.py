"""Documents from a preset, a hub data set or local files: streamed, shuffled, never all at once."""

import logging
import random
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import datasets
import zstandard

from routesae_cache.corpus_files import (
    FORMATS,
    CorpusFiles,
    TextError,
    address,
    corpus_files,
    is_pattern,
    matching_paths,
)
from routesae_cache.hub import current_commit, hub_errors
from routesae_cache.presets import CORPORA, WheelFile, hub_id, wheel_path

__all__ = ["Document", "TextConfig", "TextError", "TextIdentity", "TextSource", "open_text"]

# Columns worth keeping beside the text of a corpus that is no preset.
_METADATA = ("title", "url", "date", "id")

# The shuffle buffer holds no more text than this, however long the documents are.
_BUFFER_CHARACTERS = 64 * 2**20

# What a damaged file raises on its way through `datasets`, besides ValueError.
_DAMAGED = (ValueError, zstandard.ZstdError, zipfile.BadZipFile)


class Document(NamedTuple):
    """One text and what is known about it."""

    text: str
    metadata: dict[str, str]
    """Those of the title, date, address ... that the corpus has."""


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Which text to read and in what order."""

    dataset: str
    """A preset, a hub id (`owner/name`, `owner/name:configuration`), or a local file, folder or
    glob."""
    text_field: str | None = None
    """The column that holds the text; by default the preset's, else `text`."""
    split: str = "train"
    seed: int = 42
    shuffle_buffer: int = 10_000
    """At most so many documents are held back to be shuffled."""

    def __post_init__(self) -> None:
        if self.shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer must be at least 1, found {self.shuffle_buffer}")


@dataclass(frozen=True, kw_only=True)
class TextIdentity:
    """What decides which documents come in which order."""

    dataset: str
    """The preset, the hub id, or the last part of the local path."""
    text_field: str
    split: str
    seed: int
    shuffle_buffer: int
    files: tuple[tuple[str, int], ...]
    """Name and size in bytes of each local file; none for the hub."""
    revision: str | None
    """The hub's commit; None for local files."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**asdict(self), "files": [list(file) for file in self.files]}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        return cls(**{**fields, "files": tuple((name, size) for name, size in fields["files"])})


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """A corpus that was found and checked, and not yet read."""

    identity: TextIdentity
    metadata_fields: tuple[str, ...]
    files: CorpusFiles | None
    """None for a data set of the hub."""

    def documents(self) -> Iterator[Document]:
        """Every document that is not empty, in an order that the seed decides.

        Holds at most `shuffle_buffer` documents and 64 Mi characters at a time (or one document
        that is longer). TextError where the text field is missing or is not text, where a file
        is damaged, where there is no text at all, and where the hub does not give the data.
        """
        documents = self._in_order()
        if self.files is None or not self.files.whole:  # else the files themselves were shuffled
            documents = _shuffled(documents, self.identity.seed, self.identity.shuffle_buffer)
        name, empty = self.identity.dataset, True
        with hub_errors(TextError, "data set", name):
            try:
                for document in documents:
                    empty = False
                    yield document
            except TextError:
                raise
            except _DAMAGED as error:
                raise TextError(f"the data set {name!r} cannot be read: {error}") from error
        if empty:
            raise TextError(f"{name!r} holds no text in the field {self.identity.text_field!r}")

    def _in_order(self) -> Iterator[Document]:
        records = self._hub_records() if self.files is None else self._file_records(self.files)
        for record in records:
            text = self._text(record)
            if text.strip():
                yield Document(text, self._metadata(record))

    def _file_records(self, files: CorpusFiles) -> Iterable[Mapping[str, object]]:
        addresses = [address(path) for path in files.paths]
        random.Random(self.identity.seed).shuffle(addresses)
        _silence()
        records: Iterable[Mapping[str, object]]
        try:
            records = datasets.load_dataset(
                files.builder, data_files=addresses, split="train", streaming=True, **files.options
            )
        except StopIteration:  # how the JSON builder takes a first file without a record
            raise TextError(f"{addresses[0]} holds no record") from None
        return records

    def _hub_records(self) -> Iterable[Mapping[str, object]]:
        name, _, configuration = self.identity.dataset.partition(":")
        _silence()
        try:
            dataset = datasets.load_dataset(
                CORPORA[name].source if name in CORPORA else name,
                name=configuration or None,
                split=self.identity.split,
                revision=self.identity.revision,
                streaming=True,
            )
        except RuntimeError as error:  # a data set that is a program
            raise TextError(f"the data set {name!r} cannot be read: {error}") from error
        # a buffer of one shuffles the files alone; the documents are shuffled here
        records: Iterable[Mapping[str, object]] = dataset.shuffle(
            seed=self.identity.seed, buffer_size=1
        )
        return records

    def _text(self, record: Mapping[str, object]) -> str:
        field = self.identity.text_field
        if field not in record:
            raise TextError(
                f"{self.identity.dataset!r} has no field {field!r} to read text from; "
                f"it has {', '.join(map(repr, record))}"
            )
        text = record[field]
        if text is None:
            return ""
        if not isinstance(text, str):
            raise TextError(
                f"the field {field!r} of {self.identity.dataset!r} holds "
                f"{type(text).__name__}, expected text; it has {', '.join(map(repr, record))}"
            )
        return text

    def _metadata(self, record: Mapping[str, object]) -> dict[str, str]:
        found = ((name, record.get(name)) for name in self.metadata_fields)
        return {name: str(value) for name, value in found if value not in (None, "")}


def open_text(config: TextConfig) -> TextSource:
    """Find a corpus and check what can be checked without reading it.

    UnknownNameError or MissingWheelError for a name that stands for nothing here. TextError for
    files of an unknown or of several formats, and for a data set that the hub does not have or
    does not let one read, or when the hub cannot be reached.
    """
    preset = CORPORA.get(config.dataset)
    found = _locate(config.dataset)
    name = config.dataset
    files: CorpusFiles | None = None
    revision: str | None = None
    if isinstance(found, CorpusFiles):
        files = found
        if config.split != "train":
            raise TextError(f"local files have no split {config.split!r}; leave it at 'train'")
        if preset is None:
            name = Path(name).expanduser().resolve().name
    else:
        with hub_errors(TextError, "data set", found):
            revision = current_commit("data set", found, None)
    identity = TextIdentity(
        dataset=name,
        text_field=config.text_field or (preset.text_field if preset else "text"),
        split=config.split,
        seed=config.seed,
        shuffle_buffer=config.shuffle_buffer,
        files=files.sizes() if files else (),
        revision=revision,
    )
    fields = preset.metadata if preset else _METADATA
    return TextSource(identity=identity, metadata_fields=fields, files=files)


def _locate(name: str) -> CorpusFiles | str:
    """The files a data set's name stands for, or its hub id."""
    if name in CORPORA:
        source = CORPORA[name].source
        return corpus_files([wheel_path(source)]) if isinstance(source, WheelFile) else source
    paths = matching_paths(name)
    if paths:
        return corpus_files(paths)
    if is_pattern(name):
        raise TextError(f"no file matches {name!r}")
    return hub_id("data set", name.partition(":")[0], tuple(FORMATS))


def _shuffled(documents: Iterable[Document], seed: int, size: int) -> Iterator[Document]:
    """Draw documents at random from a pool of the last ones read."""
    rng = random.Random(seed)
    pool: list[Document] = []
    characters = 0

    def draw() -> Document:
        chosen = int(rng.random() * len(pool))
        pool[chosen], pool[-1] = pool[-1], pool[chosen]
        return pool.pop()

    for document in documents:
        pool.append(document)
        characters += len(document.text)
        while len(pool) > size or (characters > _BUFFER_CHARACTERS and len(pool) > 1):
            drawn = draw()
            characters -= len(drawn.text)
            yield drawn
    while pool:
        yield draw()


def _silence() -> None:
    """Leave bars and messages to the command line; what goes wrong is raised."""
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
