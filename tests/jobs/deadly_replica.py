"""A real replica whose process ends where a certain prompt is about to be generated."""

import os
import signal

from actors.replica import Replica
from actors.rows import ShardResult, ShardTask

DEADLY = "This prompt ends every replica."


class DeadlyReplica(Replica):
    """See `actors.replica.Replica`."""

    def run_shard(self, task: ShardTask) -> ShardResult:
        """As if the row needed more memory than there is."""
        if any(row.prompt == DEADLY and row.error is None for row in task.rows):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().run_shard(task)
