"""A replica with retrieval, on the real model: what is found makes it faster, and the text stays what it was."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actors import shard_progress
from actors.records import output_schema
from actors.replica import Replica
from actors.replica_config import ReplicaConfig
from actors.retrieval import CONCURRENCY_GROUPS, RetrievalService, ServiceConfig
from actors.rows import InputRow, ProgressPlace, RowFailure, ShardStats, ShardTask
from actors.searchers import RetrievalConfig
from datastore.embedder import DEFAULT_EMBEDDER, Embedder
from datastore.format import DenseSpec, Manifest, write_manifest
from datastore.passages import passage_spans
from datastore.segment import write_segment
from pipeline.models import tokenizer_hash
from pipeline.request import SamplingParams

VOCABULARY = 49_152
ROWS = tuple(InputRow(i, str(i), prompt=f"Write about {s}. It is") for i, s in enumerate(("tea", "snow")))
SCHEMA = output_schema(["prompt"], pa.schema([]), logprobs=False).serialize().to_pybytes()
Tokens = list[list[int]]


@pytest.fixture(scope="module", autouse=True)
def joined(cluster: str) -> Iterator[None]:
    ray.init(address=cluster, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def new_replica(
    directory: Path, sources: tuple[str, ...], retrieval: RetrievalConfig | None, *, slots: int = 2
) -> Replica:
    """A replica that has started."""
    replica = Replica(
        ReplicaConfig(
            model="smollm2-135m",
            revision=None,
            dtype="float32",
            device="cpu",
            slots=slots,
            slot_tokens=0,
            gpu_share=1.0,
            method="retrieval",
            budget=8,
            sampling=SamplingParams(max_new_tokens=24),
            seed=0,
            num_samples=1,
            kv_memory=None,
            max_context=256,
            prefill_chunk=512,
            trust_remote_code=False,
            sources=sources,
            draft=None,
            retrieval=retrieval,
            replica=0,
            job=str(directory),
            num_threads=None,
            quantization="none",
            num_ranks=1,
            is_split=False,
            is_traced=False,
        )
    )
    replica.start()
    return replica


def outputs_of(
    directory: Path, sources: tuple[str, ...], retrieval: RetrievalConfig | None
) -> tuple[ShardStats, Tokens]:
    """What a new replica makes of the rows: its counts and token ids."""
    replica = new_replica(directory, sources, retrieval)
    path = directory / f"{len(list(directory.glob('*.parquet')))}.parquet"
    result = replica.run_shard(ShardTask(0, 1, ROWS, str(path), SCHEMA))
    replica.stop()
    return result.stats, pq.read_table(path)["token_ids"].to_pylist()


def retrieval_of(mode: str, services: dict[str, Any], store: Path | None, tokenizer: str) -> RetrievalConfig:
    path = None if store is None else str(store)
    return RetrievalConfig(mode, path, None, tokenizer, 1 << 20, 2, "nowhere", services, 30.0)


def service_of(store: Path | None, tokenizer: str, sources: frozenset[str]) -> Any:
    lifted: Any = ray.remote(concurrency_groups=CONCURRENCY_GROUPS)(RetrievalService)
    path = None if store is None else str(store)
    service = lifted.options(num_cpus=0).remote(ServiceConfig(path, tokenizer, VOCABULARY, sources, "nowhere", 1 << 20))
    assert ray.get(service.wait_ready.options(concurrency_group="control").remote(90.0))
    return service


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_rows_finished_on_one_replica_raise_acceptance_on_the_other(
    tmp_path: Path, smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase]
) -> None:
    tokenizer = tokenizer_hash(smollm2[1])
    service = service_of(None, tokenizer, frozenset({"live"}))
    stats = service.stats.options(concurrency_group="control")
    config = retrieval_of("shared", {"": service}, None, tokenizer)
    first, texts = outputs_of(tmp_path, ("live",), config)
    wait_for(lambda: ray.get(stats.remote()).live_sequences >= 2)
    second, again = outputs_of(tmp_path, ("live",), config)
    assert texts == again
    assert first.accepted_by_source.get("live", 0) == 0
    assert second.accepted_by_source["live"] > 20, "of 48 tokens"
    assert second.rounds < 0.6 * first.rounds


def test_passages_near_to_a_prompt_join_its_context(
    tmp_path: Path, smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase]
) -> None:
    """The answers themselves lie in a datastore among other texts; dense search brings them to their prompts."""
    tokenizer = tokenizer_hash(smollm2[1])
    alone, texts = outputs_of(tmp_path, (), None)
    others = [
        "Copper is a metal that conducts well.",
        "Chess is played on sixty-four squares.",
        "A violin has strings.",
    ]
    answers = [smollm2[1].decode(text, skip_special_tokens=True) for text in texts]
    documents = [f"{row.prompt}{answer}" for row, answer in zip(ROWS, answers, strict=True)]
    store = dense_store(tmp_path / "store", [*others, *documents], smollm2[1])
    for mode in ("in-process", "shared"):
        services = {"": service_of(store, tokenizer, frozenset({"passages"}))} if mode == "shared" else {}
        stats, again = outputs_of(tmp_path, ("passages",), retrieval_of(mode, services, store, tokenizer))
        assert again == texts
        assert stats.accepted_by_source["passages"] > 15, "of 48 tokens"
        assert stats.rounds < 0.8 * alone.rounds
        assert stats.retrieval_misses == 0


def dense_store(path: Path, texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Path:
    embedder = Embedder.load(DEFAULT_EMBEDDER)
    ids = [tokenizer(text)["input_ids"] for text in texts]
    offsets = np.cumsum([0, *map(len, ids)])
    spans = passage_spans(offsets, 128, 32)
    record = write_segment(
        path / "segments" / "0",
        np.concatenate(ids),
        offsets,
        [str(i) for i in range(len(ids))],
        vocab_size=VOCABULARY,
        num_threads=1,
        dense=(spans, embedder.encode(texts)),
    )
    spec = DenseSpec(DEFAULT_EMBEDDER, embedder.hash, embedder.dimension, 128, 32)
    write_manifest(path, Manifest(tokenizer_hash(tokenizer), VOCABULARY, spec, (record,)))
    return path


def test_rows_are_safe_while_others_are_generated_and_the_next_attempt_makes_only_those(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_progress._Files, "seconds", 0.05)
    monkeypatch.setattr(shard_progress, "REST", 0.0)
    bad = InputRow(9, "9", error=RowFailure("malformed_json", "line 10"))
    rows = (*ROWS, bad, *(InputRow(i, str(i), prompt=f"Write about {i} {ROWS[0].prompt}") for i in range(2, 6)))
    replica = new_replica(tmp_path, (), None, slots=1)
    places = [ProgressPlace(str(tmp_path / "_progress" / "000000" / str(attempt)), b"key") for attempt in range(3)]
    tasks = [
        ShardTask(0, attempt, rows, str(tmp_path / f"{attempt}.parquet"), SCHEMA, place)
        for attempt, place in enumerate(places)
    ]
    (tmp_path / "_progress").mkdir()
    seen: list[int] = []
    running = threading.Thread(target=lambda: seen.append(replica.run_shard(tasks[0]).rows))
    with monkeypatch.context() as patch:
        # Rows that come write nothing: all is written while the next one is waited for.
        patch.setattr(shard_progress.ShardProgress, "add", lambda self, record: self._unsaved.append(record))
        running.start()
        wait_for(lambda: Path(places[0].path).exists())
        assert not seen, "the shard has not ended, one row after another as they are"
        running.join()
    assert seen == [7]
    kept = Path(places[0].path).read_bytes()
    frames = list(shard_progress.payloads(kept, b"key"))
    assert len(frames) > 1

    rest = len(shard_progress.frame(frames[-1], b"key"))
    Path(places[0].path).write_bytes(kept[: -rest // 2])  # as a crash leaves it
    second, third = replica.run_shard(tasks[1]), replica.run_shard(tasks[2])
    replica.stop()
    assert 0 < second.stats.resumed_rows < 6 and second.has_progress
    assert third.stats.resumed_rows == 6, "from both attempts"
    tables = [pq.read_table(task.part_path) for task in tasks[:3]]
    assert tables[1].equals(tables[2]) and tables[1].equals(tables[0]), "a plain copy at one slot, statistics included"
    assert replica.progress().resumed_rows == second.stats.resumed_rows + 6


def test_a_row_that_is_refused_by_an_idle_engine_is_an_error_row_and_the_next_is_generated(tmp_path: Path) -> None:
    """The engine was asked for a round over nothing, which failed it, and the whole job."""
    replica = new_replica(tmp_path, (), None)
    long = InputRow(0, "0", prompt="tea " * 300)
    paths = [str(tmp_path / f"{i}.parquet") for i in range(2)]
    alone = replica.run_shard(ShardTask(0, 0, (long,), paths[0], SCHEMA))
    time.sleep(0.2)  # for the engine's thread to come to its round
    after = replica.run_shard(ShardTask(1, 0, ROWS[1:], paths[1], SCHEMA))
    replica.stop()
    assert pq.read_table(paths[0])["error_type"].to_pylist() == ["prompt_too_long"]
    assert (alone.stats.errors, after.stats.samples_ok) == (1, 1)
