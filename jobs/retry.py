"""`--retry-errors`: the shards with failed rows become unfinished ones, of which all other rows are safe."""

import hashlib
import io
import logging
from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from actors.records import Record, generated_schema
from actors.shard_progress import ShardProgress
from jobs.commit import Commit, CommitLog
from jobs.storage import Storage
from pipeline.errors import JobError

log = logging.getLogger(__name__)


def reopen_failed(
    commits: Mapping[int, Commit], commit_log: CommitLog, output: Storage, schema: pa.Schema, attempt: int
) -> list[Commit]:
    """Take back the commits that count errors, each once the rows that are fine are kept as progress of its shard.

    After a crash at any step each shard is committed as it was, or unfinished with these rows safe.

    Args:
        schema: of the part files.
        attempt: no attempt at any shard has this number.

    Returns:
        The commits that are no more.

    Raises:
        JobError: a part cannot be read, or its rows cannot be kept; or the lease is lost.
    """
    failed = [commit for _, commit in sorted(commits.items()) if commit.stats.errors]
    for commit in failed:
        progress = ShardProgress(commit_log.progress(commit.shard, attempt), schema)
        try:
            progress.save(_fine_rows(output, commit, schema))
        except OSError as error:
            raise JobError(
                f"the rows of {output.where(commit.file)} that are fine cannot be kept while its {commit.stats.errors}"
                f" errors are tried again: {error}. It stays as it is; mend that, or leave --retry-errors out."
            ) from error
        commit_log.reopen(commit.shard)
    if failed:
        log.info(
            "%d rows in %d shards failed in earlier runs and are tried again",
            *(sum(commit.stats.errors for commit in failed), len(failed)),
        )
    return failed


def _fine_rows(output: Storage, commit: Commit, schema: pa.Schema) -> list[Record]:
    with output.open(commit.file) as file:
        data = file.read()
    if hashlib.sha256(data).hexdigest() != commit.sha256:
        # As for one that is missing or cut, see `CommitLog.open`.
        log.warning("%s is not what was committed; its shard will be generated again", output.where(commit.file))
        return []
    table = pq.read_table(io.BytesIO(data), columns=[*generated_schema(schema).names, "status"])
    rows: list[Record] = table.filter(pc.equal(table["status"], "ok")).to_pylist()
    return rows
