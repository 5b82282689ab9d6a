"""A store in an object store: S3, Google Cloud Storage, Azure Blob Storage, or what speaks S3."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from stores.errors import PlaceError, StoreError, StoreLockedError
from stores.locks import FOLDER
from stores.obstore import obstore_module, reason
from stores.place import Place

if TYPE_CHECKING:
    from zarr.storage import ObjectStore

    from stores.leases import LeaseLocks

_DESCRIPTION = "zarr.json"
_SCHEMES = ("s3", "gs", "az")
_ATTEMPT_S = 30.0  # without a byte of the answer; a request is then sent again
_REQUEST_S = 120.0  # of one attempt
RETRIES_S = 120.0
"""After so long a request that failed is not sent again."""
PUT_AGAIN_S = 30.0
"""So long a put is begun again whose answer was cut off."""
_PARALLEL = 32
_CUT_OFF = "response body"  # what obstore says of it, among other things
T = TypeVar("T")
_ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")


class Entry(NamedTuple):
    """What an object store says of an object."""

    modified: datetime
    """By the server's clock."""
    e_tag: str


def is_url(text: str) -> bool:
    """Whether a text is a URL rather than a path."""
    return "://" in text


class ObjectPlace(Place):
    """A prefix in a bucket. An object appears whole when it is written, and is safe then.

    Credentials are the usual ones of the environment; they are not kept here.
    """

    parallel = _PARALLEL

    def __init__(self, url: str, endpoint_url: str | None = None) -> None:
        """`endpoint_url`: of a server that speaks S3; None: as the environment says."""
        parts = urlsplit(url)
        if parts.scheme not in _SCHEMES or not parts.hostname or not parts.path.strip("/"):
            kinds = " or ".join(f"{scheme}://BUCKET/PREFIX" for scheme in _SCHEMES)
            raise ValueError(
                f"expected a store as a path or {kinds}, found {_without_secrets(url)}"
            )
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(
                f"{_without_secrets(url)}: credentials do not belong in the URL; "
                "give them in the environment"
            )
        self._url = url.rstrip("/")
        # that of the environment goes with it to other machines
        named = (os.environ.get(name) for name in _ENDPOINT_VARIABLES if parts.scheme == "s3")
        self._endpoint_url = endpoint_url or next((name for name in named if name), None)

    def __str__(self) -> str:
        return self._url

    @property
    def name(self) -> str:
        return self._url.rsplit("/", 1)[-1]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectPlace) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[str, str | None]:
        return self._url, self._endpoint_url

    def __reduce__(self) -> tuple[Any, ...]:
        return ObjectPlace, self._key

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(_PARALLEL, thread_name_prefix="objects")

    @cached_property
    def _client(self) -> Any:
        """Tried once with little patience, so that what is wrong is said at once."""
        self._connect(retries=2, retries_s=10.0, attempt_s=10.0, check=True)
        return self._connect(retries=20, retries_s=RETRIES_S, attempt_s=_ATTEMPT_S)

    def _connect(
        self, *, retries: int, retries_s: float, attempt_s: float, check: bool = False
    ) -> Any:
        obstore = obstore_module()
        config = {} if self._endpoint_url is None else {"endpoint": self._endpoint_url}
        with self._errors():
            client = obstore.store.from_url(
                self._url,
                **config,
                client_options={
                    "allow_http": (self._endpoint_url or "").startswith("http://"),
                    "connect_timeout": timedelta(seconds=5),
                    "read_timeout": timedelta(seconds=attempt_s),
                    "timeout": timedelta(seconds=_REQUEST_S),
                },
                retry_config={
                    "max_retries": retries,
                    "retry_timeout": timedelta(seconds=retries_s),
                    "backoff": {
                        "init_backoff": timedelta(seconds=0.1),
                        "max_backoff": timedelta(seconds=10),
                        "base": 2,
                    },
                },
            )
        if check:
            self._tried(lambda: next(iter(obstore.list(client, chunk_size=1)), None))
        return client

    @contextmanager
    def _errors(self, key: str = "") -> Iterator[None]:
        """What obstore raises, as one of ours."""
        obstore = obstore_module()
        try:
            yield
        except FileNotFoundError:
            raise FileNotFoundError(2, "no such object", f"{self}/{key}") from None
        except (obstore.exceptions.BaseError, ValueError) as error:
            if isinstance(error, StoreError):
                raise
            raise PlaceError(self, reason(error)) from error

    def _tried(
        self, operation: Callable[[], T], key: str = "", *, patience_s: float = RETRIES_S
    ) -> T:
        """What an operation gives, done again where its answer was cut off.

        obstore itself tries again what failed before the answer began, and some of the others.
        """
        give_up, pause = time.monotonic() + patience_s, 0.1
        with self._errors(key):
            while True:
                try:
                    return operation()
                except obstore_module().exceptions.GenericError as error:
                    if _CUT_OFF not in str(error) or time.monotonic() > give_up:
                        raise
                time.sleep(pause)
                pause = min(2 * pause, 10.0)

    def _put(self, key: str, content: bytes, **how: Any) -> None:
        put = partial(obstore_module().put, self._client, key, content, **how)
        self._tried(put, key, patience_s=PUT_AGAIN_S)

    def _list(self, folder: str) -> list[dict[str, Any]]:
        """All objects in a folder and in those inside it."""
        batches = partial(obstore_module().list, self._client, folder or None, chunk_size=1000)
        return self._tried(lambda: [found for batch in batches() for found in batch])

    def exists(self) -> bool:
        return self.entry(_DESCRIPTION) is not None  # what `make` writes last

    def read(self, key: str) -> bytes:
        return self._tried(lambda: bytes(obstore_module().get(self._client, key).bytes()), key)

    def fetch(self, keys: Iterable[str]) -> list[Callable[[], bytes]]:
        return [self._pool.submit(self.read, key).result for key in keys]

    def write(self, key: str, content: bytes, *, durable: bool = False) -> None:
        self._put(key, content, use_multipart=False)

    def create(self, key: str, content: bytes) -> bool:
        """Write an object that is not there yet; False where it is, or came meanwhile.

        After a lost answer it can be our own.
        """
        return self._put_if(key, content, "create")

    def replace(self, key: str, content: bytes, entry: Entry) -> bool:
        """Write an object in place of one that is as `entry` says; False where it is no more."""
        return self._put_if(key, content, {"e_tag": entry.e_tag})

    def _put_if(self, key: str, content: bytes, mode: Any) -> bool:
        refusals = obstore_module().exceptions
        try:
            self._put(key, content, mode=mode)
        except PlaceError as error:
            if isinstance(
                error.__cause__, refusals.AlreadyExistsError | refusals.PreconditionError
            ):
                return False
            raise
        except FileNotFoundError:
            return False
        return True

    def entry(self, key: str) -> Entry | None:
        """What is known of an object, None where there is none."""
        try:
            found = self._tried(lambda: obstore_module().head(self._client, key), key)
        except FileNotFoundError:
            return None
        return Entry(found["last_modified"], found["e_tag"])

    def commit(self, key: str, content: bytes) -> None:
        self.create(key, content)

    def sync(self) -> None:
        """A write has returned only when the object was safe."""

    def make(self, files: Mapping[str, bytes]) -> None:
        locks = self.lock(shared=False)
        if locks is None:
            raise StoreLockedError(self)
        try:
            if self.exists():
                raise StoreError(f"{self} exists already and is not a store to go on with")
            self._remove(keep=f"{FOLDER}/")  # of one that was never finished
            for key in files:
                if key != _DESCRIPTION:
                    self.write(key, files[key])
            locks.check()
            self.write(_DESCRIPTION, files[_DESCRIPTION])
        finally:
            locks.close()

    def remove(self, key: str) -> None:
        with suppress(FileNotFoundError):
            self._tried(lambda: obstore_module().delete(self._client, key), key)

    def remove_all(self) -> None:
        self.remove(_DESCRIPTION)  # without it there is no store
        self._remove()

    def _remove(self, keep: str | None = None) -> None:
        found = [entry["path"] for entry in self._list("")]
        paths = [path for path in found if keep is None or not path.startswith(keep)]
        for start in range(0, len(paths), 1000):
            delete = partial(obstore_module().delete, self._client, paths[start : start + 1000])
            self._tried(delete)

    def remove_leftovers(self, keys: Iterable[str] | None = None) -> None:
        """An object that was not written whole is not there."""

    def names(self, folder: str) -> list[str]:
        paths = (found["path"] for found in self._list(folder))
        below = (path.removeprefix(f"{folder}/").split("/") for path in paths)
        return list(dict.fromkeys(parts[0] for parts in below))

    def size(self, key: str) -> int:
        return int(self._tried(lambda: obstore_module().head(self._client, key)["size"], key))

    def total_size(self, folder: str = "") -> int:
        return sum(int(found["size"]) for found in self._list(folder))

    def free_bytes(self) -> None:
        """There is no limit; that it can be reached is found here."""
        self.exists()

    def zarr_store(self) -> ObjectStore[Any]:
        from zarr.storage import ObjectStore

        return ObjectStore(self._client, read_only=True)

    def lock(self, *, shared: bool) -> LeaseLocks | None:
        from stores.leases import LeaseLocks

        return LeaseLocks.take(self, shared=shared)


def _without_secrets(url: str) -> str:
    """The URL as it can be shown."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname or ''}{parts.path}"
