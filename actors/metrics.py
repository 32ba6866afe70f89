"""What a job tells Prometheus, through the metrics agent that Ray runs on each node.

Ray puts `ray_` before each name and `_total` behind a counter's. Replicas count what they do as they finish rows, the
driver what it commits; a lost replica's rows are done and counted again, so only `report.json` counts a row once.

A node's agent forgets a gauge that its process has not set for two report intervals (20 seconds, if Ray's
`metrics_report_interval_ms` is left alone), so a gauge is set at every report of progress, changed or not.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ray.util.metrics import Counter, Gauge, Histogram

from actors.rows import ShardStats

# Besides Ray's own: NodeAddress, SessionName, WorkerId and others. Not `job`, which Prometheus itself sets.
JOB_TAGS = ("rasd_job", "method")
REPLICA_TAGS = (*JOB_TAGS, "replica")
# Seconds; a lookup in the replica takes some microseconds a slot, a call of a service about a millisecond.
LATENCY_BOUNDS = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0, 5.0)


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric.

    Attributes:
        tags: all of its own labels.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    description: str
    tags: tuple[str, ...]

    @property
    def series(self) -> tuple[str, ...]:
        """Names under which Prometheus finds it."""
        endings = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}[self.kind]
        return tuple(f"ray_{self.name}{ending}" for ending in endings)


REPLICA_METRICS = (
    MetricSpec("rasd_rows", "counter", "Output rows finished, error rows included.", REPLICA_TAGS),
    MetricSpec("rasd_error_rows", "counter", "Error rows by error_type.", (*REPLICA_TAGS, "error_type")),
    MetricSpec("rasd_prompt_tokens", "counter", "Prompt tokens of ok rows.", REPLICA_TAGS),
    MetricSpec("rasd_output_tokens", "counter", "Output tokens of ok rows.", REPLICA_TAGS),
    MetricSpec("rasd_rounds", "counter", "Verification rounds.", REPLICA_TAGS),
    MetricSpec("rasd_rounds_without_draft", "counter", "Rounds that verified no tree node.", REPLICA_TAGS),
    MetricSpec("rasd_drafted", "counter", "Tree nodes verified.", REPLICA_TAGS),
    MetricSpec("rasd_accepted", "counter", "Drafted tokens kept, by who proposed them.", (*REPLICA_TAGS, "source")),
    MetricSpec("rasd_tau", "gauge", "New tokens a round since the replica started, bonus included.", REPLICA_TAGS),
    MetricSpec(
        "rasd_retrieval_seconds",
        "histogram",
        "Time of a lookup for a round, or of a search for passages; place is replica or service.",
        (*REPLICA_TAGS, "call", "place"),
    ),
    MetricSpec("rasd_retrieval_misses", "counter", "Calls of a service without a whole answer in time.", REPLICA_TAGS),
)
JOB_METRICS = (
    MetricSpec("rasd_shards", "gauge", "Shards of the job.", JOB_TAGS),
    MetricSpec("rasd_shards_committed", "counter", "Shards this run of the driver has committed.", JOB_TAGS),
    MetricSpec("rasd_rows_committed", "counter", "Output rows in them.", JOB_TAGS),
    MetricSpec("rasd_replica_restarts", "counter", "Times a replica was started again after a loss.", REPLICA_TAGS),
)


class _Metrics:
    """Ray's metrics of some specs, with tags that all of them carry."""

    def __init__(self, specs: Iterable[MetricSpec], tags: Mapping[str, str]) -> None:
        self._tags = dict(tags)
        self._metrics: dict[str, Any] = {spec.name: _create(spec) for spec in specs}

    def count(self, name: str, value: int, **tags: str) -> None:
        if value:  # Ray refuses to add nothing
            self._metrics[name].inc(value, {**self._tags, **tags})

    def set(self, name: str, value: float) -> None:
        self._metrics[name].set(value, self._tags)

    def observe(self, name: str, value: float, tags: Mapping[str, str]) -> None:
        self._metrics[name].observe(value, {**self._tags, **tags})


class ReplicaMetrics:
    """What one replica counts.

    Args:
        replica: its ordinal.
        job: absolute path, or URI, of the job's output.
    """

    def __init__(self, replica: int, method: str, job: str) -> None:
        self._metrics = _Metrics(REPLICA_METRICS, {"rasd_job": job, "method": method, "replica": str(replica)})

    def finished(self, row: ShardStats, total: ShardStats, error_type: str | None) -> None:
        """An output row is done.

        Args:
            row, total: its counts, and those of all the replica's rows so far.
        """
        count = self._metrics.count
        count("rasd_rows", row.rows)
        count("rasd_prompt_tokens", row.prompt_tokens)
        count("rasd_output_tokens", row.output_tokens)
        count("rasd_rounds", row.rounds)
        count("rasd_rounds_without_draft", row.rounds_without_draft)
        count("rasd_drafted", row.drafted)
        for source, accepted in row.accepted_by_source.items():
            count("rasd_accepted", accepted, source=source)
        if error_type is not None:
            count("rasd_error_rows", row.errors, error_type=error_type)
        self.working(total)

    def working(self, total: ShardStats) -> None:
        """The replica is there, and so far with its rows."""
        if total.rounds:
            self._metrics.set("rasd_tau", total.tau)

    def missed(self, calls: int) -> None:
        """So many calls of a retrieval service had no whole answer."""
        self._metrics.count("rasd_retrieval_misses", calls)

    def retrieved(self, call: str, place: str, seconds: float) -> None:
        """A `lookup`, or a search for `passages`, was answered by the `replica` itself or a `service`."""
        self._metrics.observe("rasd_retrieval_seconds", seconds, {"call": call, "place": place})


class JobMetrics:
    """What the driver counts; see `ReplicaMetrics` for the arguments."""

    def __init__(self, num_shards: int, method: str, job: str) -> None:
        self._launched: set[int] = set()
        self._metrics = _Metrics(JOB_METRICS, {"rasd_job": job, "method": method})
        self._num_shards = num_shards
        self.working()

    def working(self) -> None:
        """The driver is there."""
        self._metrics.set("rasd_shards", self._num_shards)

    def committed(self, rows: int) -> None:
        """A shard of so many output rows is committed."""
        self._metrics.count("rasd_shards_committed", 1)
        self._metrics.count("rasd_rows_committed", rows)

    def launched(self, replica: int) -> None:
        """An actor starts: the replica's first, or one in a lost one's place."""
        self._metrics.count("rasd_replica_restarts", int(replica in self._launched), replica=str(replica))
        self._launched.add(replica)


def _create(spec: MetricSpec) -> Any:
    if spec.kind == "histogram":
        return Histogram(spec.name, spec.description, boundaries=list(LATENCY_BOUNDS), tag_keys=spec.tags)
    kind = Counter if spec.kind == "counter" else Gauge
    return kind(spec.name, spec.description, tag_keys=spec.tags)
