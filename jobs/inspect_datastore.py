"""`rasd datastore inspect` and `verify`: what a datastore holds, and whether every byte of it is as it was written."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datastore.format import SEGMENTS, Manifest, check_digests, read_manifest, read_record
from datastore.segment import open_segment
from jobs.report import print_table
from pipeline.errors import DatastoreError


def inspect(store: Path) -> int:
    """Print a table, and as the last line a JSON record; reads the manifest alone.

    Raises:
        DatastoreError: there is no datastore, or its manifest is damaged.
    """
    manifest = read_manifest(store)
    size = sum(segment.bytes for segment in manifest.segments)
    dense = manifest.dense
    print_table(
        [
            ("datastore", store),
            ("fingerprint", manifest.fingerprint),
            ("tokenizer", manifest.tokenizer),
            ("vocabulary", f"{manifest.vocab_size:,} tokens, {manifest.token_dtype.itemsize} bytes each"),
            ("passages", _described(manifest)),
            ("documents", f"{sum(segment.documents for segment in manifest.segments):,}"),
            ("tokens", f"{manifest.tokens:,}"),
            ("bytes", f"{size:,}, {size / max(manifest.tokens, 1):.2f} a token"),
            *(
                (segment.name, f"{segment.tokens:,} tokens, {segment.documents:,} documents, {segment.bytes:,} bytes")
                for segment in manifest.segments
            ),
        ]
    )
    record = {
        "fingerprint": manifest.fingerprint,
        "tokenizer": manifest.tokenizer,
        "vocab_size": manifest.vocab_size,
        "dense": None if dense is None else asdict(dense),
        **_totals(manifest),
    }
    print(json.dumps(record), flush=True)
    return 0


def verify(store: Path) -> int:
    """Read every byte; 0 if all is as written, 1 if not, with a line for each problem, and a JSON record at the end.

    Raises:
        DatastoreError: there is no datastore, or its manifest is damaged.
    """
    manifest = read_manifest(store)
    problems = [*_manifest_problems(store, manifest), *check_digests(store, manifest.segments)]
    # A file of the wrong bytes may be mapped, but says nothing more.
    problems = problems or _structure_problems(store, manifest)
    for problem in problems:
        print(problem)
    state = "damaged" if problems else "intact"
    print(json.dumps({"state": state, "problems": problems, **_totals(manifest)}), flush=True)
    return 1 if problems else 0


def _totals(manifest: Manifest) -> dict[str, Any]:
    return {
        "segments": len(manifest.segments),
        "documents": sum(segment.documents for segment in manifest.segments),
        "tokens": manifest.tokens,
        "passages": sum(segment.passages for segment in manifest.segments),
        "bytes": sum(segment.bytes for segment in manifest.segments),
    }


def _described(manifest: Manifest) -> str:
    if manifest.dense is None:
        return "none"
    count = sum(segment.passages for segment in manifest.segments)
    dense = manifest.dense
    return (
        f"{count:,} of {dense.passage_tokens} tokens, {dense.overlap} shared, {dense.dimension} dimensions of"
        f" {dense.embedder}"
    )


def _manifest_problems(store: Path, manifest: Manifest) -> list[str]:
    """Whether the manifest agrees with the segments' records."""
    problems = []
    for segment in manifest.segments:
        directory = store / SEGMENTS / segment.name
        if read_record(directory) != segment:
            problems.append(f"{directory}: its record is missing, damaged, or not the manifest's")
    return problems


def _structure_problems(store: Path, manifest: Manifest) -> list[str]:
    problems = []
    for segment in manifest.segments:
        try:
            open_segment(store, segment, manifest.vocab_size, manifest.dense.dimension if manifest.dense else None)
        except DatastoreError as error:
            problems.append(str(error))
    return problems
