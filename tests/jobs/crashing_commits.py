"""A driver that commits one shard to an object store and is killed before its n-th request, for every n.

python -m tests.jobs.crashing_commits URI

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


def main(uri: str) -> int:
    """Crash at every request in turn, until one driver comes through; returns how many there were."""
    number = 0
    while True:
        number += 1
        child = os.fork()
        if child == 0:
            status = 1
            try:
                die_before(number)
                commit_one(f"{uri}/{number}")
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        if status == 0:
            return number
        assert status == signal.SIGKILL, status


if __name__ == "__main__":
    sys.stdout.write(str(main(sys.argv[1])))
