"""`rasd generate`, `status`, `verify` and `merge` on an object store: real Ray, real Parquet, a real S3 server."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.object_store import open_store
from actors.rows import RowFailure
from jobs.cli import main
from jobs.commit import committed_parts, read_commits
from jobs.corpus.generations import GenerationSource
from jobs.generation import generate
from jobs.storage import open_storage
from pipeline.errors import ConfigError
from tests.fake_rasd import parse
from tests.fakes import FakeBackend
from tests.jobs.tables import table_of
from tests.jobs.test_generate_job import ROOT
from tests.jobs.test_look_at_job import last_record


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """40 rows, two of them bad."""
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"id": f"id{i}", "prompt": f"tell me {i}", "n": i}) for i in range(40)]
    lines[7], lines[33] = '{"prompt": ', '{"prompt": ""}'
    path.write_text("\n".join(lines) + "\n")
    return path


def words(prompts: Path, output: str, cluster: str) -> list[str]:
    command = ["--model", "m", "--prompts", str(prompts), "--output", output, "--num-samples", "2", "--quiet"]
    return [*command, "--ray-address", cluster]


def run(prompts: Path, output: str, cluster: str, *more: str) -> int:
    return generate(parse([*words(prompts, output, cluster), *more]), FakeBackend())


def undisturbed(tmp_path: Path, prompts: Path, cluster: str) -> pa.Table:
    """What the same job writes to a directory."""
    assert run(prompts, str(tmp_path / "undisturbed"), cluster) == 0
    return table_of(tmp_path / "undisturbed")


def stored_table(uri: str) -> pa.Table:
    parts = committed_parts(open_storage(uri), uri)
    return pa.concat_tables([pq.read_table(part.open()) for part in parts])


def start(prompts: Path, uri: str, cluster: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tests.fake_rasd", "0.05", *words(prompts, uri, cluster)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process: "subprocess.Popen[str]", uri: str, folder: str, name: str) -> None:
    deadline = time.monotonic() + 120
    while not any(entry.name.endswith(name) for entry in open_storage(uri).entries(folder)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_job_on_an_object_store_is_the_job_in_a_directory(
    tmp_path: Path, prompts: Path, uri: str, s3_cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(prompts, uri, s3_cluster) == 0
    _, record = last_record(capsys)
    assert (record["state"], record["rows"], record["errors"], record["output"]) == ("done", 80, 4, uri)
    assert record["error_types"] == {"malformed_json": 2, "empty_prompt": 2}
    assert record == json.loads(open_storage(uri).read("report.json") or b"")
    expected = undisturbed(tmp_path, prompts, s3_cluster)
    assert stored_table(uri).equals(expected)
    parts = {commit.file for commit, _ in read_commits(open_storage(uri)) if commit}
    assert len(parts) == 5
    assert open_storage(uri).names() == {"plan.json", "report.json", "_commits", "_lease", *parts}

    capsys.readouterr()
    assert main(["status", uri]) == 0
    assert last_record(capsys)[1]["state"] == "done"
    assert main(["verify", uri]) == 0
    assert last_record(capsys)[1]["problems"] == []
    merged = tmp_path / "all.parquet"
    assert main(["merge", uri, "-o", str(merged)]) == 0
    assert pq.read_table(merged).equals(expected)
    documents = [item for item in GenerationSource(uri, "tokenizer").documents() if not isinstance(item, RowFailure)]
    assert len(documents) == 76

    assert run(prompts, uri, "192.0.2.1:1") == 0, "nothing is left to do, so that no cluster is needed"
    with pytest.raises(ConfigError, match=rf"--output {uri} holds a job that would give other text: seed: 0 -> 1"):
        run(prompts, uri, s3_cluster, "--seed", "1")


@pytest.mark.chaos
@pytest.mark.parametrize(("folder", "name"), [("", "plan.json"), ("", ".parquet"), ("_commits", ".json")])
def test_killed_job_resumes_to_the_result_of_an_undisturbed_local_one(
    tmp_path: Path, prompts: Path, uri: str, s3_cluster: str, folder: str, name: str
) -> None:
    process = start(prompts, uri, s3_cluster)
    wait_for(process, uri, folder, name)
    process.kill()
    process.communicate()
    assert run(prompts, uri, s3_cluster) == 0
    assert stored_table(uri).equals(undisturbed(tmp_path, prompts, s3_cluster))
    assert len(json.loads(open_storage(uri).read("plan.json") or b"")["attempts"]) == 2
    assert main(["verify", uri]) == 0


@pytest.mark.chaos
def test_a_running_job_refuses_a_second_driver_and_stops_by_a_signal(
    prompts: Path, uri: str, s3_cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    process = start(prompts, uri, s3_cluster)
    try:
        wait_for(process, uri, "_commits", ".json")
        with pytest.raises(ConfigError, match=f"{uri} is in use by process {process.pid} on "):
            run(prompts, uri, s3_cluster)
        capsys.readouterr()
        assert main(["status", uri]) == 0
        assert last_record(capsys)[1]["state"] == "running"
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143, stderr
    assert json.loads(stdout.splitlines()[-1])["state"] == "stopped"
    assert open_storage(uri).holder() is None
    assert main(["merge", uri, "-o", str(prompts.parent / "all.jsonl")]) == 2
    assert run(prompts, uri, s3_cluster) == 0
    assert main(["verify", uri]) == 0


def test_damage_and_strays_are_found(
    prompts: Path, uri: str, s3_cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(prompts, uri, s3_cluster)
    store, storage = open_store(uri), open_storage(uri)
    first, second, third, *_ = [commit for commit, _ in read_commits(storage) if commit]
    data: Any = bytearray(storage.open(first.file).read())
    data[len(data) // 2] ^= 1
    store.write(first.file, bytes(data))
    store.write(second.file, b"")
    store.remove([third.file])
    store.write("part-000000-000009-01234567.parquet", b"")
    store.write("_commits/000003.json", b"{")
    capsys.readouterr()
    assert main(["verify", uri]) == 1
    out, record = last_record(capsys)
    for expected in ("(sha256)", "0 bytes, its commit says", "is not there", "no commit names it", "cannot be read"):
        assert expected in out
    # The record that cannot be read counts thrice: itself, its shard, and its part.
    assert len(record["problems"]) == 7
    assert main(["merge", uri, "-o", str(prompts.parent / "all.parquet")]) == 2
    # What only its digest gives away is not looked for when a job goes on.
    store.remove([first.file])
    assert run(prompts, uri, s3_cluster) == 0
    assert main(["verify", uri]) == 0


def test_what_is_no_output_or_cannot_be_one_is_refused(prompts: Path, uri: str, s3_cluster: str) -> None:
    with pytest.raises(ConfigError, match=r"s3://no-such-bucket.*NoSuchBucket"):
        run(prompts, "s3://no-such-bucket/out", s3_cluster)
    open_store(uri).write("thesis.tex", b"x")
    with pytest.raises(ConfigError, match=r"it holds 'thesis\.tex' but no plan"):
        run(prompts, uri, s3_cluster)
    assert open_storage(uri).names() == {"thesis.tex"}
    for command in (["status", uri], ["verify", uri], ["merge", uri, "-o", "x.parquet"]):
        assert main(command) == 2
    assert main(["train-draft", "--model", "smollm2-135m", "--prompts", str(prompts), "--output", uri]) == 2


def test_dry_run_creates_nothing(prompts: Path, uri: str, s3_cluster: str) -> None:
    assert run(prompts, uri, s3_cluster, "--dry-run") == 0
    assert open_storage(uri).names() == set()
