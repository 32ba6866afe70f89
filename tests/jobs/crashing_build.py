"""Builds a datastore again and again, killed before one durable step after the other, and finishes each of them.

python -m tests.jobs.crashing_build build|append MODEL DIRECTORY CORPUS [MORE]

A process of its own: it forks for every build, which only a process without threads may do. Leaves the results in
DIRECTORY/0, of an undisturbed build, and DIRECTORY/STEP, and prints how many segments were there after each kill.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from datastore.segment import build_segment
from tests.jobs.dying import die_before
from tests.jobs.stores import run_append, run_build

_STEPS = ("fsync", "replace", "rename", "link", "unlink", "rmdir", "mkdir")


def child(work: Callable[[], object], kill_before: int = 0) -> int:
    """Run `work` in a fork that kills itself before that durable step; its exit status, 0 if it came to the end."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    die_before(kill_before, os, _STEPS)
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


def main(command: str, model: Path, directory: Path, corpus: Path, more: Path | None = None) -> None:
    """See the module."""
    build_segment(np.zeros(4, np.int64), np.array([0, 4]), 8)  # what is compiled before the fork is shared

    def build(store: Path) -> Callable[[], object]:
        return lambda: run_build(model, store, corpus, segment_tokens=40)

    def work(store: Path) -> Callable[[], object]:
        if command == "build":
            return build(store)
        assert more is not None
        return lambda: run_append(model, store, more, segment_tokens=40)

    if command == "append":
        assert child(build(directory / "old")) == 0
    step, has_crashed = 0, True
    while has_crashed:
        store = directory / str(step)
        if command == "append":
            shutil.copytree(directory / "old", store)
        status = child(work(store), step)
        assert status in (0, signal.SIGKILL), f"step {step} ended with {status}"
        has_crashed = step == 0 or status == signal.SIGKILL
        segments = len(list((store / "segments").glob("*")))
        sys.stdout.write(json.dumps([step, segments]) + "\n")
        assert child(work(store)) == 0, f"the build could not be finished after a kill before step {step}"
        step += 1


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
