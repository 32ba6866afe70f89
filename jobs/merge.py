"""`rasd merge DIR -o FILE`: a job's output as one file, in the order of the inputs."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.commit import StoredPart, committed_parts
from jobs.files import writing
from jobs.finished import JobOutput, parser_for
from pipeline.durable import fsync
from pipeline.errors import ConfigError, InputError

_SUFFIXES = (".parquet", ".jsonl")


def main(arguments: Sequence[str]) -> int:
    """Parse and merge; raises RasdError."""
    parser = parser_for(
        "merge",
        "DIR -o FILE [--partial]",
        "Write a job's output as one file, in the order of the inputs.",
        "Exit codes: 0 done, 1 failed, 2 DIR holds no finished job.",
    )
    parser.add_argument("-o", "--file", metavar="FILE", type=Path, required=True, help="a new .parquet or .jsonl file")
    parser.add_argument("--partial", action="store_true", help="of an unfinished job, too: the shards that are done")
    known = parser.parse_args(arguments)
    return merge(known.output, known.file, is_partial=known.partial)


def merge(directory: str, file: Path, *, is_partial: bool = False) -> int:
    """Write `file`, whole or not at all, one part in memory at a time; prints a JSON record.

    Raises:
        InputError: the directory holds no job, an unfinished one, or a damaged part.
        ConfigError: the file exists, or its name says no known format.
        JobError: it cannot be written.
    """
    output = JobOutput.read(directory)
    if file.suffix not in _SUFFIXES:
        raise ConfigError(f"-o is {str(file)!r}; its name must end in {' or '.join(_SUFFIXES)}.")
    if file.exists():
        raise ConfigError(f"-o is {str(file)!r}, which exists; choose another name, or remove it.")
    if not output.is_complete and not is_partial:
        raise InputError(
            f"{directory} is not finished: {len(output.commits)} of {output.num_shards} shards are done. Run the job's"
            " command again, or give --partial for what there is."
        )
    parts = committed_parts(output.storage, directory)
    temporary = file.with_name(file.name + ".tmp")
    with writing(file):
        try:
            rows = (_parquet if file.suffix == ".parquet" else _jsonl)(parts, temporary)
            fsync(temporary)
            temporary.replace(file)
            fsync(file.absolute().parent)
        finally:
            temporary.unlink(missing_ok=True)
    print(json.dumps({"file": str(file), "rows": rows, "bytes": file.stat().st_size}), flush=True)
    return 0


def _parquet(parts: Iterator[StoredPart], file: Path) -> int:
    rows = 0
    writer: pq.ParquetWriter | None = None
    try:
        for part in parts:
            table = _read(part)
            writer = writer or pq.ParquetWriter(file, table.schema, compression="zstd")
            writer.write_table(table)
            rows += table.num_rows
    finally:
        if writer is not None:
            writer.close()
    if writer is None:
        raise InputError("no shard is done yet; there is nothing to merge.")
    return rows


def _jsonl(parts: Iterator[StoredPart], file: Path) -> int:
    rows = 0
    with file.open("w", encoding="utf-8") as lines:
        for part in parts:
            for row in _read(part).to_pylist():
                lines.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
                rows += 1
    return rows


def _read(part: StoredPart) -> pa.Table:
    try:
        with part.open() as file:
            return pq.read_table(file)
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(
            f"{part} cannot be read: {error}. Run the job's command again; it makes the shard anew."
        ) from error
