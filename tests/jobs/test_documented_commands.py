"""Jobs of the README and of docs/cluster.md, whose commands are taken from there and run on a head started so.

Only what would meet another Ray or other files of this machine is changed: ports, the home directory, and /data.
Options behind the command's own make the jobs smaller.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from datastore import Datastore
from jobs.commit import read_commits
from pipeline.head_files import is_head
from pipeline.models import resolve_model

pytestmark = pytest.mark.timeout(600)  # a machine may be half as fast as another
ROOT = Path(__file__).parents[2]
MODEL = "smollm2-135m"
QUESTIONS = ["Write about tea. It is", "Write about snow. It is", "Write about chess. It is"]


def commands_after(document: Path, words: str) -> list[str]:
    """The lines of the first indented block after these words, continued ones joined."""
    text = document.read_text("utf-8").partition(words)[2]
    block = re.search(r"(?:^    .*\n)+", text, re.MULTILINE)
    assert block is not None
    return [line.strip() for line in block[0].replace("\\\n", " ").splitlines()]


def free_ports(count: int) -> list[int]:
    listeners = [socket.socket() for _ in range(count)]
    for listener in listeners:
        listener.bind(("127.0.0.1", 0))
    ports = [int(listener.getsockname()[1]) for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


@dataclass(frozen=True, slots=True)
class User:
    """Somebody who types commands: their environment, and what /data is."""

    environment: dict[str, str]
    data: Path

    def run(self, lines: list[str]) -> "subprocess.CompletedProcess[str]":
        script = "\n".join(["set -eu", *(line.replace("/data/", f"{self.data}/") for line in lines)])
        return subprocess.run(
            ["bash", "-c", script],
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=560,
            check=False,
        )

    def submit(self, lines: list[str], module: str, *smaller: str) -> str:
        """Run the block's command for a job, again while the head's agent is not up yet; what it printed."""
        exports = [line for line in lines if line.startswith("export ")]
        (command,) = [line for line in lines if f"python -m jobs.{module} " in line]
        deadline = time.monotonic() + 90
        while True:
            done = self.run([*exports, " ".join([command, *smaller])])
            if "submitted successfully" in done.stdout or time.monotonic() > deadline:
                assert done.returncode == 0, done.stdout + done.stderr
                return done.stdout
            time.sleep(2)


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[User]:
    """Has started a head as the README says."""
    home, data = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("data")
    temporary = tempfile.mkdtemp(prefix="rasd-")  # short, for sockets
    port, dashboard, agent, client = free_ports(4)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "HOME": str(home),
        "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache"),
        "XDG_CONFIG_HOME": os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config"),  # pip's
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}",
        "RAY_TMPDIR": temporary,
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
    }
    user = User(environment, data)
    before = [line for line in commands_after(ROOT / "README.md", "through Ray's job server:") if "submit" not in line]
    ports = f" --port={port} --dashboard-port={dashboard} --dashboard-agent-listen-port={agent}"
    ports += f" --ray-client-server-port={client} --disable-usage-stats"
    try:
        assert before[-1].startswith("ray start --head")
        started = user.run([*before[:-1], before[-1] + ports])
        assert started.returncode == 0, started.stdout + started.stderr
        yield user
    finally:
        end_processes_of(temporary)
        shutil.rmtree(temporary, ignore_errors=True)


def end_processes_of(temporary: str) -> None:
    """Not `ray stop`, which would end every Ray on this machine."""
    for process in psutil.process_iter(["cmdline"]):
        if any(temporary in word for word in process.info["cmdline"] or ()):
            process.kill()


def write_prompts(path: Path) -> None:
    path.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in QUESTIONS))


def check_rows(output: Path) -> None:
    rows = [
        row for commit, _ in read_commits(output) if commit for row in pq.read_table(output / commit.file).to_pylist()
    ]
    assert [row["row_index"] for row in rows] == [0, 1, 2]
    assert all(row["status"] == "ok" and row["text"] for row in rows)


@pytest.mark.slow
def test_the_readmes_job_generates(user: User) -> None:
    lines = commands_after(ROOT / "README.md", "through Ray's job server:")
    write_prompts(user.data / "prompts.jsonl")
    assert '"state": "done"' in user.submit(lines, "generate", "--num-replicas 2", "--max-new-tokens 16")
    check_rows(user.data / "out")


@pytest.mark.slow
def test_the_cluster_guides_jobs_build_a_datastore_and_train_a_head(user: User) -> None:
    lines = commands_after(ROOT / "docs" / "cluster.md", "## The three jobs")
    data = user.data / "guide"
    user = User(user.environment, data)
    (data / "corpus").mkdir(parents=True)
    text = "The quick brown fox jumps over the lazy dog, and the lazy dog sleeps on."
    (data / "corpus" / "a.jsonl").write_text(json.dumps({"text": text}) + "\n")
    (data / "model").symlink_to(resolve_model(MODEL).path)
    write_prompts(data / "sample.jsonl")
    assert '"state": "done"' in user.submit(lines, "build_datastore")
    store = Datastore.open(data / "store")
    assert store.lookup([store.segments[0].segment.document(0)[:5]]).match_lengths.tolist() == [5]
    store.close()
    smaller = "--max-new-tokens 12 --draft-vocab 64 --rank 0 --epochs 1 --batch-size 2 --unroll 2 --held-out 1"
    assert '"state": "done", "steps": 1, "sequences": 2' in user.submit(lines, "train_draft", smaller)
    assert is_head(str(data / "head"))


@pytest.mark.slow
def test_the_readmes_job_measures_methods(user: User) -> None:
    exports = commands_after(ROOT / "README.md", "through Ray's job server:")
    lines = commands_after(ROOT / "README.md", "## Measuring methods")
    data = user.data / "measuring"
    data.mkdir()
    write_prompts(data / "questions.jsonl")
    submitted = [line for line in lines if line.startswith("ray job submit")]
    smaller = ("--replicas 2", "--methods plain,rasd", "--max-new-tokens 8")
    assert '"state": "done"' in User(user.environment, data).submit([*exports, *submitted], "throughput", *smaller)
    found = json.loads((data / "speed" / "results.json").read_text())
    assert (found["state"], found["replicas"], found["questions"]) == ("done", 2, 1), "--quick asks one of each task"
    assert {"plain", "rasd"} <= found["slots"]["1"].keys()
    assert (data / "speed" / "report.html").stat().st_size > 10_000
