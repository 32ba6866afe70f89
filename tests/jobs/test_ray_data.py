"""Ray Data around the engine: datasets become inputs that do not change, and batches come back with their answers."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import ray.data

from jobs.batch_generator import BatchGenerator
from jobs.dataset_inputs import read_outputs, write_inputs
from jobs.generation import generate
from jobs.inputs import open_inputs
from pipeline.errors import ConfigError, InputError
from tests.fake_rasd import parse
from tests.fakes import FakeBackend

# Ray Data warns of its own settings and of pandas.
pytestmark = pytest.mark.filterwarnings("default")
ROOT = Path(__file__).parents[2]
OPTIONS = {"model": "smollm2-135m", "max_new_tokens": 12, "slots": 2, "budget": 6, "max_context": 256}
SUBJECTS = ["the sea", "bread", "a clock", "winter", "copper"]


@pytest.fixture
def on_ray(cluster: str) -> Iterator[None]:
    ray.init(address=cluster, log_to_driver=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


def numbered(count: int, blocks: int) -> "ray.data.Dataset":
    """Rows, of which the first block takes longest."""

    def later(row: dict[str, Any]) -> dict[str, Any]:
        if row["id"] == 0:
            time.sleep(1)
        return {"prompt": f"tell me {row['id']}", "n": row["id"] if row["id"] else None}

    return ray.data.range(count, override_num_blocks=blocks).map(later)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.usefixtures("on_ray")
def test_files_follow_from_rows_and_order_not_from_blocks(tmp_path: Path) -> None:
    for name, blocks in (("a", 1), ("b", 7)):
        assert write_inputs(numbered(50, blocks), tmp_path / name, rows_per_file=20) == 50
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert sorted(contents(tmp_path / "a")) == ["000000.parquet", "000001.parquet", "000002.parquet", "_dataset.json"]
    inputs = open_inputs([str(tmp_path / "a")], text_column="prompt")
    assert [row.prompt for row in inputs.rows()] == [f"tell me {i}" for i in range(50)]


@pytest.mark.usefixtures("on_ray")
def test_a_shuffled_dataset_has_an_order_by_a_column(tmp_path: Path) -> None:
    plain = numbered(30, 3)
    for name, dataset in (("a", plain), ("b", plain.random_shuffle(seed=3))):
        write_inputs(dataset, tmp_path / name, sort_by="prompt")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.usefixtures("on_ray")
def test_what_is_written_stays_what_is_half_written_does_not_and_what_is_foreign_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "in"
    partial = tmp_path / "in.partial"
    partial.mkdir()
    (partial / "000009.parquet").write_bytes(b"half")
    assert write_inputs(numbered(6, 2), target) == 6
    assert not partial.exists() and "000009.parquet" not in contents(target)
    before = contents(target)
    assert write_inputs(numbered(9, 2), target) == 6
    assert contents(target) == before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="is not empty"):
        write_inputs(numbered(6, 2), foreign)
    with pytest.raises(InputError, match="has no rows"):
        write_inputs(numbered(6, 2).filter(lambda row: False), tmp_path / "none")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign", "in"]


def test_a_datasets_job_gives_every_row_once_and_resumes_after_writing_again(tmp_path: Path, cluster: str) -> None:
    prompts, output = tmp_path / "in", tmp_path / "out"
    words = ["--model", "m", "--prompts", str(prompts), "--output", str(output), "--quiet", "--ray-address", cluster]
    for blocks in (2, 5):  # the second time as a program that is run again would
        ray.init(address=cluster, log_to_driver=False, logging_level="ERROR")
        write_inputs(numbered(40, blocks), prompts, rows_per_file=15)
        ray.shutdown()
        assert generate(parse(words), FakeBackend()) == 0
    assert len(json.loads((output / "plan.json").read_text())["attempts"]) == 2
    ray.init(address=cluster, log_to_driver=False, logging_level="ERROR")
    rows = read_outputs(output).take_all()
    ray.shutdown()
    assert [row["row_index"] for row in rows] == list(range(40))
    assert [row["n"] for row in rows][:3] == [None, 1, 2]
    with pytest.raises(InputError, match="holds no committed rows"):
        read_outputs(tmp_path / "in")


def test_outputs_on_an_object_store_are_read_as_those_of_a_directory(tmp_path: Path, uri: str, s3_cluster: str) -> None:
    """They were refused."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"tell me {i}", "n": i}) + "\n" for i in range(40)) + "{broken\n")
    found = []
    for output in (str(tmp_path / "out"), uri):
        words = ["--model", "m", "--prompts", str(prompts), "--output", output, "--quiet", "--ray-address", s3_cluster]
        assert generate(parse(words), FakeBackend()) == 0
        ray.init(address=s3_cluster, log_to_driver=False, logging_level="ERROR")
        try:
            found.append(read_outputs(output).take_all())
            with pytest.raises(InputError, match="holds no committed rows"):
                read_outputs(f"{output}/none")
        finally:
            ray.shutdown()
    assert [row["row_index"] for row in found[1]] == list(range(41))
    assert found[0] == found[1]


@pytest.mark.usefixtures("on_ray")
def test_map_batches_appends_what_a_job_would_have_said(tmp_path: Path, cluster: str) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"Write about {s}. It is", "text": s} for s in SUBJECTS]
    rows.insert(2, {"prompt": "", "text": "bad"})
    dataset = ray.data.from_items(rows, override_num_blocks=2).map_batches(
        BatchGenerator, fn_constructor_kwargs=OPTIONS, batch_format="pyarrow", batch_size=4, concurrency=1, num_cpus=1
    )
    found = sorted(dataset.take_all(), key=lambda row: str(row["prompt"]))
    assert sorted(row["input_text"] for row in found) == sorted(row["text"] for row in rows)
    failed = [row for row in found if row["status"] == "error"]
    assert [(row["input_text"], row["error_type"], row["text"]) for row in failed] == [("bad", "empty_prompt", None)]

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    words = ["--model", "smollm2-135m", "--prompts", str(prompts), "--output", str(tmp_path / "out"), "--quiet"]
    words += ["--max-new-tokens", "12", "--max-context", "256", "--method", "plain", "--ray-address", cluster]
    subprocess.run([sys.executable, "-m", "jobs.cli", "generate", *words], cwd=ROOT, check=True, timeout=200)
    table = pa.concat_tables(pq.read_table(path) for path in (tmp_path / "out").glob("part-*.parquet"))
    job = {row["prompt"]: (row["text"], row["token_ids"]) for row in table.to_pylist()}
    assert len(job) == len(rows)
    assert {row["prompt"] or None: (row["text"], listed(row["token_ids"])) for row in found} == job


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "smollm2-135m", "output": "x"}, "output is 'x'; a pipeline has no such option"),
        ({"model": "smollm2-135m", "slots": 0}, "--slots is 0; it must be"),
        ({}, "--model is missing"),
        ({"model": "smollm2-135m", "slotz": 4}, "unknown option 'slotz'"),
    ],
)
def test_wrong_options_are_one_clear_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BatchGenerator(**options)


def test_the_examples_run(tmp_path: Path, cluster: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": cluster}
    examples = ROOT / "examples" / "ray_data"
    words = ["--max-context", "256", "--num-replicas", "1", "--budget", "6", "--quiet"]
    job = [sys.executable, str(examples / "job.py"), "smollm2-135m", str(tmp_path), *words]
    done = subprocess.run(job, env=environment, check=True, timeout=200, stdout=subprocess.PIPE, text=True)
    assert done.stdout.splitlines()[-1].startswith("12 answers; the first: ")
    batches = [sys.executable, str(examples / "batches.py"), "smollm2-135m", str(tmp_path / "answers")]
    subprocess.run(batches, env=environment, check=True, timeout=200)
    table = pq.read_table(tmp_path / "answers")
    assert table.num_rows == 6 and set(table["status"].to_pylist()) == {"ok"}
    assert all(len(ids) == 16 or reason == "stop" for ids, reason in zip(*columns(table), strict=True))


def columns(table: pa.Table) -> tuple[list[Any], list[Any]]:
    return table["token_ids"].to_pylist(), table["finish_reason"].to_pylist()


def listed(values: Any) -> list[int] | None:
    return None if values is None else list(values)
