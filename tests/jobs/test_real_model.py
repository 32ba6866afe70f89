"""The whole product with the embedded model: traced, played again, and SIGKILL in the middle costs no row."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.cli import main as rasd
from tests.jobs.tables import table_of

ROOT = Path(__file__).parents[2]
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
