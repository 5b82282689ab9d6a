"""The local files that a corpus is made of: found, checked and counted before any is read."""

import glob
import logging
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

logger = logging.getLogger(__name__)

# file name suffix -> the builder of `datasets` that reads it
FORMATS: Mapping[str, str] = {
    ".jsonl": "json",
    ".jsonl.zst": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".zip": "csv",
    ".txt": "text",
}

# A text file up to this size is one document.
WHOLE_FILE_BYTES = 32 * 2**20


class TextError(ValueError):
    """A corpus that cannot be found or read as asked."""


@dataclass(frozen=True, kw_only=True)
class CorpusFiles:
    """Files of one format, in the order of their names."""

    paths: tuple[Path, ...]
    builder: str
    """The builder of `datasets` that reads them."""
    options: Mapping[str, Any]
    """The builder's options."""
    whole: bool
    """Whether each file is one document."""

    def sizes(self) -> tuple[tuple[str, int], ...]:
        """Name relative to the common folder, and size in bytes, of each file."""
        folder = os.path.commonpath([path.parent for path in self.paths])
        return tuple(
            (path.relative_to(folder).as_posix(), path.stat().st_size) for path in self.paths
        )


def matching_paths(name: str) -> list[Path]:
    """The files a file name, a folder (searched to the bottom) or a glob stands for.

    Sorted; empty where nothing of that name exists; of a folder only the files that can be read.
    """
    path = Path(name).expanduser().absolute()
    if path.is_dir():
        found = [p for p in path.rglob("*") if p.is_file() and format_of(p) is not None]
        if not found:
            raise TextError(f"the folder {name} holds no file to read; {_expected()}")
    elif path.exists():
        found = [path]
    else:
        matches = Path(path.anchor).glob(str(path.relative_to(path.anchor)))
        found = [p for p in matches if p.is_file()]
    return sorted(found)


def is_pattern(name: str) -> bool:
    """Whether a name has a glob's wildcards."""
    return glob.has_magic(name)


def corpus_files(paths: Sequence[Path]) -> CorpusFiles:
    """Check that the files are all of one format that can be read; TextError otherwise.

    Files without a byte in them are left out.
    """
    filled = [path for path in paths if path.stat().st_size]
    if not filled:
        raise TextError(f"{', '.join(path.name for path in paths)}: empty, no text to read")
    builders: dict[str, Path] = {}
    for path in filled:
        suffix = format_of(path)
        if suffix is None:
            raise TextError(f"{path} has no suffix that says what it is; {_expected()}")
        builders.setdefault(FORMATS[suffix], path)
    if len(builders) > 1:
        examples = ", ".join(path.name for path in builders.values())
        raise TextError(
            f"the files are of different formats ({examples}); "
            "choose one with a glob such as 'folder/*.jsonl'"
        )
    (builder,) = builders
    options: dict[str, Any] = {}
    whole = False
    if builder == "csv":
        options["keep_default_na"] = False  # the text "NA" is a text
    if builder == "text":
        whole = all(path.stat().st_size <= WHOLE_FILE_BYTES for path in filled)
        options["sample_by"] = "document" if whole else "paragraph"
        logger.info("a document is a %s of the text files", "whole file" if whole else "paragraph")
    return CorpusFiles(
        paths=tuple(filled), builder=builder, options=MappingProxyType(options), whole=whole
    )


def format_of(path: Path) -> str | None:
    """The suffix in FORMATS that a file name ends with."""
    name = path.name.lower()
    return next((suffix for suffix in FORMATS if name.endswith(suffix)), None)


def address(path: Path) -> str:
    """What `datasets` opens a file by: its path, or the one CSV inside a zip archive."""
    escaped = glob.escape(str(path))
    if path.suffix.lower() != ".zip":
        return escaped
    try:
        with zipfile.ZipFile(path) as archive:
            inner = [name for name in archive.namelist() if name.lower().endswith(".csv")]
    except zipfile.BadZipFile as error:
        raise TextError(f"{path} is not a zip archive ({error})") from error
    if len(inner) != 1:
        raise TextError(f"{path} must hold exactly one CSV file, found {len(inner)}")
    if "::" in inner[0]:  # it would be taken for an address, which may be anywhere
        raise TextError(f"{path}: expected a plain name of the CSV file in it, found {inner[0]!r}")
    return f"zip://{glob.escape(inner[0])}::{escaped}"


def _expected() -> str:
    return f"expected one of {' '.join(FORMATS)}"
