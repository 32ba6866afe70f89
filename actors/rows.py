"""Values that travel between the driver and the replicas: rows in, shards, statistics out.

Knows nothing of how a row is read, generated or committed. Everything here is small, immutable and picklable.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

WITNESSED = "report"  # name of the event in which a replica tells, at its end, how its tokens came about


@dataclass(frozen=True, slots=True)
class RowFailure:
    """Why a row cannot be generated.

    Attributes:
        error_type: short stable name for the `error_type` column, e.g. `malformed_json`.
        message: what was wrong, where, and the remedy, for the `error_message` column.
    """

    error_type: str
    message: str


@dataclass(frozen=True, slots=True)
class InputRow:
    """One row of the inputs.

    Attributes:
        row_index: ordinal over the sorted inputs; with the sample it is the key of an output row.
        id: the input's own id as a string, else `str(row_index)`; need not be unique.
        prompt: plain prompt; None if the row has `messages` or is bad.
        messages: chat messages with `role` and `content`; None if the row has `prompt` or is bad.
        extra: the input's other columns, passed through.
        error: set if the row is bad: it becomes an error row and never reaches the engine.
    """

    row_index: int
    id: str
    prompt: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    error: RowFailure | None = None


@dataclass(frozen=True, slots=True)
class ProgressPlace:
    """Where the finished rows of a shard are kept until it is committed; see `actors.shard_progress`.

    Attributes:
        path: absolute path of this attempt's file, or the URI with which its objects begin; those of other attempts at
            the shard are beside it.
        key: `actors.shard_progress.progress_key` of the job.
    """

    path: str
    key: bytes


@dataclass(frozen=True, slots=True)
class ShardTask:
    """A fixed run of input rows, the unit of commit, sent to one replica.

    Attributes:
        attempt: counts the tries of this shard over the job's whole life; part of the part file's name.
        part_path: absolute path of the part file to write, under OUTPUT/_tmp, or its final URI on an object store.
        schema: the part file's pyarrow schema, serialised with `pyarrow.Schema.serialize`.
        progress: None keeps nothing of an attempt that does not come to its end.
    """

    shard: int
    attempt: int
    rows: tuple[InputRow, ...]
    part_path: str
    schema: bytes
    progress: ProgressPlace | None = None


@dataclass(frozen=True, slots=True)
class ShardStats:
    """Counts summed over output rows; an output row is one sample of one input row.

    Attributes:
        rows: output rows, error rows included: `samples_ok + errors`.
        rounds: verification rounds; drafted, accepted: tree nodes verified and kept.
        accepted_by_source: `accepted` split by who proposed the token.
        error_types: `errors` split by `error_type`; empty in commit records of earlier versions.
        retrieval_misses: rounds and searches for passages that a retrieval service did not answer in full and in time.
        resumed_rows, resumed_tokens: output rows and their tokens that an earlier attempt at their shard had generated.
    """

    rows: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    rounds_without_draft: int = 0
    accepted_by_source: Mapping[str, int] = field(default_factory=dict)
    samples_ok: int = 0
    retrieval_misses: int = 0
    resumed_rows: int = 0
    resumed_tokens: int = 0
    error_types: Mapping[str, int] = field(default_factory=dict)

    def __add__(self, other: "ShardStats") -> "ShardStats":
        # Written out: a job adds once for every row and shard, and a driver for every replica at each look.
        return ShardStats(
            rows=self.rows + other.rows,
            errors=self.errors + other.errors,
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            rounds=self.rounds + other.rounds,
            drafted=self.drafted + other.drafted,
            accepted=self.accepted + other.accepted,
            rounds_without_draft=self.rounds_without_draft + other.rounds_without_draft,
            accepted_by_source=_sum(self.accepted_by_source, other.accepted_by_source),
            samples_ok=self.samples_ok + other.samples_ok,
            retrieval_misses=self.retrieval_misses + other.retrieval_misses,
            resumed_rows=self.resumed_rows + other.resumed_rows,
            resumed_tokens=self.resumed_tokens + other.resumed_tokens,
            error_types=_sum(self.error_types, other.error_types),
        )

    @property
    def tau(self) -> float:
        """New tokens a verification round, bonus included (design section 2); 0 before the first round."""
        return (self.output_tokens - self.samples_ok) / self.rounds if self.rounds else 0.0


def _sum(counts: Mapping[str, int], more: Mapping[str, int]) -> Mapping[str, int]:
    if not more:
        return counts
    total = dict(counts)
    for name, count in more.items():
        total[name] = total.get(name, 0) + count
    return total


@dataclass(frozen=True, slots=True)
class ShardResult:
    """A finished shard: its part file is on disk, synced and readable, or on the object store.

    Attributes:
        rows, bytes, sha256: of the part file at `path`.
        seconds: wall time from the task's arrival to the file's completion.
        has_progress: whether there is progress of the shard, which its commit makes useless.
    """

    shard: int
    attempt: int
    path: str
    rows: int
    bytes: int
    sha256: str
    stats: ShardStats
    seconds: float
    has_progress: bool = False


@dataclass(frozen=True, slots=True)
class ReplicaInfo:
    """What a replica says about itself once its model is loaded.

    Attributes:
        replica: ordinal of the replica in the job.
        max_context: most tokens a row may have, prompt and output together.
        notes: one line each, for the user: what the method lacks, which fallback was taken.
    """

    replica: int
    node: str
    pid: int
    model: str
    device: str
    dtype: str
    load_seconds: float
    max_context: int
    notes: tuple[str, ...] = ()
