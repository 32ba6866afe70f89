"""A replica or a driver dies in the middle of a shard: what it had finished is not generated again (real Ray)."""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray

from actors.shard_progress import PROGRESS
from jobs.cli import main
from jobs.generation import generate
from jobs.storage import Storage, open_storage
from pipeline.errors import ConfigError
from tests.fake_rasd import parse
from tests.fakes import TOKENS_A_ROW, FakeBackend, Faults
from tests.jobs.tables import table_of
from tests.jobs.test_driver import Listener, drive
from tests.jobs.test_generate_job import ROOT
from tests.jobs.test_look_at_job import last_record
from tests.jobs.test_object_job import stored_table

NUM_ROWS = 40  # two samples each, all in one shard

# A shard must last for some writes of progress, which come every 2 s to a disk and every 10 s to an object store.
DISK = 0.08
OBJECTS = 0.2


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """One row is bad."""
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"id": f"id{i}", "prompt": f"tell me {i}", "n": i}) for i in range(NUM_ROWS)]
    lines[3] = '{"prompt": '
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    """Where replicas note what they generate, a file a process."""
    path = tmp_path / "ledger"
    path.mkdir()
    return path


def words(prompts: Path, output: str, cluster: str) -> list[str]:
    command = ["--model", "m", "--prompts", str(prompts), "--output", output, "--num-samples", "2", "--quiet"]
    return [*command, "--num-replicas", "1", "--rows-per-shard", str(NUM_ROWS), "--ray-address", cluster]


def run(prompts: Path, output: str, cluster: str, faults: Faults | None = None, *more: str) -> int:
    return generate(parse([*words(prompts, output, cluster), *more]), FakeBackend(faults))


def stored_progress(storage: Storage) -> int:
    """Bytes of it that are there."""
    folders = [f"{PROGRESS}/{shard:06d}" for shard in storage.progress_shards()]
    return sum(entry.bytes for folder in folders for entry in storage.entries(folder))


def wait_for_progress(storage: Storage, is_alive: Any = lambda: True) -> None:
    deadline = time.monotonic() + 120
    while not stored_progress(storage):
        assert is_alive() and time.monotonic() < deadline
        time.sleep(0.05)


