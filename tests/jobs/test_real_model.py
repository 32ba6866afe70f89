"""The whole product with the embedded model: `ray job submit` runs it, and SIGKILL in the middle costs no row."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datastore import Datastore
from jobs.cli import main as rasd
from jobs.commit import read_commits
from pipeline.head_files import is_head

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
# What a resumed job must have in common with an undisturbed one (design section 8): everything but statistics.
EXACT = ["row_index", "id", "sample", "prompt", "text", "token_ids", "finish_reason", "seed", "status", "error_type"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    subjects = ["the sea", "bread", "a clock", "winter", "copper", "a long road", "chess", "rain"]
    rows = [
        {"id": f"p{i}", "prompt": f"Here is a short note about {subject}. It"} for i, subject in enumerate(subjects)
    ]
    path.write_text("\n".join([*map(json.dumps, rows), "{broken"]) + "\n")
    return path


def options(prompts: Path, output: Path, *more: str) -> list[str]:
    words = ["--model", "smollm2-135m", "--prompts", str(prompts), "--output", str(output), "--max-context", "256"]
    return [*words, "--max-new-tokens", "12", "--rows-per-shard", "2", "--budget", "6", *more]


def table_of(output: Path) -> pa.Table:
    return pq.read_table([output / commit.file for commit, _ in read_commits(output) if commit])


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def head(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Environment for the commands of a local head with token authentication and a dashboard of its own."""
    token = tmp_path / "token"
    token.write_text("0123456789abcdef" * 4)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    port, dashboard = free_port(), free_port()
    environment |= {
        "PATH": f"{BIN}:{environment['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
    }
    command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1"]
    command += [f"--port={port}", "--include-dashboard=true", f"--dashboard-port={dashboard}", "--disable-usage-stats"]
    # Another Ray on this machine has the default port, and without its agent a node takes no jobs.
    command += [f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}"]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    yield environment
    # Its processes are one group; asked politely they take half a minute.
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def submit(environment: dict[str, str], module: str, words: list[str]) -> "subprocess.CompletedProcess[str]":
    """`ray job submit`, tried again while the head's job server and agent are not up yet."""
    command = [str(BIN / "ray"), "job", "submit", "--working-dir", ".", "--", "python", "-m", module, *words]
    deadline = time.monotonic() + 90
    while True:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250, check=False
        )
        if "submitted successfully" in done.stdout or time.monotonic() > deadline:
            return done
        time.sleep(2)


def test_submitted_job_runs_on_the_cluster(tmp_path: Path, prompts: Path, head: dict[str, str]) -> None:
    output = tmp_path / "out"
    done = submit(head, "jobs.generate", options(prompts, output, "--method", "plain", "--slots", "4"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"state": "done"' in done.stdout
    table = table_of(output)
    assert table["row_index"].to_pylist() == list(range(9))
    assert table["status"].to_pylist() == ["ok"] * 8 + ["error"]
    assert all(table["text"].to_pylist()[:8])


def test_outputs_are_traced_and_played_again(
    tmp_path: Path, prompts: Path, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Phases of every round are in the trace; a replay of the rows accepts tokens, the second time from its file."""
    output, trace, recording = tmp_path / "out", tmp_path / "trace.json", tmp_path / "recording.npz"
    words = ["--quiet", "--ray-address", cluster, "--method", "rasd", "--slots", "4", "--trace", str(trace)]
    assert rasd(["generate", *options(prompts, output, *words)]) == 0
    events = json.loads(trace.read_text())["traceEvents"]
    assert {event["name"] for event in events} >= {"retrieve", "draft", "fuse", "select", "verify", "commit"}
    assert all(event["ph"] == "X" and event["dur"] >= 0 and event["pid"] == 0 for event in events)
    ends = [event["ts"] + event["dur"] for event in events]
    assert all(end <= event["ts"] + 1 for end, event in zip(ends, events[1:], strict=False)), "phases do not overlap"

    words = ["simulate", "--model", "smollm2-135m", "--answers", str(output), "--recording", str(recording)]
    words += ["--dtype", "float32", "--methods", "plain", "draft", "rasd", "--budgets", "8", "auto"]
    capsys.readouterr()
    assert rasd(words) == 0
    first = capsys.readouterr().out
    record = json.loads(first.splitlines()[-1])
    assert record["rows"] == 8 and recording.exists()
    by_method = {(result["method"], result["budget"]): result for result in record["results"]}
    assert by_method["plain", "auto"]["tau"] == by_method["plain", "auto"]["ratio_to_plain"] == 1.0
    assert by_method["rasd", 8]["tau"] > 1.3 and "draft" in by_method["rasd", 8]["accepted"]
    begin = time.monotonic()
    assert rasd(words) == 0
    assert capsys.readouterr().out == first and time.monotonic() - begin < 20
    assert rasd([*words, "--num-rows", "3"]) == 2
    assert "holds 8 rows" in capsys.readouterr().err


def test_submitted_build_makes_a_datastore(tmp_path: Path, head: dict[str, str]) -> None:
    corpus, store = tmp_path / "corpus.txt", tmp_path / "store"
    corpus.write_text("The quick brown fox jumps over the lazy dog, and the lazy dog sleeps on.")
    words = ["--model", "smollm2-135m", "--corpus", str(corpus), "--output", str(store), "--dense", "off"]
    done = submit(head, "jobs.build_datastore", words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"state": "done"' in done.stdout
    opened = Datastore.open(store)
    document = opened.segments[0].segment.document(0)
    assert opened.lookup([document[:5]]).match_lengths.tolist() == [5]


def test_submitted_training_makes_a_head(tmp_path: Path, prompts: Path, head: dict[str, str]) -> None:
    output = tmp_path / "head"
    words = ["--model", "smollm2-135m", "--prompts", str(prompts), "--output", str(output), "--max-new-tokens", "12"]
    words += ["--draft-vocab", "64", "--rank", "0", "--epochs", "1", "--batch-size", "2", "--unroll", "2"]
    done = submit(head, "jobs.train_draft", words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"state": "done", "steps": 4, "sequences": 7' in done.stdout
    assert is_head(str(output))


@pytest.mark.chaos
def test_sigkill_in_the_middle_and_the_same_command_again_give_every_row_once(
    tmp_path: Path, prompts: Path, cluster: str
) -> None:
    command = [sys.executable, "-m", "jobs.cli", "generate"]
    undisturbed, output = tmp_path / "undisturbed", tmp_path / "out"
    words = ["--quiet", "--ray-address", cluster]
    subprocess.run(
        [*command, *options(prompts, undisturbed, *words, "--slots", "1", "--method", "plain")],
        cwd=ROOT,
        check=True,
        timeout=250,
    )
    killed = [*command, *options(prompts, output, *words, "--slots", "4", "--method", "context")]
    process = subprocess.Popen(killed, cwd=ROOT)
    deadline = time.monotonic() + 250
    while not list((output / "_commits").glob("*.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    subprocess.run(killed, cwd=ROOT, check=True, timeout=250)
    assert table_of(output).select(EXACT).equals(table_of(undisturbed).select(EXACT))
    assert table_of(output)["row_index"].to_pylist() == list(range(9))
