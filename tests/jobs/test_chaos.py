"""The short form of `python -m benchmarks.chaos`: a few kills of each kind, and every row is there, once, the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_a_short_campaign_loses_doubles_and_changes_no_row(tmp_path: Path) -> None:
    results = tmp_path / "chaos.json"
    command = [sys.executable, "-m", "benchmarks.chaos", "--kills", "6", "--shards", "8", "--output", str(results)]
    # A Ray of its own: not in the temporary directory of this session's.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(command, cwd=ROOT, env=environment, timeout=580, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(results.read_text())
    assert found["num_kills"] >= 6 and found["rows"] == found["jobs"] * 8 * 4 * 2 > 0
    assert {"driver", "driver step", "replica", "replica step", "retrieval", "raylet"} <= found["struck"].keys()
    assert found["struck"]["disk full"] and found["struck"]["duplicate"] and found["runs"] > found["jobs"]
    assert (found["differences"], found["processes_left"], found["problems"]) == (0, 0, [])
