"""A lock of the node: its replicas load their models one after the other, not all at once.

Loading needs more memory than having loaded, and several loads at once read the same disk at several places.
"""

import contextlib
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

log = logging.getLogger(__name__)


def load_lock_path() -> Path:
    """The lock's file: one a node and user, in the temporary directory."""
    return Path(tempfile.gettempdir(), f"rasd-load-{os.getuid()}.lock")


@contextlib.contextmanager
def load_lock() -> Iterator[None]:
    """Holds the node's lock; the system releases it when the process dies, whatever it dies of."""
    begin = time.monotonic()
    with FileLock(load_lock_path()):
        waited = time.monotonic() - begin
        if waited > 1.0:
            log.info("waited %.1f s while another replica of this node loaded its model", waited)
        yield
