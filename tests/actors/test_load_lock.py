"""Replicas of one node load their models one after the other, and a dead one leaves the lock to the next."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from actors import load_lock, loaded
from actors.replica import Replica
from actors.replica_config import ReplicaConfig
from pipeline.errors import JobError
from pipeline.request import SamplingParams

ROOT = Path(__file__).parents[2]


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
    """A real replica that notes when it is about to load and when it loads, memory for keys and values included.

    Before it takes that memory, it waits until the other one is about to load, and then gives it time to, too. `hangs`
    does not come back from loading.
    """

    def __init__(self, config: ReplicaConfig, marks: str, hangs: bool) -> None:
        super().__init__(config)
        self._own = Path(marks, str(config.replica))
        self._other = Path(marks, str(1 - config.replica))
        self._begin = 0.0
        load_tokenizer, load_model, build_engine = loaded.load_tokenizer, loaded.load_causal_lm, loaded.build_engine

        def tokenizer(*arguments: Any, **options: Any) -> Any:
            found = load_tokenizer(*arguments, **options)
            self._own.with_suffix(".ready").touch()
            return found

        def model(*arguments: Any, **options: Any) -> Any:
            self._begin = time.monotonic()
            self._own.with_suffix(".loading").write_text(str(os.getpid()))
            if hangs:
                time.sleep(1000)
            return load_model(*arguments, **options)

        def engine(*arguments: Any, **options: Any) -> Any:
            if not self._other.with_suffix(".done").exists():
                assert wait_for(self._other.with_suffix(".ready"), 100)
                wait_for(self._other.with_suffix(".loading"), 3)
            found = build_engine(*arguments, **options)
            self._own.with_suffix(".done").write_text(json.dumps([self._begin, time.monotonic()]))
            return found

        loaded.load_tokenizer, loaded.load_causal_lm = tokenizer, model  # type: ignore[assignment]
        loaded.build_engine = engine  # type: ignore[assignment]


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
            gpu_share=1.0,
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
            quantization="none",
            num_ranks=1,
            is_split=False,
            is_traced=False,
        )
        actor: Any = ray.remote(Marking).options(num_cpus=1, max_restarts=0)
        handle = actor.remote(config, str(marks), first_hangs and replica == 0)
        futures.append((handle, handle.start.remote()))
        if first_hangs and replica == 0:
            assert wait_for(marks / "0.loading", 100)
    return futures


def test_two_replicas_of_a_node_load_and_take_their_memory_one_after_the_other(tmp_path: Path) -> None:
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


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Iterator[subprocess.Popen[str]]":
    """A process that has the lock, which is not this node's but one in a directory of the test's own."""
    monkeypatch.setattr(load_lock, "load_lock_path", lambda: tmp_path / "load.lock")
    monkeypatch.setattr(load_lock, "LOOK_SECONDS", 0.05)
    script = "import sys, time; from pathlib import Path; from actors import load_lock as m\n"
    script += "m.load_lock_path = lambda: Path(sys.argv[1])\n"
    script += "with m.load_lock('replica 7 of /out'): print(flush=True); time.sleep(1000)"
    command = [sys.executable, "-c", script, str(tmp_path / "load.lock")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "\n"
        yield process
        process.kill()


def test_who_waits_says_for_whom_and_gets_the_lock_of_a_killed_process(
    held: "subprocess.Popen[str]", caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first look that finds the lock taken ends its holder."""
    name = f"process {held.pid} (replica 7 of /out) loads its model on this node first"
    kill = logging.Handler()
    monkeypatch.setattr(kill, "emit", lambda record: held.kill())
    load_lock.log.addHandler(kill)
    try:
        with caplog.at_level(logging.WARNING), load_lock.load_lock("replica 1 of /out"):
            pass
    finally:
        load_lock.log.removeHandler(kill)
    assert name in caplog.text


def test_a_process_that_never_ends_loading_is_an_error_that_names_it(
    held: "subprocess.Popen[str]", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_lock, "LONGEST_SECONDS", 0.2)
    message = rf"process {held.pid} \(replica 7 of /out\) has been loading .*load\.lock.* End that process"
    with pytest.raises(JobError, match=message), load_lock.load_lock("replica 1 of /out"):
        pass
