"""`rasd status DIR`: how far a job is, while it runs and afterwards. Reads, never writes."""

import json
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from jobs.finished import JobOutput, parser_for
from jobs.report import print_table

_WINDOW_SECONDS = 600.0


def main(arguments: Sequence[str]) -> int:
    """Parse and show; raises RasdError."""
    parser = parser_for(
        "status", "DIR", "How far a job is, while it runs and afterwards.", "Exit codes: 0, or 2 if DIR holds no job."
    )
    return status(parser.parse_args(arguments).output)


def status(directory: str) -> int:
    """Print a table, and as the last line a JSON record.

    Raises:
        InputError: it holds no job.
    """
    output = JobOutput.read(directory)
    record = _record(output)
    stats = output.stats
    attempts = output.plan["attempts"]
    done = f"{stats.rows:,} of {output.num_output_rows:,} ({stats.rows / max(output.num_output_rows, 1):.1%})"
    lines: list[tuple[str, Any]] = [
        ("state", record["state"] + (f" by {record['holder']}" if record["holder"] else "")),
        ("shards", f"{len(output.commits):,} of {output.num_shards:,}"),
        ("  others with safe rows", f"{record['shards_in_progress']:,}"),
        ("output rows", done),
        ("  errors", f"{stats.errors:,}"),
        ("tokens", f"{stats.output_tokens:,}"),
        ("tau", f"{stats.tau:.2f}"),
        ("method", attempts[-1]["method"] if attempts else "-"),
        ("runs of the driver", len(attempts)),
    ]
    if record["rows_per_second"]:
        lines.append(("rows/s lately", f"{record['rows_per_second']:,.1f}"))
    if record["seconds_left"] is not None:
        lines.append(("left at that rate", _duration(record["seconds_left"])))
    for name in output.damaged:
        lines.append(("damaged", f"{name}; its shard will be generated again"))
    print_table(lines)
    print(json.dumps(record), flush=True)
    return 0


def _record(output: JobOutput) -> dict[str, Any]:
    holder = output.storage.holder()
    state = "running" if holder else "done" if output.is_complete else "stopped"
    stats = output.stats
    rate = _rate(output) if holder else 0.0
    left = output.num_output_rows - stats.rows
    return {
        "state": state,
        "holder": holder,
        "shards": len(output.commits),
        "num_shards": output.num_shards,
        "shards_in_progress": len(output.storage.progress_shards() - output.commits.keys()),
        "rows": stats.rows,
        "num_rows": output.num_output_rows,
        "errors": stats.errors,
        "tokens": stats.output_tokens,
        "tau": round(stats.tau, 4),
        "accepted_by_source": dict(stats.accepted_by_source),
        "rows_per_second": round(rate, 3),
        "seconds_left": round(left / rate, 1) if rate and left else None,
        "runs": len(output.plan["attempts"]),
        "damaged": list(output.damaged),
    }


def _rate(output: JobOutput) -> float:
    """Rows a second that the present run has committed lately."""
    now = time.time()
    began = datetime.strptime(output.plan["attempts"][-1]["started"], "%Y-%m-%dT%H:%M:%S%z").timestamp()
    since = max(began, now - _WINDOW_SECONDS)
    rows = sum(commit.rows for shard, commit in output.commits.items() if output.committed_at[shard] >= since)
    return rows / (now - since) if now > since else 0.0


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds_left = divmod(rest, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds_left} s"
