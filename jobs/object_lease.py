"""The lease of an output on an object store: at most one live driver works on it.

`_lease` names the holder and a random token, and is renewed every few seconds. It is created only if absent, and
renewed, taken over and released only if it still is what was read (`If-Match`), so that of two drivers that want it
one gets it. It grows stale by the store's own clock. A driver counts its lease as lost by its own clock some seconds
before another may take it, unless it could renew it.

No object store can shut out a driver that stalls between its look at the lease and the commit after it, as the lock of
a directory does. Nor need it: that no shard is committed to two files is guaranteed by the record alone, which is
created only if absent (see `jobs.object_storage`). The lease only keeps two drivers from doing the same work.
"""

import contextlib
import json
import logging
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from actors.object_store import ObjectStore, ObjectStoreError, Stored, Version
from jobs.lease import HEARTBEAT_SECONDS, STALE_SECONDS, identity, is_gone, named
from pipeline.errors import ConfigError, JobError

LEASE = "_lease"
# Before others may take it: for clocks of whole seconds, and for the commit that follows the look.
MARGIN_SECONDS = 10.0
JOIN_SECONDS = 20.0  # at the end, for a renewal that is under way
_TRIES = 5

log = logging.getLogger(__name__)


class ObjectLease:
    """The right to commit to a prefix of an object store; a context manager that releases it.

    Args:
        store: checked by `check_conditions`.

    Raises:
        ConfigError: another driver that is alive holds it.
        ObjectStoreError: the store does not answer.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._where = f"{store.uri}/{LEASE}"
        self._token = secrets.token_hex(16)
        self._beats = 0
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._renewed_at = time.monotonic()
        self._version = self._acquire()
        self._heart = threading.Thread(target=self._beat, name="lease-heartbeat", daemon=True)
        self._heart.start()

    def __enter__(self) -> "ObjectLease":
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._heart.join(JOIN_SECONDS)
        if self._heart.is_alive():
            log.warning("the lease is not released, and keeps others out for %.0f s: the store hangs", STALE_SECONDS)
            return
        try:
            # Not removed: the client offers no removal on a condition, and by now it may be another's.
            if not self._renew(is_released=True):
                log.warning("the lease %s was not ours any more when it was to be released", self._where)
        except ObjectStoreError as error:
            log.warning("the lease could not be released, and keeps others out for %.0f s: %s", STALE_SECONDS, error)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """A section that begins only while the lease is ours.

        Raises:
            JobError: somebody took it over, or it could not be renewed in time.
        """
        with self._lock:
            try:
                found = self._store.read(LEASE)
                if not self._is_ours(found):
                    raise JobError(
                        f"the lease {self._where} was taken over by {named(_holder(found))}, because this driver gave"
                        f" no sign of life for {STALE_SECONDS:.0f} s. That job goes on; this one stops."
                    )
                if time.monotonic() - self._renewed_at > STALE_SECONDS - MARGIN_SECONDS and not self._renew():
                    raise JobError(
                        f"the lease {self._where} was taken over just now. That job goes on; this one stops."
                    )
            except ObjectStoreError as error:
                raise JobError(f"{error}. Once that is mended, the same command resumes the job.") from error
        yield

    def _acquire(self) -> Version:
        for _ in range(_TRIES):
            self._renewed_at = time.monotonic()
            found = self._store.read(LEASE)
            if found is None:
                version = self._store.create(LEASE, self._content())
            else:
                self._refuse_live_holder(found)
                self._renewed_at = time.monotonic()
                version = self._store.replace(LEASE, self._content(), found.version)
            if version is not None:
                return version
        raise ConfigError(f"--output {self._store.uri} is wanted by several drivers at once. Leave it to one of them.")

    def _refuse_live_holder(self, found: Stored) -> None:
        holder = _holder(found)
        if holder is None or holder.get("released"):
            return
        if not is_gone(holder):
            age = _clock(self._store) - found.modified
            if age < STALE_SECONDS:
                raise ConfigError(
                    f"--output {self._store.uri} is in use by {named(holder)}, last heard of {max(age, 0.0):.0f} s ago."
                    " Wait for it, stop it, or choose another --output."
                )
        log.warning("taking over from %s, which is gone", named(holder))

    def _beat(self) -> None:
        while not self._stopped.wait(HEARTBEAT_SECONDS):
            with self._lock:
                try:
                    if not self._renew():
                        return  # `held` will say so
                except ObjectStoreError as error:
                    log.warning("the lease could not be renewed: %s", error)

    def _renew(self, *, is_released: bool = False) -> bool:
        began = time.monotonic()
        version = self._store.replace(LEASE, self._content(is_released=is_released), self._version)
        if version is None:
            # Ours all the same if the answer to an earlier renewal was lost.
            found = self._store.read(LEASE)
            if found is None or not self._is_ours(found):
                return False
            version = self._store.replace(LEASE, self._content(is_released=is_released), found.version)
        if version is None:
            return False
        self._version, self._renewed_at = version, began
        return True

    def _is_ours(self, found: Stored | None) -> bool:
        return (_holder(found) or {}).get("token") == self._token

    def _content(self, *, is_released: bool = False) -> bytes:
        # No two contents are equal: a version may be no more than a digest of the content.
        self._beats += 1
        value = {"token": self._token, **identity(), "time": time.time(), "beat": self._beats, "released": is_released}
        return json.dumps(value).encode()


def holder_of(store: ObjectStore) -> str | None:
    """Who works on an output now, for people; None if nobody does. Changes nothing, so it goes by this host's clock.

    Raises:
        ObjectStoreError: the store does not answer.
    """
    found = store.read(LEASE)
    holder = _holder(found)
    if found is None or holder is None or holder.get("released") or is_gone(holder):
        return None
    return named(holder) if time.time() - found.modified < STALE_SECONDS else None


def check_conditions(store: ObjectStore) -> None:
    """Make sure that the store keeps to the conditions of writes, on an object of its own.

    Raises:
        ConfigError: it does not, so that a job's guarantees would not hold there.
        ObjectStoreError: it does not answer.
    """
    key = _probe_key()
    try:
        first = store.write(key, b"first")
        second = store.write(key, b"second")
        broken = {
            "creating only if absent (If-None-Match: *)": store.create(key, b"third"),
            "replacing only what was read (If-Match)": store.replace(key, b"fourth", first),
        }
        for condition, written in broken.items():
            if written is not None:
                raise ConfigError(
                    f"--output {store.uri} is on a store that does not support {condition}: it wrote over an object"
                    " that was there. No job can be safe on it; choose another store, or a shared directory."
                )
        if store.replace(key, b"fifth", second) is None:
            raise ConfigError(
                f"--output {store.uri} is on a store that does not replace an object of a known version (If-Match)."
                " Choose another store, or a shared directory."
            )
    finally:
        store.remove([key])


def _clock(store: ObjectStore) -> float:
    """The store's time: other hosts' clocks may differ from ours."""
    key = _probe_key()
    store.write(key, b"")
    found = store.head(key)
    store.remove([key])
    return time.time() if found is None else found.modified


def _probe_key() -> str:
    return f"{LEASE}.{secrets.token_hex(8)}"


def _holder(found: Stored | None) -> Mapping[str, Any] | None:
    try:
        value = json.loads(found.data) if found is not None else None
    except (UnicodeDecodeError, json.JSONDecodeError):
        return None
    return value if isinstance(value, dict) else None
