"""An object store (S3, Google Cloud Storage, Azure) as jobs need it: whole objects, conditional writes, listings.

Such stores have neither rename nor lock. What they have is a write that happens only if the key is absent
(`If-None-Match: *`) or still holds the version that was read (`If-Match`); everything is built on these two. The
client is obstore: of the usual ones only it offers both for all three stores. It repeats reads and plain writes by
itself, but never a conditional write whose answer was lost; that is done here, by looking whether it was carried out.

Knows nothing of jobs. Credentials and endpoint come from the environment of the process: AWS_..., GOOGLE_..., AZURE_...
"""

import functools
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from pipeline.errors import ConfigError

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure"}
_PAUSES = (0.2, 1.0, 3.0, 10.0)
_RETRY_SECONDS = 60

Version = Mapping[str, str]


class ObjectStoreError(OSError):
    """The store did not do what was asked; what it said is the message."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A file or an object, without its content.

    Attributes:
        name: the last part of its path or key.
        modified: seconds since the epoch, by the clock of the file system or store.
    """

    name: str
    bytes: int
    modified: float


@dataclass(frozen=True, slots=True)
class Stored:
    """An object as it was read.

    Attributes:
        version: names this very content; for `ObjectStore.replace`.
        modified: seconds since the epoch, by the store's clock.
    """

    data: bytes
    version: Version
    modified: float


def is_uri(name: str) -> bool:
    """Whether a name given for a directory is a URI instead."""
    return "://" in name


@functools.cache
def open_store(uri: str) -> "ObjectStore":
    """The store behind a URI, with one pool of connections a process; see `ObjectStore` for errors."""
    return ObjectStore(uri)


