"""Where a model converted from a GGUF file is kept, so that it is converted once."""

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import platformdirs

# Part of the key: raised when what the conversion writes changes.
_CONVERSION = 1

# The fingerprint is taken from so many blocks, evenly spaced, the first and last included.
_BLOCKS, _BLOCK_BYTES = 64, 2**18


def cache_folder() -> Path:
    """ROUTESAE_CACHE_DIR, or the user's cache folder of this platform."""
    chosen = os.environ.get("ROUTESAE_CACHE_DIR")
    return Path(chosen) if chosen else platformdirs.user_cache_path("routesae-cache")


def conversion_folder(file: Path) -> Path:
    """Where the conversion of a file belongs, whether or not it is there."""
    return cache_folder() / "gguf" / f"{file.stem}-{_fingerprint(file)[:16]}-v{_CONVERSION}"


def converted(file: Path, convert: Callable[[Path, Path], None]) -> Path:
    """The folder with a file's conversion, made by `convert(file, folder)` if it is not there.

    It appears whole: a conversion that is interrupted leaves nothing that is taken for one, and
    of two at once either one stays.
    """
    folder = conversion_folder(file)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".converting-", dir=folder.parent) as temporary:
        made = Path(temporary) / "model"
        made.mkdir()
        convert(file, made)
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    return folder


def _fingerprint(file: Path) -> str:
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        for block in range(_BLOCKS):
            stream.seek(block * max(0, size - _BLOCK_BYTES) // (_BLOCKS - 1))
            digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()
