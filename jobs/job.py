"""One run of a job's driver: what `rasd generate` does once its options are checked and the lease is held."""

import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from actors.metrics import JobMetrics
from actors.rows import WITNESSED, ReplicaInfo, ShardStats
from jobs.backend import Backend, Launch, Retrieving, most_slots
from jobs.cluster import connected, place
from jobs.commit import Commit, CommitLog
from jobs.config import GenerateConfig
from jobs.driver import ATTEMPTS_A_RUN, Driver, DriverConfig
from jobs.files import write_json
from jobs.html.job_page import render_job
from jobs.inputs import Inputs
from jobs.places import Places
from jobs.plan import ModelFacts, Plan, bind, plan_record
from jobs.progress import Progress
from jobs.report import Clock, error_types, job_record, print_outcome
from jobs.retry import reopen_failed
from jobs.shards import open_shards
from jobs.signals import StopSignals
from jobs.storage import PAGE, PLAN, REPORT, HeldLease, Storage, job_name
from pipeline.errors import JobError

EXIT_ERROR_RATE = 3
# progress and stop are answered beside the shards.
_SPARE_CALLS = 2

log = logging.getLogger(__name__)


class Job:
    """One run of the driver on one output; the `Watcher` of its driver.

    Args:
        lease: of `output`, held.
    """

    def __init__(
        self,
        config: GenerateConfig,
        backend: Backend,
        plan: Plan,
        facts: ModelFacts,
        retrieving: Retrieving,
        output: Storage,
        lease: HeldLease,
    ) -> None:
        self._config = config
        self._backend = backend
        self._plan = plan
        self._facts = facts
        self._retrieving = retrieving
        self._output = output
        self._lease = lease
        self._log = CommitLog(output, lease)
        self._signals = StopSignals()
        self._commits: dict[int, Commit] = {}
        self._attempts: list[dict[str, Any]] = []
        self._events: list[dict[str, Any]] = []  # of the replicas' rounds
        self._progress = Progress(plan.num_output_rows, is_quiet=config.quiet)
        self._total = ShardStats()
        self._run_stats = ShardStats()
        self._failed: dict[int, Commit] = {}  # to be taken back
        self._retried_rows = 0
        self._ready_at: float | None = None
        self._metrics: JobMetrics  # once Ray is there to take them

    def run(self, inputs: Inputs, attempts: Sequence[Mapping[str, Any]], began: float) -> int:
        """Do what is left and report; returns the exit code.

        Args:
            attempts: earlier runs, from plan.json; began: start of this run on the monotonic clock.
        """
        self._attempts = [*map(dict, attempts), self._attempt()]
        self._write_plan()
        self._commits = self._log.open()
        if self._config.retry_errors:
            self._failed = {shard: commit for shard, commit in self._commits.items() if commit.stats.errors}
            self._commits = {shard: c for shard, c in self._commits.items() if shard not in self._failed}
        self._total = sum((commit.stats for commit in self._commits.values()), ShardStats())
        resumed = len(self._commits)
        if resumed:
            log.info("%d of %d shards are done already", resumed, self._plan.num_shards)
        if resumed < self._plan.num_shards and not self._exceeds_error_rate():
            self._drive(inputs)
        return self._finish(resumed, began)

    def started(self, info: ReplicaInfo) -> None:
        """See `Watcher`: the first replica fixes what the plan left open."""
        log.info(
            "replica %d on %s: %s, %s, %s, up to %d tokens a row, loaded in %.1f s",
            *(info.replica, info.node, info.model, info.device, info.dtype, info.max_context, info.load_seconds),
            extra={"replica": info.replica, "node": info.node, "load_seconds": round(info.load_seconds, 3)},
        )
        for note in info.notes:
            log.info("replica %d: %s", info.replica, note, extra={"replica": info.replica})
        if self._ready_at is None:
            self._ready_at = time.monotonic()
            self._progress.restart()
        bound = bind(self._plan, info)
        self._attempts[-1].setdefault("replicas", []).append(asdict(info))
        self._plan = bound
        self._log.keep_progress(bound.fingerprint)
        self._write_plan()
        if self._failed:  # not before somebody can do better: until then readers keep what there is
            self._reopen_failed()

    def progressed(self, stats: ShardStats) -> None:
        """See `Watcher`."""
        self._progress.show(stats)
        self._metrics.working()

    def committed(self, commit: Commit) -> None:
        """See `Watcher`."""
        self._commits[commit.shard] = commit
        self._total += commit.stats
        self._run_stats += commit.stats
        self._metrics.committed(commit.rows)
        if commit.stats.resumed_rows:
            log.info(
                "shard %d: %d of its %d rows were safe from an earlier attempt",
                *(commit.shard, commit.stats.resumed_rows, commit.rows),
                extra={"shard": commit.shard, "resumed_rows": commit.stats.resumed_rows},
            )
        log.debug(
            "shard %d is committed: %d rows, %d errors",
            *(commit.shard, commit.rows, commit.stats.errors),
            extra={"shard": commit.shard, "attempt": commit.attempt, "rows": commit.rows, "file": commit.file},
        )

    def should_stop(self) -> bool:
        """See `Watcher`."""
        return self._signals.received is not None or self._exceeds_error_rate()

    def _exceeds_error_rate(self) -> bool:
        # Against all rows of the job, so that the order in which shards end does not matter.
        return self._total.errors > self._config.max_error_rate * self._plan.num_output_rows

    def _reopen_failed(self) -> None:
        attempt = (len(self._attempts) + 1) * ATTEMPTS_A_RUN - 1  # the last of this run, which no shard gets to
        reopen_failed(self._failed, self._log, self._output, self._plan.schema, attempt)
        self._retried_rows = sum(commit.stats.errors for commit in self._failed.values())
        self._failed = {}

    def _drive(self, inputs: Inputs) -> None:
        with connected(self._config.ray_address) as nodes, self._signals, Places(place(self._config, nodes)) as places:
            placement = places.placement
            self._metrics = JobMetrics(self._plan.num_shards, self._retrieving.method, job_name(self._config.output))
            services = self._backend.services(self._config, self._facts, self._retrieving)
            left = self._plan.num_shards - len(self._commits)
            num_replicas = min(placement.num_replicas, left)
            in_flight = self._in_flight(most_slots(self._config, placement.device), -(-left // num_replicas))
            driver = Driver(
                shards=open_shards(inputs, self._plan, frozenset(self._commits)),
                commits=self._log,
                launch=lambda replica: self._launch(
                    Launch(
                        config=self._config,
                        placement=placement,
                        retrieving=self._retrieving,
                        services=services,
                        resolved=self._plan.fingerprint,
                        replica=replica,
                        concurrency=in_flight + _SPARE_CALLS,
                        group=places.group(replica),
                    )
                ),
                watcher=self,
                release=places.release,
                config=DriverConfig(
                    num_replicas=num_replicas,
                    in_flight=in_flight,
                    run=len(self._attempts),
                    schema=self._plan.schema.serialize().to_pybytes(),
                ),
            )
            with self._progress.shown(done=self._total.rows):
                driver.run()
            self._events = driver.events
            for note in services.notes() if services is not None else ():
                log.warning("%s", note)

    def _launch(self, launch: Launch) -> Any:
        self._metrics.launched(launch.replica)
        return self._backend.launch(launch)

    def _in_flight(self, slots: int, fair_share: int) -> int:
        """Most shards a replica has: twice its slots, but not those that others could begin with."""
        rows_per_shard = self._plan.rows_per_shard * self._plan.num_samples
        return min(max(2, -(-2 * slots // rows_per_shard)), fair_share)

    def _finish(self, resumed: int, began: float) -> int:
        end = time.monotonic()
        clock = Clock(total=end - began, generating=end - (self._ready_at or end))
        is_done = len(self._commits) == self._plan.num_shards
        if self._exceeds_error_rate():
            state, code = "error_rate", EXIT_ERROR_RATE
        elif is_done:
            state, code = "done", 0
        else:
            state, code = "stopped", self._signals.exit_code
        facts = {
            "num_shards": self._plan.num_shards,
            "shards": len(self._commits),
            "resumed_shards": resumed,
            "retried_rows": self._retried_rows,
            "error_types": error_types(self._output, self._commits.values()),
            "model": self._config.model,
            "method": self._retrieving.method,
            "dtype": self._plan.fingerprint["dtype"],
            "output": self._output.where(),
        }
        told = [event["args"] for event in self._events if event["name"] == WITNESSED]
        spans = [event for event in self._events if event["name"] != WITNESSED]
        if self._config.trace is not None and spans:
            trace = {"traceEvents": spans, "displayTimeUnit": "ms"}
            write_json(Path(self._config.trace).expanduser(), trace)
        record = job_record(state, self._total, self._run_stats, clock, facts)
        self._output.write(REPORT, record)
        if is_done:
            self._log.finish()
        if told:  # a run that found all rows done leaves the page of the one that made them
            try:
                self._output.write_text(PAGE, render_job({**record, "tau": self._total.tau}, told))
            except JobError as error:
                log.warning("no %s: %s", PAGE, error)
        print_outcome(record, is_quiet=self._config.quiet)
        if code == EXIT_ERROR_RATE:
            log.error(
                "stopped: %d of %d rows failed, more than --max-error-rate %g; see error_message in the part files",
                *(record["errors"], self._plan.num_output_rows, self._config.max_error_rate),
            )
        elif code:
            log.warning("stopped by %s; the same command resumes the job", self._signals.received)
        return code

    def _attempt(self) -> dict[str, Any]:
        options: tuple[str, ...] = ("slots", "budget", "num_replicas", "num_threads", "prefill_chunk", "kv_memory")
        options += ("retry_errors", "device", "draft", "datastore", "live", "retrieval", "passages")
        return {
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "method": self._retrieving.method,
            **{name: getattr(self._config, name) for name in options},
        }

    def _write_plan(self) -> None:
        with self._lease.held():
            self._output.write(PLAN, plan_record(self._plan, self._config, self._attempts))
