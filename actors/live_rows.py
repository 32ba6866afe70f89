"""The outputs a job has committed so far, as token sequences: what a live store starts from after a restart."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from actors.object_store import ObjectStore, is_uri, open_store

log = logging.getLogger(__name__)


def committed_outputs(output: str, max_tokens: int) -> list[np.ndarray]:
    """Output tokens, [L] int32 each, of the newest committed parts, oldest first; about `max_tokens` in all.

    Only speed depends on them: a part that is being removed or cannot be read is passed over.
    """
    found: list[list[np.ndarray]] = []
    total = 0
    try:
        parts = _newest_objects(open_store(output)) if is_uri(output) else _newest_parts(Path(output))
        for name, source in parts:
            if total >= max_tokens:
                break
            try:
                column = pq.read_table(source, columns=["token_ids"])["token_ids"]
            except (OSError, KeyError, pa.ArrowException) as error:
                log.warning("the live store starts without %s: %s", name, error)
                continue
            found.append([np.asarray(row.values, np.int32) for row in column if row.is_valid])
            total += sum(map(len, found[-1]))
    except OSError as error:
        log.warning("the live store starts without more of %s: %s", output, error)
    return [sequence for part in reversed(found) for sequence in part]


def _newest_objects(store: ObjectStore) -> Iterator[tuple[str, pa.BufferReader]]:
    """Parts on an object store that commit records name, the last committed first."""
    for record in sorted(store.entries("_commits"), key=lambda entry: -entry.modified):
        found = store.read(f"_commits/{record.name}")
        try:
            name = json.loads(found.data)["file"] if found is not None else None
        except (ValueError, KeyError):
            continue  # as in `_newest_parts`
        if name is not None and (part := store.read(name)) is not None:
            yield name, pa.BufferReader(part.data)


def _newest_parts(output: Path) -> Iterator[tuple[str, Path]]:
    """Part files that commit records name, the last committed first."""
    records: list[tuple[float, Path]] = []
    for record in (output / "_commits").glob("*.json"):
        try:
            records.append((record.stat().st_mtime, output / json.loads(record.read_text(encoding="utf-8"))["file"]))
        except (OSError, ValueError, KeyError):
            continue  # being written or removed
    return ((path.name, path) for _, path in sorted(records, reverse=True))
