"""A lock of the node: its replicas load their models one after the other, not all at once.

Loading needs more memory than having loaded, and several loads at once read the same disk at several places. It is kept
until the memory for keys and values is taken, so that no two replicas count the same free memory as theirs.
"""

import contextlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipeline.durable import write_beside
from pipeline.errors import JobError

LOOK_SECONDS = 30.0  # between two looks at who has it, each of which is logged
# One load takes minutes at most; who waits behind several loads sees the holder change.
LONGEST_SECONDS = 3600.0

log = logging.getLogger(__name__)


def load_lock_path() -> Path:
    """The lock's file: one a node and user, in the temporary directory."""
    return Path(tempfile.gettempdir(), f"rasd-load-{os.getuid()}.lock")


@contextlib.contextmanager
def load_lock(holder: str) -> Iterator[None]:
    """Holds the node's lock; the system releases it when the process dies, whatever it dies of.

    Args:
        holder: who loads, for people who wait.

    Raises:
        JobError: the same process has had it for an hour.
    """
    lock = FileLock(load_lock_path())
    waited = _acquire(lock)
    if waited > 1.0:
        log.info("waited %.1f s while another replica of this node loaded its model", waited)
    try:
        with contextlib.suppress(OSError):  # only those who wait would miss it
            write_beside(_name_path(), {"pid": os.getpid(), "holder": holder}).replace(_name_path())
        yield
    finally:
        lock.release()


def _acquire(lock: FileLock) -> float:
    """Seconds that it took."""
    begin = since = time.monotonic()
    holder: Any = None
    while True:
        try:
            lock.acquire(timeout=LOOK_SECONDS)
            return time.monotonic() - begin
        except Timeout:
            now, found = time.monotonic(), _holder()
        if found != holder:
            holder, since = found, now
        who = "another process" if holder is None else "process {pid} ({holder})".format(**holder)
        if now - since > LONGEST_SECONDS:
            raise JobError(
                f"{who} has been loading its model for {(now - since) / 60:.0f} minutes and keeps {lock.lock_file}, for"
                " which all replicas of this node and user wait. End that process; the same command then resumes the"
                " job."
            )
        log.warning("waiting for %.0f s: %s loads its model on this node first", now - begin, who)


def _name_path() -> Path:
    """Beside the lock, which is emptied by whoever tries to take it."""
    return load_lock_path().with_suffix(".json")


def _holder() -> Any:
    """Who had the lock last."""
    try:
        return json.loads(_name_path().read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
