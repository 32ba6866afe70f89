"""`rasd status`, `verify` and `merge` on the output of real jobs, whole, running, unfinished and damaged."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.cli import main
from jobs.commit import read_commits
from jobs.generation import generate
from pipeline.digests import file_sha256
from tests.fake_rasd import parse
from tests.fakes import FakeBackend
from tests.jobs.tables import table_of
from tests.jobs.test_generate_job import start, wait_for, words


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """40 rows, one of them bad."""
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"tell me {i}", "n": i}) for i in range(40)]
    lines[7] = '{"prompt": '
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def done(tmp_path: Path, prompts: Path, cluster: str) -> Path:
    """The output of a finished job of two samples a row."""
    output = tmp_path / "out"
    config = parse(words(prompts, output, "--ray-address", cluster, "--rows-per-shard", "8"))
    assert generate(config, FakeBackend()) == 0
    return output


def last_record(capsys: pytest.CaptureFixture[str]) -> tuple[str, Any]:
    out = capsys.readouterr().out
    return out, json.loads(out.strip().splitlines()[-1])


def test_a_finished_job(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["status", str(done)]) == 0
    out, record = last_record(capsys)
    assert "5 of 5" in out and "80 of 80 (100.0%)" in out
    assert (record["state"], record["rows"], record["errors"], record["seconds_left"]) == ("done", 80, 2, None)
    assert main(["verify", str(done)]) == 0
    out, record = last_record(capsys)
    assert out.count("\n") == 1 and record == {
        "state": "intact",
        "rows": 80,
        "num_rows": 80,
        "errors": 2,
        "problems": [],
    }


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_merged_output_is_the_parts_in_order(done: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = done.parent / f"all{suffix}"
    assert main(["merge", str(done), "-o", str(file)]) == 0
    assert last_record(capsys)[1] == {"file": str(file), "rows": 80, "bytes": file.stat().st_size}
    expected = table_of(done)
    if suffix == ".parquet":
        assert pq.read_table(file).equals(expected)
    else:
        rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        assert rows == json.loads(json.dumps(expected.to_pylist(), default=str))
    assert main(["merge", str(done), "-o", str(file)]) == 2, "a file that exists is left alone"
    assert main(["merge", str(done), "-o", str(done.parent / "all.csv")]) == 2
    assert not list(done.parent.glob("*.tmp"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def recommit(path: Path, table: pa.Table) -> None:
    """Another part file, and a commit record that agrees with it."""
    pq.write_table(table, path)
    record = path.parent / "_commits" / "000002.json"
    commit = json.loads(record.read_text())
    record.write_text(json.dumps({**commit, "bytes": path.stat().st_size, "sha256": file_sha256(path)}))


def repeat_a_row(path: Path) -> None:
    table = pq.read_table(path)
    recommit(path, pa.concat_tables([table.slice(0, 3), table.slice(2, 1), table.slice(4)]))


def drop_a_column(path: Path) -> None:
    recommit(path, pq.read_table(path).drop_columns(["n"]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "bytes, its commit says"),
        (flip, "not those that were committed (sha256)"),
        (Path.unlink, "cannot be read"),
        (repeat_a_row, "its 16 rows are not those of shard 2"),
        (drop_a_column, "are not the plan's"),
    ],
)
def test_damage_is_found_and_named(done: Path, damage: Any, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    damage(done / "part-000002.parquet")
    assert main(["verify", str(done)]) == 1
    out, record = last_record(capsys)
    assert message in out and "part-000002.parquet" in out and record["state"] == "damaged"
    assert len(record["problems"]) == 1


def test_strays_missing_shards_and_torn_records_are_found(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (done / "part-000007.parquet").write_bytes(b"")
    (done / "_commits" / "000001.json").write_text("{")
    (done / "_commits" / "000003.json").unlink()
    assert main(["verify", str(done)]) == 1
    _, record = last_record(capsys)
    assert len(record["problems"]) == 5, (
        "a torn record, two missing shards in one line, and three files without a commit"
    )
    assert main(["status", str(done)]) == 0
    _, record = last_record(capsys)
    assert (record["state"], record["shards"], record["damaged"]) == ("stopped", 3, ["000001.json"])
    assert main(["merge", str(done), "-o", str(done.parent / "all.parquet")]) == 2
    assert "3 of 5 shards are done" in capsys.readouterr().err


def test_a_running_job_and_then_a_killed_one(
    tmp_path: Path, prompts: Path, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    process = start(prompts, output, cluster, seconds_a_row=0.05)
    try:
        wait_for(process, output, "_commits/*.json")
        assert main(["status", str(output)]) == 0
        out, record = last_record(capsys)
        assert record["state"] == "running" and f"process {process.pid} on" in out
        assert 0 < record["rows"] < 80 and record["rows_per_second"] > 0 and record["seconds_left"] > 0
    finally:
        process.kill()
        process.communicate()
    assert main(["status", str(output)]) == 0
    assert last_record(capsys)[1]["state"] == "stopped"
    partial = tmp_path / "partial.parquet"
    assert main(["merge", str(output), "-o", str(partial), "--partial"]) == 0
    committed = sum(commit.rows for commit, _ in read_commits(output) if commit)
    assert pq.read_metadata(partial).num_rows == committed > 0


@pytest.mark.parametrize("command", [["status"], ["verify"], ["merge", "-o", "x.parquet"]])
def test_a_directory_without_a_job_is_refused(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command[0], str(tmp_path), *command[1:]]) == 2
    assert "is no output of rasd generate" in capsys.readouterr().err
