"""What the commands that look at a job's output have in common: its plan and its commits, read and never written."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from actors.rows import ShardStats
from jobs.commit import Commit, read_commits
from jobs.options import Parser
from jobs.plan import shard_rows
from jobs.storage import Storage, open_storage, read_plan
from pipeline.errors import InputError


@dataclass(frozen=True, slots=True)
class JobOutput:
    """A job's output as it is now.

    Attributes:
        plan: its plan.json.
        commits: by shard.
        committed_at: seconds since the epoch by shard, by the clock of where it is.
        damaged: names of commit records that cannot be read.
    """

    storage: Storage
    plan: Mapping[str, Any]
    commits: Mapping[int, Commit]
    committed_at: Mapping[int, float]
    damaged: tuple[str, ...]

    @staticmethod
    def read(output: str) -> "JobOutput":
        """Raises InputError if it is no output of `rasd generate`, ConfigError for a URI that cannot be used."""
        storage = open_storage(output)
        plan = read_plan(storage)
        if plan is None or "fingerprint" not in plan:
            raise InputError(f"{output} is no output of rasd generate: it has no plan.json of one.")
        found = list(read_commits(storage))
        return JobOutput(
            storage,
            plan,
            commits={commit.shard: commit for commit, _ in found if commit is not None},
            committed_at={commit.shard: record.modified for commit, record in found if commit is not None},
            damaged=tuple(record.name for commit, record in found if commit is None),
        )

    @property
    def num_shards(self) -> int:
        return int(self.plan["num_shards"])

    @property
    def num_samples(self) -> int:
        return int(self.plan["fingerprint"]["num_samples"])

    @property
    def num_output_rows(self) -> int:
        return int(self.plan["num_rows"]) * self.num_samples

    @property
    def is_complete(self) -> bool:
        return len(self.commits) == self.num_shards

    @property
    def stats(self) -> ShardStats:
        """Totals of what is committed."""
        return sum((commit.stats for commit in self.commits.values()), ShardStats())

    def keys(self, shard: int) -> list[tuple[int, int]]:
        """The (row_index, sample) that a shard's part file holds, in order."""
        rows = shard_rows(shard, int(self.plan["rows_per_shard"]), int(self.plan["num_rows"]))
        return [(row, sample) for row in rows for sample in range(self.num_samples)]


def parser_for(command: str, usage: str, description: str, epilog: str) -> Parser:
    """Of a command whose first argument is a job's output."""
    parser = Parser(prog=f"rasd {command}", usage=f"rasd {command} {usage}", description=description, epilog=epilog)
    parser.add_argument("output", metavar="DIR", help="the --output of rasd generate, a directory or URI")
    return parser
