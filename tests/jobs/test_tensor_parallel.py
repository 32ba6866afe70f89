"""`rasd generate --tensor-parallel`: processes that share the embedded model give its text and end together."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from jobs.cli import main as rasd
from jobs.cluster import place
from jobs.config import GenerateConfig
from pipeline.errors import ConfigError
from pipeline.ranks import sharing_device
from tests.jobs.chaos.nodes import actors_below
from tests.jobs.tables import table_of

ROOT = Path(__file__).parents[2]
SUBJECTS = ["the sea", "bread", "a clock", "winter", "copper", "a long road", "chess", "rain"]
EXACT = ["row_index", "text", "token_ids", "finish_reason", "status"]


def words(prompts: Path, output: Path, *more: str) -> list[str]:
    common = ["--model", "smollm2-135m", "--prompts", str(prompts), "--output", str(output), "--quiet"]
    return [*common, "--max-context", "256", "--rows-per-shard", "2", "--slots", "4", "--num-threads", "1", *more]


def followers() -> list[psutil.Process]:
    """Of this test's own cluster, whose processes are below this one."""
    return list(actors_below(psutil.Process(), "Follower"))


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


@pytest.mark.chaos
@pytest.mark.slow
@pytest.mark.skipif(sharing_device() != "cpu", reason="shares models on GPUs alone")
def test_three_processes_write_what_one_does_even_if_one_is_killed(
    tmp_path: Path, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "\n".join(json.dumps({"prompt": f"Here is a note about {each}. It"}) for each in SUBJECTS) + "\n"
    )
    assert (
        rasd(["generate", *words(prompts, tmp_path / "one", "--ray-address", cluster, "--max-new-tokens", "40")]) == 0
    )
    output = tmp_path / "three"
    command = [sys.executable, "-m", "jobs.cli", "generate"]
    command += words(prompts, output, "--ray-address", cluster, "--max-new-tokens", "40", "--tensor-parallel", "3")
    job = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: list(output.glob("_commits/*.json")) or job.poll() is not None, "nothing is committed")
    assert job.poll() is None, job.communicate()
    found = followers()
    assert len(found) == 2
    os.kill(found[0].pid, signal.SIGKILL)
    out, err = job.communicate(timeout=250)
    assert job.returncode == 0, err
    assert "replica 0 is lost" in err
    record = json.loads(out.splitlines()[-1])
    assert (record["ok"], record["errors"], record["method"]) == (len(SUBJECTS), 0, "rasd")
    assert table_of(output).select(EXACT).equals(table_of(tmp_path / "one").select(EXACT))
    wait_for(lambda: not followers(), "followers outlive the job")


def test_what_processes_cannot_have_is_refused() -> None:
    config = GenerateConfig(model="m", prompts=("p",), output="o", tensor_parallel=2, gpus_per_replica=1.0)
    with pytest.raises(ConfigError, match=r"--gpus-per-replica is 1 and --tensor-parallel 2"):
        place(config, [{"CPU": 8.0, "GPU": 4.0}])
    config = GenerateConfig(model="m", prompts=("p",), output="o", tensor_parallel=8)
    with pytest.raises(ConfigError, match=r"--tensor-parallel is 8.*largest node has 4"):
        place(config, [{"CPU": 8.0, "GPU": 4.0}])
