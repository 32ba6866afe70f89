"""A bad row in each of 20 shards, each bad in its own way: they become error rows, and no other row notices."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.cli import main
from jobs.commit import read_commits
from tests.jobs.bad_lines import BAD_LINES
from tests.jobs.deadly_replica import DEADLY, DeadlyReplica
from tests.jobs.stores import VOCABULARY, add_weights, tiny_model

ROWS_A_SHARD = 4
MAX_CONTEXT = 96
KINDS = (
    *("broken", "word", "control", "deep", "digits", "duplicate", "list", "null", "bytes", "surrogate"),
    *("nothing", "null prompt", "number prompt", "both", "empty", "no messages", "parts"),
)
# Found only in a replica, which takes the last one for good.
FOR_REPLICAS = {
    "too long": ("a lazy fox " * MAX_CONTEXT, "prompt_too_long"),
    "10 MB": ("line after line " * 625_000, "prompt_too_long"),
    "deadly": (DEADLY, "killed_replica"),
}
# What a row must have in common with the same row of a job without bad ones: all but statistics.
EXACT = ["row_index", "id", "prompt", "text", "token_ids", "finish_reason", "num_output_tokens", "seed", "status"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers."""
    path = tiny_model(tmp_path_factory.mktemp("model"))
    add_weights(path, VOCABULARY, num_layers=2, max_context=512)
    return path


def bad_lines() -> list[tuple[bytes, str]]:
    """A line for each shard, and the error type it must get."""
    lines = [(line, error_type) for line, error_type, _ in (BAD_LINES[kind] for kind in KINDS)]
    return lines + [(json.dumps({"prompt": prompt}).encode(), kind) for prompt, kind in FOR_REPLICAS.values()]


def run(model: Path, directory: Path, lines: list[bytes], cluster: str) -> tuple[int, pa.Table]:
    directory.mkdir()
    prompts, output = directory / "prompts.jsonl", directory / "out"
    prompts.write_bytes(b"\n".join(lines) + b"\n")
    options = "--quiet --dtype float32 --method plain --slots 4 --max-new-tokens 8 --temperature 0.8 --num-replicas 1"
    code = main(
        [
            *("generate", "--model", str(model), "--prompts", str(prompts), "--output", str(output)),
            *("--rows-per-shard", str(ROWS_A_SHARD), "--max-context", str(MAX_CONTEXT), "--ray-address", cluster),
            *options.split(),
        ]
    )
    assert main(["verify", str(output)]) == 0
    return code, pq.read_table([output / commit.file for commit, _ in read_commits(output) if commit])


@pytest.mark.chaos
@pytest.mark.timeout(600)  # a dozen replicas are started, one after the other
def test_one_bad_row_in_every_shard_disturbs_no_other(
    tmp_path: Path, model: Path, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.replica.Replica", DeadlyReplica)
    bad = bad_lines()
    lines = [json.dumps({"prompt": f"the quick dog {i}"}).encode() for i in range(ROWS_A_SHARD * len(bad))]
    assert len(bad) == 20
    code, clean = run(model, tmp_path / "clean", lines, cluster)
    assert code == 0 and set(clean["status"].to_pylist()) == {"ok"}
    # At another place in each shard.
    expected = {ROWS_A_SHARD * shard + shard % ROWS_A_SHARD: error_type for shard, (_, error_type) in enumerate(bad)}
    for row, (line, _) in zip(expected, bad, strict=True):
        lines[row] = line

    code, table = run(model, tmp_path / "bad", lines, cluster)
    assert code == 0
    failed = {row["row_index"]: row for row in table.to_pylist() if row["status"] == "error"}
    assert {index: row["error_type"] for index, row in failed.items()} == expected
    assert all(row["error_message"] and row["text"] is None for row in failed.values())
    assert len(max((row["prompt"] or "" for row in failed.values()), key=len)) == 10_000_000
    others = pa.array([row not in expected for row in range(len(lines))])
    assert table.filter(others).select(EXACT).equals(clean.filter(others).select(EXACT))
    assert len(set(table.filter(others)["text"].to_pylist())) > 40
