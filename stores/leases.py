"""Locks on a store where there are none: objects with an owner who shows that he lives.

Each writer has an object of its own, its pulse, that it writes again and again. A lock is an
object that names its owner; it is held as long as the owner's pulse is fresh. It is taken by a
conditional put, either of a key that is not there or in place of a dead owner's. Ages are
differences between times that the server gave, so clocks need not agree.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self

from stores.errors import LockLostError, PlaceError
from stores.locks import FOLDER

if TYPE_CHECKING:
    from stores.objects import Entry, ObjectPlace

logger = logging.getLogger(__name__)
BEAT_S = 15.0
"""Between two signs of life."""
TRUST_S = 100.0
"""After so long without one a writer writes no more."""
EXPIRY_S = 600.0
"""After so long without one others take its locks: `TRUST_S`, and what a request can last."""
_STORE = f"{FOLDER}/store"
_SHARED, _ALONE = "shared", "alone"


class LeaseLocks:
    """What one writer holds of a store in an object store."""

    def __init__(self, place: ObjectPlace, kind: str) -> None:
        self._place, self._kind = place, kind
        self._owner = f"{_machine()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._chunks: set[int] = set()
        self._stopped = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._keep_beating, name="pulse", daemon=True)
        self._thread.start()

    @classmethod
    def take(cls, place: ObjectPlace, *, shared: bool) -> Self | None:
        """The store's lock, or None while somebody has it that it cannot be shared with.

        Whoever comes says so first and then looks whether somebody else is there, so that of two
        that cannot share at most one stays.
        """
        locks = cls(place, _SHARED if shared else _ALONE)
        try:
            if locks._come_in():
                return locks
        except BaseException:
            locks.close()
            raise
        locks.close()
        return None

    def _come_in(self) -> bool:
        if self._kind == _SHARED:
            holder = self._holder(_STORE)
            return holder is None or not self._lives(holder)
        if not self._take(_STORE):
            return False
        for owner in self._pulses(_SHARED):
            if self._lives(owner):
                return False
        self._clear_the_dead()
        return True

    def take_chunk(self, chunk: int) -> bool:
        """Take a chunk; False while another process has it."""
        taken = self._take(f"{FOLDER}/{chunk}")
        if taken:
            self._chunks.add(chunk)
        return taken

    def leave_chunk(self, chunk: int) -> None:
        """Give a chunk back."""
        self._chunks.remove(chunk)
        self._leave(f"{FOLDER}/{chunk}")

    def check(self) -> None:
        """LockLostError where the last sign of life is too long ago."""
        silent = time.monotonic() - self._beaten
        if silent > TRUST_S:
            raise LockLostError(self._place, silent)

    def close(self) -> None:
        """Give everything back."""
        self._stopped.set()
        self._thread.join()
        if time.monotonic() - self._beaten > TRUST_S:
            return  # they may be another's by now
        with suppress(PlaceError):  # what is left behind expires
            for chunk in list(self._chunks):
                self.leave_chunk(chunk)
            if self._kind == _ALONE:
                self._leave(_STORE)
            self._place.remove(self._pulse(self._owner))

    def _take(self, key: str) -> bool:
        """Take the lock with this key."""
        content = json.dumps({"owner": self._owner}).encode()
        if self._place.create(key, content):
            return True
        entry = self._place.entry(key)
        holder = self._holder(key)
        if entry is None or holder is None:
            return self._place.create(key, content)  # given back just now
        if holder == self._owner:
            return True  # the answer to our own request was lost
        if self._lives(holder):
            return False
        logger.info("%s: taking over %s of a writer that is gone", self._place, key)
        return self._place.replace(key, content, entry) or self._holder(key) == self._owner

    def _leave(self, key: str) -> None:
        if self._holder(key) == self._owner:
            self._place.remove(key)

    def _holder(self, key: str) -> str | None:
        try:
            return str(json.loads(self._place.read(key))["owner"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            return ""  # nobody's

    def _pulse(self, owner: str, kind: str | None = None) -> str:
        return f"{FOLDER}/pulse-{kind or self._kind}/{owner}"

    def _pulses(self, kind: str) -> list[str]:
        return [o for o in self._place.names(f"{FOLDER}/pulse-{kind}") if o != self._owner]

    def _lives(self, owner: str) -> bool:
        """Whether the owner of a lock is there still; known at once if he was on this machine."""
        entries = (self._place.entry(self._pulse(owner, kind)) for kind in (_SHARED, _ALONE))
        entry: Entry | None = next((found for found in entries if found is not None), None)
        if entry is None or _died_here(owner):
            return False
        now = self._modified.timestamp() + time.monotonic() - self._beaten
        return now - entry.modified.timestamp() < EXPIRY_S

    def _clear_the_dead(self) -> None:
        """Remove what is left of writers that are gone; this one has the store alone."""
        for kind in (_SHARED, _ALONE):
            for owner in self._pulses(kind):
                if not self._lives(owner):
                    self._place.remove(self._pulse(owner, kind))
        for name in self._place.names(FOLDER):
            if name.isdigit():
                self._place.remove(f"{FOLDER}/{name}")

    def _beat(self) -> None:
        begun = time.monotonic()
        key = self._pulse(self._owner)
        self._place.write(key, b"")
        entry = self._place.entry(key)
        assert entry is not None
        self._modified, self._beaten = entry.modified, begun

    def _keep_beating(self) -> None:
        while not self._stopped.wait(BEAT_S):
            try:
                self._beat()
            except (PlaceError, OSError) as error:  # `check` says when it has been too long
                logger.warning("%s: a sign of life did not go through: %s", self._place, error)


def _machine() -> str:
    """This machine, or container: where a process id means the same process."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    space = Path("/proc/self/ns/pid")
    if not boot.exists():
        return uuid.uuid4().hex  # nobody else's
    return f"{boot.read_text().strip().replace('-', '')}.{space.stat().st_ino}"


def _died_here(owner: str) -> bool:
    machine, _, rest = owner.partition("-")
    pid = rest.partition("-")[0]
    return machine == _machine() and pid.isdigit() and not Path(f"/proc/{pid}").exists()
