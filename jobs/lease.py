"""The lease of an output directory: at most one live driver commits to it.

`_lease` names the holder and a random token; its modification time is the heartbeat. Every look at the lease that
decides something happens under an exclusive lock on `_lease.lock`, so that no takeover can fall between a driver's
check of its token and the commit that follows.
"""

import contextlib
import fcntl
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from jobs.files import read_json, write_json
from pipeline.errors import ConfigError, JobError

HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 30.0

log = logging.getLogger(__name__)


class Lease:
    """The right to commit to `output`; a context manager that releases it.

    Args:
        output: an existing directory.

    Raises:
        ConfigError: another driver that is alive holds it.
        JobError: the file system offers no locks.
    """

    def __init__(self, output: Path) -> None:
        self._path = output / "_lease"
        self._lock_path = output / "_lease.lock"
        self._token = secrets.token_hex(16)
        self._stopped = threading.Event()
        with self._locked():
            self._refuse_live_holder()
            write_json(self._path, {"token": self._token, **identity(), "time": time.time()})
        self._heart = threading.Thread(target=self._beat, name="lease-heartbeat", daemon=True)
        self._heart.start()

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._heart.join()
        with self._locked():
            if self._is_ours():
                self._path.unlink()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """A section during which nobody else can take the lease over.

        Raises:
            JobError: somebody already has.
        """
        with self._locked():
            if not self._is_ours():
                raise JobError(
                    f"the lease {self._path} was taken over by {named(read_json(self._path))}, because this driver"
                    f" gave no sign of life for {STALE_SECONDS:.0f} s. That job goes on; this one stops."
                )
            yield

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock_path.open("a") as lock:
            self._lock(lock)
            yield

    def _lock(self, lock: TextIO) -> None:
        deadline = time.monotonic() + STALE_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise JobError(f"{self._lock_path} is locked by a process that hangs; stop that process.") from None
                time.sleep(0.01)
            except OSError as error:
                raise JobError(
                    f"{self._lock_path} cannot be locked: {error}. Choose an --output on a file system with flock."
                ) from error

    def _is_ours(self) -> bool:
        return (read_json(self._path) or {}).get("token") == self._token

    def _refuse_live_holder(self) -> None:
        holder = read_json(self._path)
        if holder is None:
            return
        age = self._age()
        if age < STALE_SECONDS and not is_gone(holder):
            raise ConfigError(
                f"--output {self._path.parent} is in use by {named(holder)}, last heard of {age:.0f} s ago."
                " Wait for it, stop it, or choose another --output."
            )
        log.warning("taking over from %s, which is gone", named(holder))

    def _age(self) -> float:
        # Both times come from the file system's clock: other hosts' clocks may differ from ours.
        os.utime(self._lock_path)
        return self._lock_path.stat().st_mtime - self._path.stat().st_mtime

    def _beat(self) -> None:
        while not self._stopped.wait(HEARTBEAT_SECONDS):
            with self._locked():
                if not self._is_ours():
                    return
                os.utime(self._path)


def live_holder(output: Path) -> str | None:
    """Who works on an output directory now, for people; None if nobody does. Changes nothing.

    Of a driver on another host its heartbeat counts, by this host's clock.
    """
    holder = read_json(output / "_lease")
    if holder is None or is_gone(holder):
        return None
    try:
        age = time.time() - (output / "_lease").stat().st_mtime
    except FileNotFoundError:
        return None
    return named(holder) if age < STALE_SECONDS else None


def identity() -> dict[str, Any]:
    """What tells this process from any other."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _start_of(os.getpid())}


def named(holder: Mapping[str, Any] | None) -> str:
    """A holder, for people."""
    return f"process {holder.get('pid')} on {holder.get('host')}" if holder else "another process"


def _start_of(pid: int) -> str | None:
    """Boot id and start tick of a process of this host, which a reused pid does not share; None if it is gone."""
    try:
        # The command name may hold spaces and brackets; the fields that follow it do not.
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else f"{boot}:{fields[18]}"


def is_gone(holder: Mapping[str, Any]) -> bool:
    """Whether a holder was a process of this host that is no more."""
    return holder.get("host") == socket.gethostname() and _start_of(int(holder["pid"])) != holder.get("started")
