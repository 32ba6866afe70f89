"""A driver that works on an object store and is killed before its n-th request, for every n.

python -m tests.jobs.crashing_commits URI commit|retry

It commits one shard, or tries the failed rows of a finished job again.

Each n has a prefix of its own below URI. Writes the number of prefixes to stdout. A process of its own, as the client's
threads, once started, do not outlive a fork.
"""

import os
import signal
import sys
from collections.abc import Callable

import obstore

from jobs.commit import CommitLog
from jobs.storage import open_storage
from tests.jobs import retrying
from tests.jobs.test_commit import write_part

REQUESTS = ("get", "head", "put", "delete", "list_with_delimiter")


def commit_one(uri: str) -> None:
    """All that a driver does around one commit."""
    storage = open_storage(uri)
    storage.prepare()
    with storage.lease() as lease:
        log = CommitLog(storage, lease)
        log.open()
        log.commit(write_part(log, 0, attempt=1))


def fail_some(uri: str) -> None:
    """A finished job with failed rows."""
    retrying.work(uri, run=1, longest=3, is_retry=False)


def retry(uri: str) -> None:
    """Try them again; nothing is wrong with them now."""
    retrying.work(uri, run=2, longest=9, is_retry=True)


# What is there before, and what is killed.
SCENES: dict[str, tuple[Callable[[str], None], Callable[[str], None]]] = {
    "commit": (lambda uri: None, commit_one),
    "retry": (fail_some, retry),
}


def die_before(number: int) -> None:
    """Make this process kill itself instead of its `number`-th request."""
    count = 0

    def counted(request: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return request(*arguments, **options)

        return call

    for name in REQUESTS:
        setattr(obstore, name, counted(getattr(obstore, name)))


def main(uri: str, scene: str) -> int:
    """Crash at every request in turn, until one driver comes through; returns how many there were."""
    prepare, work = SCENES[scene]
    number = 0
    while True:
        number += 1
        child = os.fork()
        if child == 0:
            status = 1
            try:
                prepare(f"{uri}/{number}")
                die_before(number)
                work(f"{uri}/{number}")
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        if status == 0:
            return number
        assert status == signal.SIGKILL, status


if __name__ == "__main__":
    sys.stdout.write(str(main(*sys.argv[1:])))
