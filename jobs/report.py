"""What a job says at its end: report.json, a table for people, and one JSON record as the last line."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from actors.rows import ShardStats
from jobs.commit import Commit
from jobs.storage import Storage
from pipeline.errors import JobError

_TABLE = (
    ("state", "state"),
    ("rows", "output rows"),
    ("ok", "  ok"),
    ("errors", "  errors"),
    ("resumed_shards", "shards from earlier runs"),
    ("resumed_rows", "rows of others that were safe"),
    ("retried_rows", "failed rows tried again"),
    ("seconds", "seconds"),
    ("generating_seconds", "  of these generating"),
    ("tokens", "tokens of this run"),
    ("tokens_per_second", "tokens/s"),
    ("tau", "tau"),
    ("method", "method"),
    ("output", "output"),
)


@dataclass(frozen=True, slots=True)
class Clock:
    """Seconds of this run: from its start, and of these from when the first replica was ready."""

    total: float
    generating: float


def error_types(output: Storage, commits: Iterable[Commit]) -> dict[str, int]:
    """Committed error rows by type, most frequent first."""
    counts: Counter[str] = Counter()
    for commit in commits:
        counts.update(commit.stats.error_types)
        if commit.stats.errors and not commit.stats.error_types:  # committed by an earlier version
            try:
                with output.open(commit.file) as file:
                    column = pq.read_table(file, columns=["error_type"]).column(0)
            except OSError as error:
                raise JobError(
                    f"{output.where(commit.file)} cannot be read for its error rows: {error}. All that was committed"
                    " stays; the same command reports again."
                ) from error
            counts.update(value for value in column.to_pylist() if value is not None)
    return dict(counts.most_common())


def job_record(
    state: str,
    total: ShardStats,
    stats: ShardStats,
    clock: Clock,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """The machine-readable outcome.

    Args:
        state: `done`, `stopped` or `error_rate`.
        total: of everything committed.
        stats: of what this run committed; its speed and tau.
        clock: speed counts from when the first replica was ready; a model's loading is no decoding.
        facts: what else to tell: output, model, method and the like.
    """
    return {
        "state": state,
        "rows": total.rows,
        "ok": total.samples_ok,
        "errors": total.errors,
        "seconds": round(clock.total, 3),
        "generating_seconds": round(clock.generating, 3),
        "resumed_rows": stats.resumed_rows,
        "tokens": stats.output_tokens - stats.resumed_tokens,
        "tokens_per_second": _rate(stats.output_tokens - stats.resumed_tokens, clock.generating),
        "rows_per_second": _rate(stats.rows - stats.resumed_rows, clock.generating),
        "tau": round(stats.tau or total.tau, 4),
        "rounds": total.rounds,
        "drafted": total.drafted,
        "accepted": total.accepted,
        "rounds_without_draft": total.rounds_without_draft,
        "accepted_by_source": dict(total.accepted_by_source),
        "retrieval_misses": stats.retrieval_misses,
        **facts,
    }


def _rate(count: int, seconds: float) -> float:
    return round(count / seconds, 3) if seconds > 0 else 0.0


def print_outcome(record: Mapping[str, Any], *, is_quiet: bool) -> None:
    """The table, unless quiet, then the record as one line."""
    if not is_quiet:
        print_table([(label, record[key]) for key, label in _TABLE if key in record])
        for kind, count in record.get("error_types", {}).items():
            print(f"  {count} x {kind}")
    print(json.dumps(record), flush=True)


def print_table(lines: Iterable[tuple[str, Any]]) -> None:
    """Two columns: label and value."""
    lines = list(lines)
    width = max(len(label) for label, _ in lines)
    for label, value in lines:
        print(f"{label:<{width}}  {value}")
