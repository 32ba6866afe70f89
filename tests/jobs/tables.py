"""What a job has committed, as one table."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.commit import read_commits
from jobs.storage import Storage, open_storage


def table_of(output: Storage | str | Path) -> pa.Table:
    """All committed rows in the order of their shards."""
    storage = open_storage(output)
    return pa.concat_tables([pq.read_table(storage.open(commit.file)) for commit, _ in read_commits(storage) if commit])
