"""Everything that can be wrong with a store, by name. All are ValueErrors: a user can mend them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class StoreError(ValueError):
    """Something is wrong with a store; the message says what was expected and what to do."""

    def __reduce__(self) -> tuple[Any, ...]:
        # what kinds of it are made from is not what they keep: pickled by what they keep
        return _unpickled, (type(self), self.args, self.__dict__)


class NotAStoreError(StoreError):
    """The path holds no store, or one whose description cannot be read."""


class NewerFormatError(StoreError):
    """The store was written by a later version of this package."""

    def __init__(self, path: object, found: int, known: int) -> None:
        super().__init__(
            f"{path}: store format {found} is newer than format {known}, the latest known here; "
            "upgrade routesae-cache"
        )


class SpecMismatchError(StoreError):
    """The store holds something other than what was asked for."""

    def __init__(self, path: object, differences: Sequence[str]) -> None:
        super().__init__(
            f"{path} was harvested with other settings:\n"
            + "\n".join(f"  {line}" for line in differences)
            + "\nRepeat the settings of the store, or choose another output path."
        )


class IncompleteStoreError(StoreError):
    """Chunks that are needed were never committed."""

    def __init__(
        self, path: object, missing: int, total: int, split: str, advice: str = ""
    ) -> None:
        super().__init__(
            f"{path}: {missing} of {total} chunks of the {split} split are not harvested yet; "
            f"run the same harvest command again, it goes on where it stopped{advice}"
            if total
            else f"{path}: the {split} split has no tokens"
        )


class StoreLockedError(StoreError):
    """Another process is writing to the store."""

    def __init__(self, path: object) -> None:
        super().__init__(
            f"{path} is being written to by another process; wait for it to end or stop it"
        )


class LockLostError(StoreLockedError):
    """This process could not show for too long that it lives; another may be writing by now."""

    def __init__(self, path: object, seconds: float) -> None:
        StoreError.__init__(
            self,
            f"{path}: its lock could not be renewed for {seconds:.0f} s, another process may have "
            "taken it; nothing more is written. See the network and run the same command again",
        )


class PlaceError(StoreError):
    """The place of a store cannot be reached or refuses; what is committed there is intact."""

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(f"{path}: {reason}")


class CorruptChunkError(StoreError):
    """A committed chunk does not read back as it was written."""

    def __init__(self, path: object, chunk: int, array: str, reason: str) -> None:
        super().__init__(
            f"{path}: chunk {chunk} of array {array} is corrupt: {reason}; "
            "`routesae store verify` lists all that is bad"
        )
        self.chunk, self.array, self.reason = chunk, array, reason


class NonFiniteError(StoreError):
    """The model produced activations that are not finite numbers."""

    def __init__(self, row: int, layer: int) -> None:
        super().__init__(
            f"row {row}, layer {layer}: the residual is not finite; nothing of this chunk was "
            "kept. Try --dtype float32 (bfloat16 and float16 can overflow)"
        )
        self.row, self.layer = row, layer


def _unpickled(kind: type[StoreError], args: tuple[Any, ...], kept: dict[str, Any]) -> StoreError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(kept)
    return error