def record_of(storage: Storage, name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(storage.read(name) or b"")
    return record


def check_only_the_rest_was_generated(storage: Storage, ledger: Path) -> None:
    """By the ledger: the job's last replica generated all but the rows that the report says were safe."""
    report = record_of(storage, "report.json")
    safe = report["resumed_rows"]
    assert (report["rows"], report["errors"]) == (2 * NUM_ROWS, 2) and 0 < safe < 2 * NUM_ROWS - 2
    pid = record_of(storage, "plan.json")["attempts"][-1]["replicas"][-1]["pid"]
    last = (ledger / str(pid)).read_text().splitlines()
    earlier = {line for path in ledger.iterdir() if path.name != str(pid) for line in path.read_text().splitlines()}
    assert len(last) == len(set(last)) == 2 * NUM_ROWS - 2 - safe
    assert len(earlier - set(last)) == safe, "what it left out is what another had done"
    assert report["tokens"] == TOKENS_A_ROW * len(last), "what was safe is no sign of this run's speed"
    assert storage.progress_shards() == set()


@contextlib.contextmanager
def killing_the_first_replica(storage: Storage) -> Iterator[None]:
    """As soon as it has made some of its rows safe."""

    def kill() -> None:
        wait_for_progress(storage)
        os.kill(record_of(storage, "plan.json")["attempts"][-1]["replicas"][0]["pid"], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    yield
    thread.join()


def killed_replica(prompts: Path, output: str, cluster: str, ledger: Path, seconds: float) -> None:
    storage = open_storage(output)
    with killing_the_first_replica(storage):
        assert run(prompts, output, cluster, Faults(seconds_a_row=seconds, ledger=str(ledger))) == 0
    check_only_the_rest_was_generated(storage, ledger)
    assert len(record_of(storage, "plan.json")["attempts"]) == 1


def killed_driver(prompts: Path, output: str, cluster: str, ledger: Path, seconds: float) -> None:
    storage = open_storage(output)
    command = [sys.executable, "-m", "tests.fake_rasd", str(seconds), str(ledger), *words(prompts, output, cluster)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_progress(storage, lambda: process.poll() is None)
    process.kill()
    process.wait()
    with pytest.raises(ConfigError, match=r"would give other text: seed: 0 -> 1"):  # though no shard is committed
        run(prompts, output, cluster, None, "--seed", "1")
    assert run(prompts, output, cluster, Faults(ledger=str(ledger))) == 0
    check_only_the_rest_was_generated(storage, ledger)


@pytest.mark.chaos
@pytest.mark.parametrize("scenario", [killed_replica, killed_driver])
def test_what_dies_in_a_shard_costs_only_what_was_not_safe(
    tmp_path: Path, prompts: Path, cluster: str, ledger: Path, scenario: Any, caplog: pytest.LogCaptureFixture
) -> None:
    undisturbed, output = tmp_path / "undisturbed", tmp_path / "out"
    assert run(prompts, str(undisturbed), cluster) == 0
    with caplog.at_level(logging.INFO):
        scenario(prompts, str(output), cluster, ledger, DISK)
    assert "rows were safe from an earlier attempt" in caplog.text
    assert table_of(output).equals(table_of(undisturbed))
    assert {path.name for path in output.iterdir() if path.name.startswith("_")} == {"_commits", "_lease.lock"}


@pytest.mark.chaos
@pytest.mark.parametrize("scenario", [killed_replica, killed_driver])
def test_the_same_on_an_object_store(
    tmp_path: Path, prompts: Path, uri: str, s3_cluster: str, ledger: Path, scenario: Any
) -> None:
    undisturbed = tmp_path / "undisturbed"
    assert run(prompts, str(undisturbed), s3_cluster) == 0
    scenario(prompts, uri, s3_cluster, ledger, OBJECTS)
    expected: pa.Table = table_of(undisturbed)
    assert stored_table(uri).equals(expected)
    assert not any(name.startswith(PROGRESS) for name in open_storage(uri).names())


@pytest.mark.chaos
def test_the_search_for_a_deadly_row_generates_no_safe_row_again(
    tmp_path: Path, cluster: str, ledger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last of 64 rows ends every replica: without progress, the others would be generated three times and more."""
    monkeypatch.setattr("tests.jobs.test_driver.ROWS_A_SHARD", 64)
    marks, output = tmp_path / "marks", tmp_path / "out"
    marks.mkdir()
    output.mkdir()
    faults = Faults(seconds_a_row=DISK, deadly_prompt="prompt 63", marks=str(marks), ledger=str(ledger))
    ray.init(address=cluster, log_to_driver=False, logging_level="ERROR")
    try:
        drive(output, faults, Listener(), num_shards=1, num_replicas=1, fingerprint={"seed": 0})
    finally:
        ray.shutdown()
    rows = table_of(output).to_pylist()
    assert [row["row_index"] for row in rows if row["status"] != "ok"] == [63]
    generated = Counter(line for path in ledger.iterdir() for line in path.read_text().splitlines())
    assert len(generated) == 63
    # What a process did in its last 2 s is done again by the next, but not what it did before.
    assert min(generated.values()) == 1


def test_garbage_for_progress_is_no_output_and_fails_nothing(
    tmp_path: Path, prompts: Path, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output, merged = tmp_path / "out", tmp_path / "merged.parquet"
    assert run(prompts, str(output), cluster, None, "--rows-per-shard", "20") == 0
    before = table_of(output)
    (output / "_commits" / "000001.json").unlink()
    (output / "part-000001.parquet").unlink()
    for shard in (0, 1):  # the first one as a replica leaves it that comes too late
        (output / PROGRESS / f"{shard:06d}").mkdir(parents=True)
        (output / PROGRESS / f"{shard:06d}" / "001000").write_bytes(os.urandom(10_000))
    capsys.readouterr()
    assert main(["status", str(output)]) == 0
    assert last_record(capsys)[1]["shards_in_progress"] == 1
    assert main(["verify", str(output)]) == 1
    assert last_record(capsys)[1]["problems"] == ["1 of 2 shards are not there, shard 1 first"]
    assert main(["merge", str(output), "-o", str(merged), "--partial"]) == 0
    assert last_record(capsys)[1]["rows"] == NUM_ROWS
    assert run(prompts, str(output), cluster, None, "--rows-per-shard", "20") == 0
    assert last_record(capsys)[1]["resumed_rows"] == 0
    assert table_of(output).equals(before)
    assert not (output / PROGRESS).exists()
