"""Where a replica puts the rows of a shard: into its part file at the end, and meanwhile where they survive a crash."""

import time
from dataclasses import replace

from actors.parts import PartWriter, finish_shard
from actors.records import Record, restored_record, stats_of
from actors.rows import InputRow, ShardResult, ShardStats, ShardTask
from actors.shard_progress import ShardProgress


class ShardOutput:
    """The output of one attempt at a shard; begins with what is left of earlier ones.

    Raises:
        ConfigError: see `PartWriter`.
    """

    def __init__(self, task: ShardTask) -> None:
        self._task = task
        self._begin = time.perf_counter()
        self._writer = PartWriter(task.part_path, task.schema)
        self._progress = ShardProgress(task.progress, self._writer.schema)
        self._finished = self._progress.read()

    def resume(self, row: InputRow, sample: int, seed: int) -> ShardStats | None:
        """Take a sample over from an earlier attempt; returns its counts, None if it has to be generated."""
        generated = self._finished.get((row.row_index, sample))
        if generated is None or row.error is not None:
            return None
        record = restored_record(row, sample, seed, generated)
        self._writer.add(record)
        resumed = ShardStats(resumed_rows=1, resumed_tokens=record["num_output_tokens"])
        self._writer.count(resumed)
        return stats_of(record) + resumed

    def add(self, record: Record) -> None:
        """Take one output row, as made by `actors.records`."""
        self._writer.add(record)
        if record["status"] == "ok":
            self._progress.add(record)

    def count(self, stats: ShardStats) -> None:
        """Adds counts that belong to the shard but to none of its rows."""
        self._writer.count(stats)

    def seconds_left(self) -> float | None:
        """Until `save_if_due` has something to do; None if it has not."""
        return self._progress.seconds_left()

    def save_if_due(self) -> None:
        """Make rows safe that were added a while ago; `add` does so too, but nothing may come for long."""
        self._progress.save_if_due()

    def finish(self) -> ShardResult:
        """Close the part file and report the shard to the driver; raises JobError as `PartWriter.close` does."""
        result = finish_shard(self._task, self._writer, time.perf_counter() - self._begin)
        return replace(result, has_progress=self._progress.is_there)
