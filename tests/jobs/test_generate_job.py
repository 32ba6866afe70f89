"""`rasd generate` from inputs to committed Parquet, on Ray, with replicas that only pretend to have a model."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs.backend import Launch
from jobs.generation import generate
from jobs.lease import Lease
from pipeline.errors import ConfigError, ModelError
from tests.fake_rasd import parse
from tests.fakes import FakeBackend, Faults
from tests.jobs.tables import table_of

ROOT = Path(__file__).parents[2]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """40 rows: duplicate ids, a column that clashes, three bad lines."""
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"id": f"id{i // 2}", "prompt": f"tell me {i}", "text": "mine", "n": i}) for i in range(40)]
    lines[7], lines[19], lines[33] = '{"prompt": ', '{"id": "lost"}', '{"prompt": ""}'
    path.write_text("\n".join(lines) + "\n")
    return path


def words(prompts: Path, output: Path, *more: str) -> list[str]:
    return ["--model", "m", "--prompts", str(prompts), "--output", str(output), "--num-samples", "2", "--quiet", *more]


def run(prompts: Path, output: Path, cluster: str, *more: str, backend: FakeBackend | None = None) -> int:
    config = parse(words(prompts, output, "--ray-address", cluster, *more))
    return generate(config, backend or FakeBackend())


def start(prompts: Path, output: Path, cluster: str, seconds_a_row: float) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tests.fake_rasd", str(seconds_a_row)]
    command += words(prompts, output, "--ray-address", cluster)
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process: "subprocess.Popen[str]", output: Path, pattern: str) -> None:
    deadline = time.monotonic() + 120
    while not list(output.glob(pattern)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_every_row_and_sample_comes_out_once(
    tmp_path: Path, prompts: Path, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert run(prompts, output, cluster) == 0
    table = table_of(output)
    keys = list(zip(table["row_index"].to_pylist(), table["sample"].to_pylist(), strict=True))
    assert keys == [(row, sample) for row in range(40) for sample in range(2)]
    assert table["id"].to_pylist()[:3] == ["id0", "id0", "id0"]
    assert table["n"].to_pylist()[8:10] == [4, 4]
    assert set(table["input_text"].to_pylist()) == {"mine", None}

    bad = table.filter(pa.compute.equal(table["status"], "error"))
    assert [row["row_index"] for row in bad.to_pylist()[::2]] == [7, 19, 33]
    assert bad["error_type"].to_pylist()[::2] == ["malformed_json", "missing_field", "empty_prompt"]
    assert "prompts.jsonl line 8" in bad["error_message"][0].as_py()
    assert set(bad["text"].to_pylist()) == {None}

    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record == json.loads((output / "report.json").read_text())
    assert (record["state"], record["rows"], record["ok"], record["errors"]) == ("done", 80, 74, 6)
    assert record["error_types"] == {"malformed_json": 2, "missing_field": 2, "empty_prompt": 2}
    assert record["tau"] == (8 - 1) / 4
    names = {path.name for path in output.iterdir() if not path.name.startswith("part-")}
    assert names == {"plan.json", "report.json", "_commits", "_lease.lock"}


class CountingBackend(FakeBackend):
    """Notes how many calls each replica is asked to take at once."""

    def launch(self, launch: Launch) -> Any:
        self.concurrency = launch.concurrency
        return super().launch(launch)


def test_a_replica_gets_no_more_shards_at_once_than_its_share(tmp_path: Path, prompts: Path, cluster: str) -> None:
    """64 slots could take 8 of these 5 shards: the first replica that was ready once took all, and the other idled."""
    backend = CountingBackend()
    more = ("--num-replicas", "2", "--slots", "64", "--rows-per-shard", "8")
    assert run(prompts, tmp_path / "out", cluster, *more, backend=backend) == 0
    assert backend.concurrency == 3 + 2, "three of five shards, and two calls beside them"


def test_second_run_does_nothing_and_needs_no_cluster(
    tmp_path: Path, prompts: Path, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    run(prompts, output, cluster)
    before = table_of(output)
    assert run(prompts, output, "192.0.2.1:1") == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["resumed_shards"] == record["num_shards"] == record["shards"]
    assert table_of(output).equals(before)


def test_error_types_come_from_the_records_and_of_earlier_versions_from_the_parts(
    tmp_path: Path, prompts: Path, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """To count a few error rows, a job read all parts that have some, on an object store whole ones."""
    output = tmp_path / "out"
    run(prompts, output, cluster)
    expected = {"malformed_json": 2, "missing_field": 2, "empty_prompt": 2}
    for record in (output / "_commits").iterdir():
        commit = json.loads(record.read_text())
        del commit["stats"]["error_types"]
        record.write_text(json.dumps(commit))
    assert run(prompts, output, cluster) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["error_types"] == expected

    output = tmp_path / "again"
    run(prompts, output, cluster)
    for part in output.glob("part-*.parquet"):
        part.write_bytes(bytes(part.stat().st_size))
    assert run(prompts, output, cluster) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["error_types"] == expected


@pytest.mark.chaos
@pytest.mark.parametrize("files_before", ["plan.json", "_commits/*.json"])
def test_killed_job_resumes_to_the_result_of_an_undisturbed_one(
    tmp_path: Path, prompts: Path, cluster: str, files_before: str
) -> None:
    undisturbed, output = tmp_path / "undisturbed", tmp_path / "out"
    run(prompts, undisturbed, cluster)
    process = start(prompts, output, cluster, 0.05)
    wait_for(process, output, files_before)
    process.kill()
    process.communicate()
    assert run(prompts, output, cluster) == 0
    assert table_of(output).equals(table_of(undisturbed))
    assert len(json.loads((output / "plan.json").read_text())["attempts"]) == 2


@pytest.mark.chaos
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_stops_between_commits_and_the_job_resumes(
    tmp_path: Path, prompts: Path, cluster: str, number: signal.Signals, code: int
) -> None:
    output = tmp_path / "out"
    process = start(prompts, output, cluster, 0.05)
    wait_for(process, output, "_commits/*.json")
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert json.loads(stdout.splitlines()[-1])["state"] == "stopped"
    assert not (output / "_lease").exists()
    assert run(prompts, output, cluster) == 0
    assert table_of(output).num_rows == 80


def test_changed_fingerprint_is_refused_with_the_difference(tmp_path: Path, prompts: Path, cluster: str) -> None:
    output = tmp_path / "out"
    run(prompts, output, cluster)
    expected = r"seed: 0 -> 1; temperature: 0.0 -> 0.5\. Restore those options to resume it, or choose another --output"
    with pytest.raises(ConfigError, match=expected):
        run(prompts, output, cluster, "--temperature", "0.5", "--seed", "1")
    with pytest.raises(ConfigError, match="chat_template: template -> another"):
        run(prompts, output, cluster, backend=FakeBackend(template="another"))
    assert run(prompts, output, cluster, "--slots", "3", "--num-replicas", "2", "--method", "plain") == 0

    prompts.write_text(prompts.read_text() + '{"prompt": "one more"}\n')
    with pytest.raises(ConfigError, match=r"inputs: .*num_rows: 40 -> 41"):
        run(prompts, output, cluster)


def test_dtype_left_open_is_fixed_by_the_first_replica(tmp_path: Path, prompts: Path, cluster: str) -> None:
    output = tmp_path / "out"
    run(prompts, output, cluster, backend=FakeBackend(Faults(dtype="bfloat16")))
    fingerprint = json.loads((output / "plan.json").read_text())["fingerprint"]
    assert (fingerprint["dtype"], fingerprint["max_context"]) == ("bfloat16", 2048)
    (output / "part-000001.parquet").unlink()
    assert run(prompts, output, cluster, backend=FakeBackend(Faults(dtype="float32"))) == 0
    replicas = [
        attempt["replicas"][0]["dtype"] for attempt in json.loads((output / "plan.json").read_text())["attempts"]
    ]
    assert replicas == ["bfloat16", "bfloat16"]
    with pytest.raises(ConfigError, match="dtype: bfloat16 -> float32"):
        run(prompts, output, cluster, "--dtype", "float32")


def test_error_rate_stops_the_job_and_stops_it_again(
    tmp_path: Path, prompts: Path, cluster: str, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "out"
    with caplog.at_level(logging.ERROR):
        assert run(prompts, output, cluster, "--max-error-rate", "0.02") == 3
    assert "more than --max-error-rate 0.02" in caplog.text
    assert json.loads((output / "report.json").read_text())["state"] == "error_rate"
    assert run(prompts, output, cluster, "--max-error-rate", "0.02") == 3
    assert run(prompts, output, cluster, "--max-error-rate", "0.075") == 0


def test_dry_run_prints_the_plan_and_creates_nothing(
    tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    command = ["--model", "m", "--prompts", str(prompts), "--output", str(output), "--num-samples", "2", "--dry-run"]
    assert generate(parse(command), FakeBackend()) == 0
    text = capsys.readouterr().out
    for expected in ("80 output rows", "5 of up to 8 prompts", "input_text: string", "2.00 GiB KV", "1.00 GiB weights"):
        assert expected in text
    assert json.loads(text.splitlines()[-1])["num_shards"] == 5
    assert not output.exists()


def test_foreign_directory_is_refused_and_left_alone(tmp_path: Path, prompts: Path, cluster: str) -> None:
    output = tmp_path / "mine"
    output.mkdir()
    (output / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match=r"it holds 'thesis\.tex' but no plan"):
        run(prompts, output, cluster)
    assert os.listdir(output) == ["thesis.tex"]
    with pytest.raises(ConfigError, match="no directory that can be read"):
        run(prompts, prompts, cluster)


def test_second_live_driver_is_refused(tmp_path: Path, prompts: Path, cluster: str) -> None:
    output = tmp_path / "out"
    output.mkdir()
    with Lease(output), pytest.raises(ConfigError, match="is in use by process"):
        run(prompts, output, cluster)


def test_model_that_does_not_load_is_the_error_and_nothing_is_committed(
    tmp_path: Path, prompts: Path, cluster: str
) -> None:
    output = tmp_path / "out"
    with pytest.raises(ModelError, match=r"^no weights in m\.$"):
        run(prompts, output, cluster, backend=FakeBackend(Faults(start_error="no weights in m.")))
    assert list((output / "_commits").iterdir()) == []
    # Nothing was generated, so that even another seed is no contradiction.
    assert run(prompts, output, cluster, "--seed", "9") == 0


def test_submitted_job_needs_an_output_that_outlives_it(prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(ConfigError, match="--output is 'out'; a submitted job runs in a directory that Ray removes"):
        run(prompts, Path("out"), "local")


def test_unreachable_cluster_is_one_clear_error(tmp_path: Path, prompts: Path) -> None:
    with pytest.raises(ConfigError, match="--ray-address is 'no-such-host'"):
        run(prompts, tmp_path / "out", "no-such-host")


def test_one_shard_of_every_row_and_many_of_one(tmp_path: Path, prompts: Path, cluster: str) -> None:
    tables: list[Any] = []
    for rows in ("1", "1000"):
        output = tmp_path / rows
        assert run(prompts, output, cluster, "--rows-per-shard", rows) == 0
        tables.append(table_of(output))
    assert tables[0].equals(tables[1])
