"""What a job on a datastore says at its end: a table for people, and one JSON record as the last line."""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from datastore.format import SegmentRecord
from jobs.corpus.corpus import Corpus
from jobs.report import print_table
from jobs.segments.making import Made
from jobs.signals import StopSignals

_TABLE = (
    ("state", "state"),
    ("documents", "documents"),
    ("duplicates", "duplicates left out"),
    ("tokens", "tokens"),
    ("passages", "passages"),
    ("segments", "segments"),
    ("kept_segments", "  of these made earlier"),
    ("bytes", "bytes"),
    ("bytes_per_token", "bytes a token"),
    ("seconds", "seconds"),
    ("tokenised_per_second", "tokens/s of a task tokenising"),
    ("embedded_per_second", "passages/s of a task embedding"),
    ("indexed_per_second", "tokens/s of a task indexing"),
    ("output", "output"),
)

log = logging.getLogger(__name__)


def outcome(state: str, segments: Sequence[SegmentRecord], made: Made, seconds: float) -> dict[str, Any]:
    """The machine-readable outcome.

    Args:
        state: `done`, `complete` (nothing was left to do) or `stopped`.
        segments: all of the datastore.
        seconds: of this run.
    """
    tokens, size = sum(segment.tokens for segment in segments), sum(segment.bytes for segment in segments)
    records = [built.record for built in made.built if built.record is not None]
    new_tokens = sum(record.tokens for record in records)
    passages = sum(record.passages for record in records)
    return {
        "state": state,
        "documents": sum(segment.documents for segment in segments),
        "tokens": tokens,
        "passages": sum(segment.passages for segment in segments),
        "segments": len(segments),
        "kept_segments": len(segments) - len(records),
        "bytes": size,
        "bytes_per_token": round(size / tokens, 3) if tokens else 0.0,
        "seconds": round(seconds, 3),
        "new_tokens": new_tokens,
        "tokenised_per_second": _rate(new_tokens, sum(built.tokenise_seconds for built in made.built)),
        "embedded_per_second": _rate(passages, sum(built.embed_seconds for built in made.built)),
        "indexed_per_second": _rate(new_tokens, sum(built.index_seconds for built in made.built)),
    }


def _rate(count: int, seconds: float) -> float:
    return round(count / seconds, 1) if seconds else 0.0


def corpus_outcome(corpus: Corpus, made: Made, *, is_whole: bool) -> dict[str, Any]:
    """What became of the rows that were read.

    Args:
        is_whole: the job was not stopped, so that documents in no segment are those without a token.
    """
    skipped = dict(corpus.skipped.most_common())
    if is_whole and (empty := corpus.num_documents - sum(segment.documents for segment in made.segments)):
        skipped["no_tokens"] = empty
    return {"duplicates": corpus.num_duplicates, "skipped": skipped}


def print_outcome(record: Mapping[str, Any], *, is_quiet: bool) -> None:
    """The table, unless quiet, then the record as one line."""
    if not is_quiet:
        print_table([(label, record[key]) for key, label in _TABLE if record.get(key) is not None])
        for kind, count in record.get("skipped", {}).items():
            print(f"  skipped {count} x {kind}")
    print(json.dumps(record), flush=True)


def log_outcome(state: str, output: str, signals: StopSignals) -> None:
    """What a person should know that the table does not say."""
    if state == "complete":
        log.info("%s is complete: there was nothing to do", output)
    elif state == "stopped":
        log.warning("stopped by %s; the same command goes on", signals.received)
