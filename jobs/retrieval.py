"""Retrieval services of a generation job: checked before any work, started on the cluster, asked how it went.

auto        segments are searched in each replica where its node sees them; one service has passages, live outputs
            and segments for the others
shared      one service has everything
per-node    a service on every node has everything; outputs go to all of them
in-process  no service: every replica searches by itself, and its live store knows its own outputs only
"""

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.object_store import is_uri
from actors.retrieval import CONCURRENCY_GROUPS, RetrievalService, ServiceConfig, ServiceStats, group_of, load_of
from actors.searchers import RetrievalConfig
from datastore.format import check_sizes, read_manifest
from jobs.config import GenerateConfig
from jobs.plan import ModelFacts
from jobs.storage import job_name
from pipeline.errors import ConfigError, DatastoreError
from pipeline.methods import method_named

_HIGH_LOAD = 0.7
_STATS_SECONDS = 2.0

log = logging.getLogger(__name__)


def provided_sources(config: GenerateConfig, facts: ModelFacts) -> frozenset[str]:
    """Which of `passages`, `corpus` and `live` a job has.

    Raises:
        DatastoreError: `--datastore` is missing, damaged, or made with another tokenizer.
        ConfigError: it is a URI.
    """
    sources = {"live"} if config.live == "on" else set()
    if config.datastore is not None:
        if is_uri(config.datastore):
            raise ConfigError(
                f"--datastore is {config.datastore!r}; its files are mapped into memory. Copy it to a directory that"
                " all nodes see."
            )
        store = Path(config.datastore).expanduser()
        manifest = read_manifest(store)
        if manifest.tokenizer != facts.tokenizer:
            raise DatastoreError(
                f"--datastore {store} was built with tokenizer {manifest.tokenizer[:16]}, --model {config.model} has"
                f" {facts.tokenizer[:16]}. Build it for this model: rasd datastore build --model {config.model} ..."
            )
        check_sizes(store, manifest.segments)
        sources |= {"corpus"} | ({"passages"} if manifest.dense is not None and config.passages else set())
    return frozenset(sources)


class RetrievalServices:
    """The services of one job; they end with it.

    Args:
        sources: what the job's method uses of `provided_sources`.
        vocab_size: of the target.
    """

    def __init__(self, config: GenerateConfig, facts: ModelFacts, sources: Collection[str], vocab_size: int) -> None:
        output = job_name(config.output)
        store = None if config.datastore is None else str(Path(config.datastore).expanduser().absolute())
        self._fingerprint = None if store is None else read_manifest(Path(store)).fingerprint
        self._service = ServiceConfig(
            datastore=store,
            tokenizer=facts.tokenizer,
            vocab_size=vocab_size,
            sources=frozenset(sources),
            output=output,
            live_capacity=config.live_tokens,
        )
        self.config = RetrievalConfig(
            mode=config.retrieval,
            datastore=store,
            fingerprint=self._fingerprint,
            tokenizer=facts.tokenizer,
            live_capacity=config.live_tokens,
            num_passages=config.passages,
            output=output,
            services=self._start(config.retrieval),
            deadline=config.retrieval_deadline / 1000,
        )

    def notes(self) -> list[str]:
        """What a user should know of how the services did: failures, and too much load."""
        notes = []
        for name, stats in zip(self.config.services, self._stats(), strict=True):
            where = f" on node {name[:8]}" if name else ""
            if stats is None:
                notes.append(f"the retrieval service{where} did not answer at the end")
            elif stats.failure is not None:
                notes.append(f"the retrieval service{where} did not serve everything: {stats.failure}")
            elif not stats.is_ready:
                notes.append(f"the retrieval service{where} was still loading at the end")
            elif load_of(stats) > _HIGH_LOAD:
                notes.append(
                    f"the retrieval service{where} was busy {load_of(stats):.0%} of the time: --retrieval auto searches"
                    " segments in the replicas, per-node starts one service a node"
                )
        return notes

    def _stats(self) -> list[ServiceStats | None]:
        futures = [
            service.stats.options(concurrency_group=group_of("stats")).remote()
            for service in self.config.services.values()
        ]
        found: list[ServiceStats | None] = []
        for future in futures:
            try:
                found.append(ray.get(future, timeout=_STATS_SECONDS))
            except RayError:
                found.append(None)
        return found

    def _start(self, mode: str) -> dict[str, Any]:
        if mode == "in-process":
            return {}
        here = ray.get_runtime_context().get_node_id()
        if mode != "per-node":
            return {"": self._launch(here, "")}
        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        return {node: self._launch(node, f"-{node[:12]}") for node in nodes}

    def _launch(self, node: str, suffix: str) -> Any:
        """An actor on a node; Ray starts it again whenever it dies, and calls meanwhile fail."""
        name = "live" if self._fingerprint is None else self._fingerprint[:12]
        remote: Any = ray.remote  # typed without concurrency groups
        lifted = remote(concurrency_groups=CONCURRENCY_GROUPS)(RetrievalService).options(
            name=f"rasd-retrieval-{name}{suffix}",
            num_cpus=0,
            runtime_env={"env_vars": {"CUDA_VISIBLE_DEVICES": ""}},  # GPUs are the replicas'
            max_restarts=-1,
            max_task_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=True),
        )
        return lifted.remote(self._service)


def sources_of(method: str, provided: Collection[str]) -> frozenset[str]:
    """What a method uses of the sources that a job has."""
    return frozenset(method_named(method).sources) & frozenset(provided)
