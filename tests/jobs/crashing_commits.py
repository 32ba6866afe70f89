"""A driver that is killed before its n-th durable step, or request to an object store, for every n.

python -m tests.jobs.crashing_commits TARGET commit|retry

It commits one shard, or tries the failed rows of a finished job again.

Each n has a directory, or prefix, of its own below TARGET. Writes their number to stdout. A process of its own, as
threads do not outlive a fork: not those of a client, and not the locks and memory that those of Ray or torch have.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import obstore

from jobs.commit import CommitLog
from jobs.storage import open_storage
from tests.jobs import retrying
from tests.jobs.dying import die_before
from tests.jobs.parts import write_part

ROOT = Path(__file__).parents[2]
REQUESTS = ("get", "head", "put", "delete", "list_with_delimiter")
DURABLE_STEPS = ("fsync", "replace", "link", "unlink", "rename", "open")


def commit_one(target: str) -> None:
    """All that a driver does around one commit."""
    storage = open_storage(target)
    storage.prepare()
    with storage.lease() as lease:
        log = CommitLog(storage, lease)
        log.open()
        log.commit(write_part(log, 0, attempt=1))


def fail_some(target: str) -> None:
    """A finished job with failed rows."""
    open_storage(target).prepare()
    retrying.work(target, run=1, longest=3, is_retry=False)


def retry(target: str) -> None:
    """Try them again; nothing is wrong with them now."""
    retrying.work(target, run=2, longest=9, is_retry=True)


# What is there before, and what is killed.
SCENES: dict[str, tuple[Callable[[str], None], Callable[[str], None]]] = {
    "commit": (lambda target: None, commit_one),
    "retry": (fail_some, retry),
}


def crash_at_each_step(target: str, scene: str) -> int:
    """Run this module; returns how many outputs there are below the target, the last of a driver that came through."""
    command = [sys.executable, "-m", "tests.jobs.crashing_commits", target, scene]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def main(target: str, scene: str) -> int:
    """Crash at every step in turn, until one driver comes through; returns how many there were."""
    prepare, work = SCENES[scene]
    number = 0
    while True:
        number += 1
        child = os.fork()
        if child == 0:
            status = 1
            try:
                prepare(f"{target}/{number}")
                die_before(number, *(obstore, REQUESTS) if "://" in target else (os, DURABLE_STEPS))
                work(f"{target}/{number}")
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        if status == 0:
            return number
        assert status == signal.SIGKILL, status


if __name__ == "__main__":
    sys.stdout.write(str(main(*sys.argv[1:])))
