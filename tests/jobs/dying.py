"""Tasks that end badly, apart from their test so that a worker imports nothing for them."""

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import DatastoreError


def die(marks: str, deaths: int, directory: str) -> Any:
    """End the worker that runs this, as often as told; counted by files in `marks`."""
    if len(os.listdir(marks)) < deaths:
        Path(marks, str(os.getpid())).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return directory


def fail(directory: str) -> Any:
    """Raise what a full disk makes of a segment."""
    raise DatastoreError(f"no space for {directory}")


def die_before(number: int, owner: Any, names: Sequence[str]) -> None:
    """Make this process kill itself instead of its `number`-th call, from 1, of these functions of a module."""
    calls = 0

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for name in names:
        setattr(owner, name, counted(getattr(owner, name)))
