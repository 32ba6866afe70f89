"""Small durable writes on a local or shared file system: whole or absent, and on disk before they are relied on."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.durable import fsync, replace_json, write_beside
from pipeline.errors import JobError


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what goes wrong while `path` is written into JobError."""
    try:
        yield
    except OSError as error:
        raise JobError(
            f"cannot write {path}: {error.strerror or error}. Free space or mend the directory; the same command then"
            " resumes the job."
        ) from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace `path` by the JSON of `value`; after a crash it holds the old text or the new one.

    Raises:
        JobError: it cannot be written.
    """
    with writing(path):
        replace_json(path, value)


def create_json(path: Path, value: Mapping[str, Any]) -> None:
    """Create `path` with the JSON of `value`, never half written.

    Raises:
        JobError: `path` exists, and is left as it is; or it cannot be written.
    """
    with writing(path):
        temporary = write_beside(path, value)
        try:
            # A hard link is the POSIX operation that both publishes a complete file and fails if the name is taken.
            os.link(temporary, path)
        finally:
            temporary.unlink()
        fsync(path.parent)


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`, or None if there is no such file or it holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    return value if isinstance(value, dict) else None
