"""A small job with failed rows, done without Ray, for tests that end `--retry-errors` at each of its steps."""

from pathlib import Path

from actors.rows import InputRow, ShardTask
from jobs.commit import CommitLog
from jobs.config import GenerateConfig
from jobs.retry import reopen_failed
from jobs.storage import Storage, open_storage
from tests.fakes import FakeReplica, Faults
from tests.jobs.parts import SCHEMA

ROWS_A_SHARD = 4
FAILING = (1, 10)  # in shards 0 and 2 of three
FINGERPRINT = {"seed": 0}


def rows(shard: int) -> tuple[InputRow, ...]:
    """Some of them with a long prompt."""
    indices = range(shard * ROWS_A_SHARD, (shard + 1) * ROWS_A_SHARD)
    return tuple(
        InputRow(i, str(i), prompt="a b c d" if i in FAILING else f"p {i}", extra={"input_text": "x"}) for i in indices
    )


def work(output: Storage | str | Path, *, run: int, longest: int, is_retry: bool) -> int:
    """What a run of the driver does; returns how many rows it found safe.

    Args:
        longest: words of a prompt that does not fail.
    """
    storage = open_storage(output)
    resumed = 0
    with storage.lease() as lease:
        log = CommitLog(storage, lease)
        commits = log.open()
        log.keep_progress(FINGERPRINT)
        if is_retry:
            for commit in reopen_failed(commits, log, storage, SCHEMA, 1000 * run + 999):
                del commits[commit.shard]
        config = GenerateConfig(model="m", prompts=("p",), output="o", max_new_tokens=longest)
        for shard in {0, 1, 2} - commits.keys():
            place = log.progress(shard, 1000 * run)
            path, schema = log.part_path(shard, 1000 * run), SCHEMA.serialize().to_pybytes()
            task = ShardTask(shard, 1000 * run, rows(shard), path, schema, place)
            result = FakeReplica(config, 0, "float32", Faults()).run_shard(task)
            resumed += result.stats.resumed_rows
            log.commit(result)
        log.finish()
    return resumed
