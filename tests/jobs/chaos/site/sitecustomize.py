"""Imported by every Python process of a chaos campaign when it starts; ends the process before a step it is told.

A step is a call of the system that changes what is durable, on a path below RASD_CHAOS/outputs; its name is the call
and the path within the job's output, numbers as N: `link _commits/N.json`. The campaign (`../steps.py`) has
this file's folder on PYTHONPATH, so that drivers and replicas alike are the real programs, which know nothing of it.
"""

import errno
import json
import os
import re
import signal
from collections.abc import Callable
from typing import Any

_CALLS = ("fsync", "replace", "rename", "link", "unlink", "mkdir", "rmdir")
_NUMBER = re.compile(r"[0-9a-f]{8,}|\d+")


class _Steps:
    """What this process does before each of its steps."""

    def __init__(self, directory: str) -> None:
        self._outputs = os.path.join(directory, "outputs") + os.sep
        self._fault = os.path.join(directory, "fault.json")
        self._record = os.path.join(directory, "steps.txt")
        self._rename = os.rename
        self._wanted: Any = None
        self._passed = 0

    def before(self, call: str, path: Any, dir_fd: int | None) -> None:
        """Notes the step if steps are noted; dies, or finds the disk full, if this is where."""
        step = self._name(call, path, dir_fd)
        if step is None:
            return
        if os.path.exists(self._record):
            with open(self._record, "a", encoding="utf-8") as file:
                file.write(f"{os.getpid()} {step}\n")
        try:
            with open(self._fault, encoding="utf-8") as file:
                wanted = json.load(file)
        except FileNotFoundError:
            return
        if wanted != self._wanted:
            self._wanted, self._passed = wanted, 0
        if wanted["step"] != step:
            return
        self._passed += 1
        if self._passed < wanted["occurrence"]:
            return
        try:
            self._rename(self._fault, self._fault + ".taken")
        except FileNotFoundError:  # another process was quicker
            return
        if wanted["is_full"]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.kill(os.getpid(), signal.SIGKILL)

    def _name(self, call: str, path: Any, dir_fd: int | None) -> str | None:
        if isinstance(path, int):
            full = os.readlink(f"/proc/self/fd/{path}")
        else:
            base = os.getcwd() if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
            full = os.path.normpath(os.path.join(base, os.fsdecode(path)))
        if not full.startswith(self._outputs):
            return None
        within = full.removeprefix(self._outputs).partition(os.sep)[2]
        return f"{call} {_NUMBER.sub('N', within) or '.'}"


def _stepping(steps: _Steps, name: str) -> Callable[..., Any]:
    function = getattr(os, name)

    def call(path: Any, *arguments: Any, **options: Any) -> Any:
        steps.before(name, path, options.get("dir_fd", options.get("src_dir_fd")))
        return function(path, *arguments, **options)

    return call


if "RASD_CHAOS" in os.environ:
    _steps = _Steps(os.environ["RASD_CHAOS"])
    for _call in _CALLS:
        setattr(os, _call, _stepping(_steps, _call))
