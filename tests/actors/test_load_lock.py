"""Replicas of one node load their models one after the other, and a dead one leaves the lock to the next."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from actors import loaded
from actors.replica import Replica
from actors.replica_config import ReplicaConfig
from pipeline.request import SamplingParams


@pytest.fixture(scope="module", autouse=True)
def joined(cluster: str) -> Iterator[None]:
    ray.init(address=cluster, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def wait_for(path: Path, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


class Marking(Replica):
    """A real replica that notes when it is about to load and when it loads.

    While it loads, it waits until the other one is about to, and then gives it time to load, too. `hangs` does not come
    back from loading.
    """

    def __init__(self, config: ReplicaConfig, marks: str, hangs: bool) -> None:
        super().__init__(config)
        self._own = Path(marks, str(config.replica))
        self._other = Path(marks, str(1 - config.replica))
        load_tokenizer, load_model = loaded.load_tokenizer, loaded.load_causal_lm

        def tokenizer(*arguments: Any, **options: Any) -> Any:
            found = load_tokenizer(*arguments, **options)
            self._own.with_suffix(".ready").touch()
            return found

        def model(*arguments: Any, **options: Any) -> Any:
            begin = time.monotonic()
            self._own.with_suffix(".loading").write_text(str(os.getpid()))
            if not self._other.with_suffix(".done").exists():
                assert wait_for(self._other.with_suffix(".ready"), 100)
                wait_for(self._other.with_suffix(".loading"), 3)
            if hangs:
                time.sleep(1000)
            found = load_model(*arguments, **options)
            self._own.with_suffix(".done").write_text(json.dumps([begin, time.monotonic()]))
            return found

        loaded.load_tokenizer, loaded.load_causal_lm = tokenizer, model  # type: ignore[assignment]


def start_both(marks: Path, *, first_hangs: bool) -> list[Any]:
    """Futures of two actors' `start`; the first is loading before the second exists if it hangs."""
    futures = []
    for replica in range(2):
        config = ReplicaConfig(
            model="smollm2-135m",
            revision=None,
            dtype="float32",
            device="cpu",
            slots=1,
            slot_tokens=0,
            method="plain",
            budget=None,
            sampling=SamplingParams(max_new_tokens=4),
            seed=0,
            num_samples=1,
            kv_memory=None,
            max_context=128,
            prefill_chunk=64,
            trust_remote_code=False,
            sources=(),
            draft=None,
            retrieval=None,
            replica=replica,
            job=str(marks),
            num_threads=1,
            is_split=False,
            is_traced=False,
        )
        actor: Any = ray.remote(Marking).options(num_cpus=1, max_restarts=0)
        handle = actor.remote(config, str(marks), first_hangs and replica == 0)
        futures.append((handle, handle.start.remote()))
        if first_hangs and replica == 0:
            assert wait_for(marks / "0.loading", 100)
    return futures


def test_two_replicas_of_a_node_load_one_after_the_other(tmp_path: Path) -> None:
    both = start_both(tmp_path, first_hangs=False)
    ray.get([future for _, future in both], timeout=200)
    intervals = sorted(json.loads((tmp_path / f"{i}.done").read_text()) for i in range(2))
    assert intervals[0][1] <= intervals[1][0]
    assert intervals[0][1] - intervals[0][0] >= 3, "the first waited for the second, which did not begin"


@pytest.mark.chaos
def test_a_replica_that_dies_while_it_loads_leaves_the_lock(tmp_path: Path) -> None:
    both = start_both(tmp_path, first_hangs=True)
    assert wait_for(tmp_path / "1.ready", 100)
    assert not wait_for(tmp_path / "1.loading", 1)
    os.kill(int((tmp_path / "0.loading").read_text()), signal.SIGKILL)
    info = ray.get(both[1][1], timeout=200)
    assert info.replica == 1
    assert (tmp_path / "1.done").exists() and not (tmp_path / "0.done").exists()
