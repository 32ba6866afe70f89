"""Small durable writes on a local or shared file system: whole or absent, and on disk before they are relied on.

Raises OSError as it comes; what it means to the user is the caller's affair.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def fsync(path: Path) -> None:
    """Make a file's bytes, or a directory's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_beside(path: Path, value: Mapping[str, Any]) -> Path:
    """Write the JSON of `value` to a temporary file in the directory of `path`, synced; returns its path."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    return temporary


def replace_text(path: Path, text: str) -> None:
    """Replace `path` by text that nobody relies on: who reads it meanwhile sees the old one; it is not synced."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def replace_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace `path` by the JSON of `value`; after a crash it holds the old text or the new one."""
    write_beside(path, value).replace(path)
    fsync(path.parent)
