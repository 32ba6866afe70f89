"""`--retry-errors`: failed rows are tried again, all others stay as they are, whatever is killed meanwhile."""

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from jobs.cli import main
from jobs.commit import read_commits
from jobs.generation import generate
from jobs.storage import open_storage
from pipeline.errors import JobError, RasdError
from tests.fake_rasd import parse
from tests.fakes import FakeBackend, Faults
from tests.jobs import retrying
from tests.jobs.crashing_commits import crash_at_each_step, fail_some
from tests.jobs.tables import table_of
from tests.jobs.test_look_at_job import last_record

DEADLY, BAD = 9, 3  # rows: one ends replicas, as long as they have too little memory for it; one is malformed


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """A command line without output and cluster; 40 rows."""
    prompts = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"id": f"id{i}", "prompt": f"tell me {i}", "n": i}) for i in range(40)]
    lines[BAD] = '{"prompt": '
    prompts.write_text("\n".join(lines) + "\n")
    return ["--model", "m", "--prompts", str(prompts), "--rows-per-shard", "8", "--num-replicas", "1"]


def run(words: list[str], output: str, cluster: str, faults: Faults | None = None, *more: str) -> int:
    return generate(parse([*words, "--output", output, "--ray-address", cluster, *more]), FakeBackend(faults))


def errors_of(table: pa.Table) -> dict[int, str]:
    failed = table.filter(pc.equal(table["status"], "error")).to_pylist()
    return {row["row_index"]: row["error_type"] for row in failed}


@pytest.mark.chaos
@pytest.mark.parametrize("where", ["disk", "s3"])
def test_only_failed_rows_are_generated_and_the_others_stay(
    tmp_path: Path, words: list[str], where: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row that ended every replica meets one with more memory."""
    output = str(tmp_path / "out") if where == "disk" else request.getfixturevalue("uri")
    cluster = request.getfixturevalue("cluster" if where == "disk" else "s3_cluster")
    marks, ledger = tmp_path / "marks", tmp_path / "ledger"
    marks.mkdir()
    ledger.mkdir()
    assert run(words, output, cluster, Faults(deadly_prompt=f"tell me {DEADLY}", marks=str(marks))) == 0
    before, storage = table_of(output), open_storage(output)
    assert errors_of(before) == {BAD: "malformed_json", DEADLY: "killed_replica"}
    untouched = {commit.shard: commit for commit, _ in read_commits(storage) if commit and commit.shard > 1}

    with pytest.raises(RasdError, match="no such weights"):
        run(words, output, cluster, Faults(start_error="no such weights"), "--retry-errors")
    assert table_of(output).equals(before), "taken back before anybody could do better"
    capsys.readouterr()
    assert run(words, output, cluster, Faults(ledger=str(ledger)), "--retry-errors") == 0
    _, record = last_record(capsys)
    assert [path.read_text() for path in ledger.iterdir()] == [f"{DEADLY} 0\n"]
    assert (record["state"], record["retried_rows"], record["resumed_rows"], record["resumed_shards"]) == (
        *("done", 2, 14, 3),
    )
    assert (record["errors"], record["error_types"]) == (1, {"malformed_json": 1})
    attempts = json.loads(storage.read("plan.json") or b"")["attempts"]
    assert [attempt["retry_errors"] for attempt in attempts] == [False, True, True]
    after = table_of(output)
    assert errors_of(after) == {BAD: "malformed_json"}
    assert after["text"][DEADLY].as_py()
    others = pc.not_equal(before["row_index"], DEADLY)
    assert after.filter(others).equals(before.filter(others)), "statistics included"
    assert {commit.shard: commit for commit, _ in read_commits(storage) if commit and commit.shard > 1} == untouched
    assert main(["verify", output]) == 0
    assert storage.progress_shards() == set()


def test_without_errors_the_flag_does_nothing(tmp_path: Path, words: list[str], cluster: str) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out"
    prompts.write_text("\n".join(prompts.read_text().splitlines()[BAD + 1 :]))
    assert run(words, str(output), cluster, None, "--retry-errors") == 0
    before = {path.name: path.read_bytes() for path in (output / "_commits").iterdir()}
    assert run(words, str(output), "192.0.2.1:1", None, "--retry-errors") == 0, "no cluster is needed"
    assert {path.name: path.read_bytes() for path in (output / "_commits").iterdir()} == before
    assert json.loads((output / "report.json").read_text())["retried_rows"] == 0


def undisturbed(target: str) -> pa.Table:
    """What each output below a target had before its crash."""
    fail_some(f"{target}/undisturbed")
    before = table_of(f"{target}/undisturbed")
    assert errors_of(before).keys() == set(retrying.FAILING)
    return before


def check_after_a_crash(output: str | Path, before: pa.Table) -> tuple[int, int]:
    """A run without the flag finishes the job: nothing is lost, doubled or generated for nothing.

    Returns:
        How many rows were still failed ones, and how many were safe.
    """
    safe = retrying.work(output, run=3, longest=9, is_retry=False)
    after = table_of(output)
    assert after["row_index"].to_pylist() == list(range(12))
    failed = errors_of(after)
    assert failed.items() <= errors_of(before).items()
    fine = pc.equal(before["status"], "ok")
    assert after.filter(fine).equals(before.filter(fine))
    assert open_storage(output).progress_shards() == set()
    assert retrying.work(output, run=4, longest=9, is_retry=True) == 3 * len(failed)
    assert errors_of(table_of(output)) == {}
    return len(failed), safe


@pytest.mark.chaos
def test_crash_before_any_step_loses_and_doubles_nothing(tmp_path: Path) -> None:
    num_steps = crash_at_each_step(str(tmp_path), "retry")
    before = undisturbed(str(tmp_path))
    outcomes = set()
    for step in range(1, num_steps + 1):
        output = tmp_path / str(step)
        outcomes.add(check_after_a_crash(output, before))
        names = {path.name for path in output.iterdir() if not path.name.startswith("part-")}
        assert names == {"_commits", "_lease.lock"}
    # Before a commit went, after one or both, and after new ones: of each shard that is open then, three rows are safe.
    assert outcomes == {(2, 0), (1, 3), (0, 6), (0, 3), (0, 0)}


@pytest.mark.chaos
def test_crash_before_any_request_loses_and_doubles_nothing(uri: str) -> None:
    num_requests = crash_at_each_step(uri, "retry")
    before = undisturbed(uri)
    outcomes = {check_after_a_crash(f"{uri}/{number}", before) for number in range(1, num_requests + 1)}
    # The old record stays until a new one replaces it.
    assert outcomes == {(2, 0), (1, 0), (0, 0)}


def test_a_part_that_is_not_what_was_committed_is_no_source_of_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    retrying.work(tmp_path, run=1, longest=3, is_retry=False)
    part = tmp_path / "part-000000.parquet"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert retrying.work(tmp_path, run=2, longest=9, is_retry=True) == 3, "those of the other shard"
    assert "part-000000.parquet is not what was committed" in caplog.text
    assert errors_of(table_of(tmp_path)) == {}


def test_a_shard_whose_rows_cannot_be_kept_stays_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    retrying.work(tmp_path, run=1, longest=3, is_retry=False)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("actors.shard_progress._Files.append", full)
    with pytest.raises(JobError, match=r"part-000000\.parquet that are fine cannot be kept .*No space left.* stays"):
        retrying.work(tmp_path, run=2, longest=9, is_retry=True)
    assert len(list((tmp_path / "_commits").iterdir())) == 3