class ObjectStore:
    """The objects under one prefix.

    Args:
        uri: such as `s3://bucket/prefix`.

    Raises:
        ConfigError: a scheme that is not known, a package that is missing, or settings that are incomplete.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        scheme = uri.partition("://")[0].lower()
        if scheme not in EXTRAS:
            known = ", ".join(f"{name}://" for name in EXTRAS)
            raise ConfigError(f"{uri} is on no known kind of object store; give a directory, or one of {known}.")
        try:
            import obstore
            from obstore.exceptions import BaseError
            from obstore.store import from_url
        except ImportError as error:
            extra = EXTRAS[scheme]
            raise ConfigError(
                f"{uri} needs the package obstore, which is missing here ({error}); install it on every node, with"
                f" the extra that has it: pip install '.[{extra}]'."
            ) from error
        self._api: Any = obstore
        self._errors = BaseError
        endpoints = (os.environ.get(name, "") for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT"))
        # Whoever names an http:// endpoint wants no TLS; the client would want to be told so once more.
        is_plain = any(endpoint.startswith("http://") for endpoint in endpoints)
        try:
            self._store: Any = from_url(
                self.uri,
                client_options={"allow_http": True} if is_plain else None,
                retry_config={"retry_timeout": timedelta(seconds=_RETRY_SECONDS)},
            )
        except (BaseError, ValueError) as error:
            raise ConfigError(f"{uri} cannot be used: {_said(error)}. Check the URI and the environment.") from error

    def read(self, key: str) -> Stored | None:
        """An object, None if there is none; raises ObjectStoreError."""
        try:
            found = self._do("read", key, lambda: self._api.get(self._store, key))
            data = self._do("read", key, lambda: bytes(found.bytes()))
        except FileNotFoundError:
            return None
        return Stored(data, _version(found.meta), found.meta["last_modified"].timestamp())

    def head(self, key: str) -> Entry | None:
        """Size and time of an object, None if there is none; raises ObjectStoreError."""
        try:
            return _entry(self._do("look at", key, lambda: self._api.head(self._store, key)))
        except FileNotFoundError:
            return None

    def names(self) -> list[str]:
        """First parts of all keys, once each; raises ObjectStoreError."""
        found = self._listing("")
        return [*found["common_prefixes"], *(meta["path"] for meta in found["objects"])]

    def entries(self, folder: str = "") -> list[Entry]:
        """The objects right in a folder, sorted by name; raises ObjectStoreError."""
        found = self._listing(folder)
        return sorted((_entry(meta) for meta in found["objects"]), key=lambda entry: entry.name)

    def folders(self, folder: str = "") -> list[str]:
        """Names of the folders right in a folder; raises ObjectStoreError."""
        return sorted(prefix.rstrip("/").rpartition("/")[2] for prefix in self._listing(folder)["common_prefixes"])

    def write(self, key: str, data: bytes) -> Version:
        """Put an object, whatever was there; raises ObjectStoreError."""
        try:
            return _version(self._do("write", key, lambda: self._api.put(self._store, key, data)))
        except FileNotFoundError as error:
            raise self._error("write", key, error) from error

    def create(self, key: str, data: bytes) -> Version | None:
        """Put an object if there is none.

        Args:
            data: unlike anything that another process would put there, by which an answer that was lost is known.

        Returns:
            Its version, or None if there is another object.

        Raises:
            ObjectStoreError: whether it was put is not known, or the store refuses; after two minutes at most.
        """
        return self._conditional(key, data, "create")

    def replace(self, key: str, data: bytes, version: Version) -> Version | None:
        """Put an object if the key still holds `version`; see `create`."""
        return self._conditional(key, data, dict(version))

    def remove(self, keys: Iterable[str]) -> None:
        """Remove objects that may be gone already; raises ObjectStoreError."""
        for key in keys:
            try:
                self._do("remove", key, lambda key=key: self._api.delete(self._store, key))  # type: ignore[misc]
            except FileNotFoundError:
                continue

    def _listing(self, folder: str) -> Any:
        try:
            return self._do("list", folder, lambda: self._api.list_with_delimiter(self._store, folder or None))
        except FileNotFoundError as error:  # of the bucket itself; a folder without objects is empty
            raise self._error("list", folder, error) from error

    def _conditional(self, key: str, data: bytes, mode: Any) -> Version | None:
        from obstore.exceptions import AlreadyExistsError, NotSupportedError, PermissionDeniedError, PreconditionError

        failure: Exception | None = None
        # The client itself tries for so long each time; what had no answer by then is not tried again.
        until = time.monotonic() + _RETRY_SECONDS
        for pause in (*_PAUSES, None):
            try:
                return _version(self._api.put(self._store, key, data, mode=mode))
            except (AlreadyExistsError, PreconditionError, FileNotFoundError) as error:
                failure = error
                found = self.read(key)
                if found is not None:
                    return found.version if found.data == data else None
                if mode != "create":
                    return None
                # Nothing is there: S3 says 409 when another request was in the way, and wants to be asked again.
            except (NotSupportedError, PermissionDeniedError) as error:
                raise self._error("write", key, error) from error
            except self._errors as error:
                failure = error
            if pause is None or time.monotonic() + pause > until:
                break
            time.sleep(pause)
        assert failure is not None
        raise self._error("write", key, failure) from failure

    def _do(self, what: str, key: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except self._errors as error:
            raise self._error(what, key, error) from error

    def _error(self, what: str, key: str, error: Exception) -> ObjectStoreError:
        return ObjectStoreError(f"cannot {what} {self.uri}/{key}: {_said(error)}")


def _version(meta: Mapping[str, Any]) -> Version:
    return {name: meta[name] for name in ("e_tag", "version") if meta[name] is not None}


def _entry(meta: Mapping[str, Any]) -> Entry:
    return Entry(meta["path"].rpartition("/")[2], meta["size"], meta["last_modified"].timestamp())


def _said(error: Exception) -> str:
    # The client appends its own data structures to what the store said.
    return " ".join(str(error).partition("\n\nDebug source")[0].split())[:600]


def split(uri: str) -> tuple[str, str]:
    """The prefix and the last part of a key's URI."""
    prefix, _, name = uri.rpartition("/")
    return prefix, name


def sizes(entries: Sequence[Entry]) -> dict[str, int]:
    """Bytes by name."""
    return {entry.name: entry.bytes for entry in entries}
