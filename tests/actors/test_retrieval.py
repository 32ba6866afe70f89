"""The retrieval service on real Ray: what it finds, and that its silence, death and return cost nothing but speed."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from actors.live_rows import committed_outputs
from actors.retrieval import CONCURRENCY_GROUPS, RetrievalService, ServiceConfig, ServiceStats
from actors.searchers import LocalPassages, LocalSearcher, Misses, ServicePassages, ServiceSearcher, ServiceSink
from datastore import Datastore, LiveStore
from datastore.format import Manifest, write_manifest
from datastore.segment import write_segment
from tests.datastore.naive import arrays_of, counts_of

VOCABULARY = 100
TOKENIZER = "t" * 64
DOCUMENTS = [[1, 2, 3, 4, 5], [6, 7, 8, 9]]
CONTEXTS = [np.array(context, np.int32) for context in ([0, 1, 2, 3], [7], [50, 51])]
DEPTHS = np.array([4, 2, 4], np.int32)


@pytest.fixture(scope="module", autouse=True)
def joined(cluster: str) -> Iterator[None]:
    ray.init(address=cluster, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    record = write_segment(
        tmp_path / "store" / "segments" / "0", *arrays_of(DOCUMENTS), ["a", "b"], vocab_size=VOCABULARY, num_threads=1
    )
    write_manifest(tmp_path / "store", Manifest(TOKENIZER, VOCABULARY, None, (record,)))
    return tmp_path / "store"


def commit(output: Path, shard: int, sequences: list[list[int] | None]) -> None:
    """A part file and its commit record, as a job writes them; None is an error row."""
    (output / "_commits").mkdir(parents=True, exist_ok=True)
    table = pa.table({"token_ids": pa.array(sequences, pa.list_(pa.int32())), "text": [""] * len(sequences)})
    pq.write_table(table, output / f"part-{shard:06d}.parquet")
    (output / "_commits" / f"{shard:06d}.json").write_text(f'{{"file": "part-{shard:06d}.parquet"}}')


def config_of(store: Path | None, output: Path, tokenizer: str = TOKENIZER) -> ServiceConfig:
    sources = {"live"} | ({"corpus"} if store is not None else set())
    return ServiceConfig(
        None if store is None else str(store), tokenizer, VOCABULARY, frozenset(sources), str(output), 1 << 20
    )


@pytest.fixture
def start() -> Iterator[Callable[[ServiceConfig], Any]]:
    services: list[Any] = []

    def launch(config: ServiceConfig) -> Any:
        lifted: Any = ray.remote(concurrency_groups=CONCURRENCY_GROUPS)(RetrievalService)
        services.append(lifted.options(num_cpus=0, max_restarts=-1, max_task_retries=0).remote(config))
        return services[-1]

    yield launch
    for service in services:
        ray.kill(service)


def ready(service: Any) -> ServiceStats:
    assert ray.get(service.wait_ready.options(concurrency_group="control").remote(60.0), timeout=90)
    return stats_of(service)


def stats_of(service: Any) -> ServiceStats:
    stats: ServiceStats = ray.get(service.stats.options(concurrency_group="control").remote(), timeout=60)
    return stats


def searcher_of(service: Any, misses: Misses, deadline: float = 30.0) -> ServiceSearcher:
    return ServiceSearcher(service, frozenset({"corpus", "live"}), deadline, misses)


def ask(searcher: ServiceSearcher | LocalSearcher) -> Mapping[str, Any]:
    searcher.send(CONTEXTS, DEPTHS)
    return searcher.receive()


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_service_finds_what_a_search_in_process_finds(
    store: Path, tmp_path: Path, start: Callable[[ServiceConfig], Any]
) -> None:
    outputs = [np.array([2, 3, 90, 91], np.int32), np.array([7, 92], np.int32)]
    service = start(config_of(store, tmp_path / "out"))
    ready(service)
    ServiceSink([service]).append(outputs)
    until(lambda: stats_of(service).live_sequences == 2, 5.0)
    live = LiveStore(VOCABULARY)
    live.append(outputs)
    local, misses = ask(LocalSearcher(Datastore.open(store), live)), Misses()
    remote = ask(searcher_of(service, misses))
    assert set(remote) == set(local) == {"corpus", "live"}
    for source, found in remote.items():
        assert found.match_lengths.tolist() == local[source].match_lengths.tolist()
        assert [counts_of(found, b) for b in range(3)] == [counts_of(local[source], b) for b in range(3)]
    assert remote["corpus"].match_lengths.tolist() == [3, 1, 0]
    assert misses.take() == 0


def test_an_output_is_searchable_within_a_second(tmp_path: Path, start: Callable[[ServiceConfig], Any]) -> None:
    service = start(config_of(None, tmp_path / "out"))
    ready(service)
    searcher = searcher_of(service, Misses())
    assert ask(searcher)["live"].match_lengths.tolist() == [0, 0, 0]
    ServiceSink([service]).append([np.array([7, 8], np.int32)])
    until(lambda: bool(ask(searcher)["live"].match_lengths[1]), 1.0)


def test_a_late_answer_is_an_empty_one_and_counts(tmp_path: Path, start: Callable[[ServiceConfig], Any]) -> None:
    service = start(config_of(None, tmp_path / "out"))
    pid = ready(service).pid
    misses = Misses()
    searcher = searcher_of(service, misses, deadline=0.05)
    os.kill(pid, signal.SIGSTOP)
    try:
        begin = time.monotonic()
        assert ask(searcher) == {}
        assert 0.04 < time.monotonic() - begin < 1.0, "it waits for the deadline and no longer"
        begin = time.monotonic()
        for _ in range(20):
            assert ask(searcher) == {}
        assert time.monotonic() - begin < 0.05, "while the late call hangs, nothing more is asked or waited for"
        assert misses.take() == 21, "every round without an answer counts"
    finally:
        os.kill(pid, signal.SIGCONT)
    until(lambda: "live" in ask(searcher))


def test_a_killed_service_comes_back_with_the_committed_outputs(
    store: Path, tmp_path: Path, start: Callable[[ServiceConfig], Any]
) -> None:
    output = tmp_path / "out"
    service = start(config_of(store, output))
    pid = ready(service).pid
    misses = Misses()
    searcher = searcher_of(service, misses)
    assert ask(searcher)["live"].match_lengths.tolist() == [0, 0, 0]
    commit(output, 0, [[7, 8, 9], None, [50, 51, 52]])
    os.kill(pid, signal.SIGKILL)
    until(lambda: ask(searcher) == {})
    assert misses.take() >= 1
    until(lambda: set(ask(searcher)) == {"corpus", "live"})
    assert ask(searcher)["live"].match_lengths.tolist() == [0, 1, 2]
    assert ask(searcher)["corpus"].match_lengths.tolist() == [3, 1, 0]
    assert stats_of(service).pid != pid


def test_a_service_without_its_datastore_serves_the_rest_and_says_why(
    store: Path, tmp_path: Path, start: Callable[[ServiceConfig], Any]
) -> None:
    service = start(config_of(store, tmp_path / "out", tokenizer="other"))
    until(lambda: stats_of(service).failure is not None)
    assert "built with tokenizer" in str(stats_of(service).failure)
    misses = Misses()
    assert set(ask(searcher_of(service, misses))) == {"live"}
    assert misses.take() == 1, "an answer that lacks a source is a miss"


def test_health_answers_while_lookups_are_under_way(tmp_path: Path, start: Callable[[ServiceConfig], Any]) -> None:
    service = start(config_of(None, tmp_path / "out"))
    ready(service)
    random = np.random.default_rng(0)
    ServiceSink([service]).append([random.integers(0, 3, 200_000).astype(np.int32)])
    until(lambda: stats_of(service).live_tokens > 100_000)
    contexts = random.integers(0, 3, (256, 17)).astype(np.int32)
    lookup = service.lookup.options(concurrency_group="lookup")
    depths = np.full(256, 16, np.int32)
    busy = [lookup.remote(contexts, depths, frozenset({"live"})) for _ in range(200)]
    waits = []
    while len(ray.wait(busy, num_returns=len(busy), timeout=0)[0]) < len(busy):
        begin = time.monotonic()
        stats_of(service)
        waits.append(time.monotonic() - begin)
    assert waits and sorted(waits)[len(waits) // 2] < 0.25
    assert stats_of(service).contexts == 200 * 256


def test_passages_of_a_dead_service_are_none(tmp_path: Path, start: Callable[[ServiceConfig], Any]) -> None:
    service = start(config_of(None, tmp_path / "out"))
    misses = Misses()
    source = ServicePassages(service, 3, misses)
    assert source.passages(["a", "b"]) == [(), ()], "it has no datastore"
    assert misses.take() == 0, "and says so"
    ray.kill(service)  # returns before the actor is dead, which may answer once more
    until(lambda: source.passages(["a"]) == [()] and misses.take() == 1)


def test_outputs_for_a_service_that_stands_still_are_dropped(
    tmp_path: Path, start: Callable[[ServiceConfig], Any]
) -> None:
    service = start(config_of(None, tmp_path / "out"))
    pid = ready(service).pid
    sink = ServiceSink([service])
    os.kill(pid, signal.SIGSTOP)
    try:
        begin = time.monotonic()
        for _ in range(300):
            sink.append([np.array([1, 2], np.int32)])
        assert time.monotonic() - begin < 5.0
    finally:
        os.kill(pid, signal.SIGCONT)
    until(lambda: stats_of(service).live_sequences > 0)
    time.sleep(0.5)
    assert stats_of(service).live_sequences <= 65


def test_passages_in_process_without_an_embedder_are_none(store: Path) -> None:
    misses = Misses()
    source = LocalPassages(Datastore.open(store), 3, misses)
    assert source.passages(["a", "b"]) == source.passages(["c", "d"]) == [(), ()]
    assert misses.take() == 2


def test_committed_outputs_are_the_newest_and_only_what_commits_name(tmp_path: Path) -> None:
    for shard in range(4):
        commit(tmp_path, shard, [[shard, shard], None])
        os.utime(tmp_path / "_commits" / f"{shard:06d}.json", (shard, shard))
    (tmp_path / "_commits" / "000002.json").unlink()
    (tmp_path / "part-000001.parquet").write_bytes(b"damaged")
    assert [sequence.tolist() for sequence in committed_outputs(str(tmp_path), 100)] == [[0, 0], [3, 3]]
    assert [sequence.tolist() for sequence in committed_outputs(str(tmp_path), 2)] == [[3, 3]]
    assert committed_outputs(str(tmp_path / "nowhere"), 100) == []
