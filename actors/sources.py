"""Which of a replica's sources are searched in its own process and which by a service, by the retrieval mode."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray

from actors.live_rows import committed_outputs
from actors.metrics import ReplicaMetrics
from actors.searchers import (
    LiveSink,
    LocalPassages,
    LocalSearcher,
    Misses,
    PassageSource,
    RetrievalConfig,
    ServicePassages,
    ServiceSearcher,
    ServiceSink,
)
from datastore import Datastore, LiveStore
from datastore.format import check_sizes, read_manifest
from pipeline.errors import DatastoreError
from pipeline.search import Searcher

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sources:
    """A replica's retrieval, ready for use.

    Attributes:
        searchers: of `corpus` and `live`.
        sink: where finished outputs go; None without the source `live`.
        passages: None without the source `passages`.
        misses: calls of services that got no answer.
    """

    searchers: tuple[Searcher, ...]
    sink: LiveSink | None
    passages: PassageSource | None
    misses: Misses


def open_sources(config: RetrievalConfig, wanted: Sequence[str], vocab_size: int, metrics: ReplicaMetrics) -> Sources:
    """Opens what a method needs of `corpus`, `passages` and `live`.

    Raises:
        DatastoreError: a datastore that is to be searched in this process is damaged or does not fit.
    """
    misses = Misses()
    service = _nearest(config)
    remote: set[str] = set()
    store: Datastore | None = None
    live: LiveStore | None = None
    if "live" in wanted:
        if service is None:
            live = LiveStore(vocab_size, config.live_capacity)
            if config.output is not None:
                live.append(committed_outputs(config.output, config.live_capacity))
        else:
            remote.add("live")
    is_local = service is None or (config.mode == "auto" and _is_here(config))
    if config.datastore is not None and is_local and {"corpus", "passages"} & set(wanted):
        has_passages = service is None and "passages" in wanted
        store = Datastore.open(config.datastore, tokenizer=config.tokenizer, dense=has_passages)
    elif "corpus" in wanted:
        remote.add("corpus")
    searchers: list[Searcher] = []
    local_store = store if "corpus" in wanted else None
    if local_store is not None or live is not None:  # first, so that it works while the service does
        searchers.append(LocalSearcher(local_store, live, partial(metrics.retrieved, "lookup", "replica")))
    if remote:
        timed = partial(metrics.retrieved, "lookup", "service")
        searchers.append(ServiceSearcher(service, frozenset(remote), config.deadline, misses, timed))
    source = None
    if "passages" in wanted and config.num_passages > 0:
        source = _passages(config, service, store, misses, metrics)
    return Sources(tuple(searchers), _sink(config, live, wanted), source, misses)


def _sink(config: RetrievalConfig, live: LiveStore | None, wanted: Sequence[str]) -> LiveSink | None:
    if "live" not in wanted:
        return None
    return live if live is not None else ServiceSink(list(config.services.values()))


def _passages(
    config: RetrievalConfig, service: Any, store: Datastore | None, misses: Misses, metrics: ReplicaMetrics
) -> PassageSource:
    if service is not None:
        return ServicePassages(service, config.num_passages, misses, partial(metrics.retrieved, "passages", "service"))
    assert store is not None
    return LocalPassages(store, config.num_passages, misses, partial(metrics.retrieved, "passages", "replica"))


def _nearest(config: RetrievalConfig) -> Any:
    """This node's service, or the one of all nodes; None if all is searched in process."""
    if not config.services:
        return None
    here = ray.get_runtime_context().get_node_id()
    return config.services.get(here) or next(iter(config.services.values()))


def _is_here(config: RetrievalConfig) -> bool:
    """Whether this node sees the very datastore that the job was planned with, whole."""
    if config.datastore is None:
        return False
    store = Path(config.datastore)
    try:
        manifest = read_manifest(store)
        check_sizes(store, manifest.segments)
    except DatastoreError as error:
        log.info("segments are searched by the service: %s", error)
        return False
    return manifest.fingerprint == config.fingerprint
