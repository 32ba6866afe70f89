"""`rasd verify DIR`: whether every row of a job is there exactly once and every byte as it was committed."""

import hashlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from typing import cast

import pyarrow as pa
import pyarrow.parquet as pq

from actors.object_store import sizes
from jobs.commit import Commit
from jobs.finished import JobOutput, parser_for
from jobs.storage import COMMITS

_MOST_SHOWN = 20


def main(arguments: Sequence[str]) -> int:
    """Parse and check; returns the exit code, raises RasdError."""
    parser = parser_for(
        "verify",
        "DIR",
        "Read every byte of a job's output: each row once, checksums, schema.",
        "Exit codes: 0 whole and intact, 1 incomplete or damaged, 2 DIR holds no job.",
    )
    return verify(parser.parse_args(arguments).output)


def verify(directory: str) -> int:
    """Print a line for each problem, and as the last line a JSON record.

    Raises:
        InputError: it holds no job.
    """
    output = JobOutput.read(directory)
    problems = list(_problems(output))
    for problem in problems[:_MOST_SHOWN]:
        print(problem)
    if len(problems) > _MOST_SHOWN:
        print(f"and {len(problems) - _MOST_SHOWN} more")
    if problems:
        print(
            "The command of the job, run again, generates anew what is missing or of another size. Remove first what"
            " only its sha256 gives away."
        )
    record = {
        "state": "damaged" if problems else "intact",
        "rows": output.stats.rows,
        "num_rows": output.num_output_rows,
        "errors": output.stats.errors,
        "problems": problems,
    }
    print(json.dumps(record), flush=True)
    return 1 if problems else 0


def _problems(output: JobOutput) -> Iterator[str]:
    where = output.storage.where
    for name in output.damaged:
        yield f"{where(COMMITS)}/{name}: the commit record cannot be read"
    missing = [shard for shard in range(output.num_shards) if shard not in output.commits]
    if missing:
        yield f"{len(missing)} of {output.num_shards} shards are not there, shard {missing[0]} first"
    for shard in sorted(set(output.commits) - set(range(output.num_shards))):
        yield f"{where(output.commits[shard].file)}: the plan has no shard {shard}"
    named = {commit.file for commit in output.commits.values()}
    found = sizes(output.storage.entries())
    for name in found:
        if name.startswith("part-") and name not in named:
            yield f"{where(name)}: no commit names it, so readers of part-*.parquet would see rows twice or unfinished"
    for shard, commit in sorted(output.commits.items()):
        if shard < output.num_shards:
            size = found.get(commit.file)
            yield from (f"{where(commit.file)}: {problem}" for problem in _part_problems(output, commit, size))


def _part_problems(output: JobOutput, commit: Commit, size: int | None) -> Iterator[str]:
    if size is not None and size != commit.bytes:
        yield f"{size:,} bytes, its commit says {commit.bytes:,}"
        return
    try:
        with output.storage.open(commit.file) as file:
            if hashlib.file_digest(cast(io.BufferedIOBase, file), "sha256").hexdigest() != commit.sha256:
                yield "its bytes are not those that were committed (sha256)"
                return
            file.seek(0)
            table = pq.read_table(file)
    except (OSError, pa.ArrowInvalid) as error:
        yield f"cannot be read: {error}"
        return
    types = {field.name: _without_inner_names(str(field.type)) for field in table.schema}
    fingerprint = output.plan["fingerprint"]
    columns = {key.removeprefix("column "): kind for key, kind in fingerprint.items() if key.startswith("column ")}
    wanted = {name: _without_inner_names(kind) for name, kind in columns.items()}
    if types != wanted:
        yield f"columns {sorted(types.items() ^ wanted.items())} are not the plan's"
        return
    keys = list(zip(table["row_index"].to_pylist(), table["sample"].to_pylist(), strict=True))
    if keys != output.keys(commit.shard):
        yield f"its {len(keys)} rows are not those of shard {commit.shard}, each once and in order"
    status = table["status"].to_pylist()
    errors = sum(value == "error" for value in status)
    if set(status) - {"ok", "error"} or errors != commit.stats.errors:
        yield f"{errors} error rows, its commit says {commit.stats.errors}"


def _without_inner_names(kind: str) -> str:
    """Parquet calls the values of lists and the entries of maps otherwise than Arrow does."""
    return re.sub(r"list<\w+: ", "list<", re.sub(r" \('\w+'\)", "", kind))
