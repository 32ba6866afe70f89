"""What is left of a job after any commits: exactly the other shards, each with its own rows."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import shards
from jobs.config import GenerateConfig
from jobs.inputs import Inputs, open_inputs
from jobs.plan import Plan, make_plan
from pipeline.errors import JobError
from tests.fakes import FakeBackend

NUM_ROWS, ROWS_A_SHARD = 50, 3
NUM_SHARDS = 17


def planned(directory: Path) -> tuple[Inputs, Plan]:
    for name, rows in (("a.jsonl", range(20)), ("b.jsonl", range(20, NUM_ROWS))):
        lines = [json.dumps({"prompt": f"prompt {i}", "text": i}) + "\n" for i in rows]
        (directory / name).write_text("".join(lines))
    prompts = (str(directory / "a.jsonl"), str(directory / "b.jsonl"))
    config = GenerateConfig(model="m", prompts=prompts, output="o", rows_per_shard=ROWS_A_SHARD)
    inputs = open_inputs(prompts)
    return inputs, make_plan(config, inputs, FakeBackend().facts(config), None)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Inputs, Plan]:
    return planned(tmp_path_factory.mktemp("inputs"))


@given(committed=st.sets(st.integers(0, NUM_SHARDS - 1)), longest=st.integers(0, NUM_ROWS))
def test_the_shards_left_are_those_not_committed_with_their_rows(
    job: tuple[Inputs, Plan], committed: set[int], longest: int
) -> None:
    """Whether a gap is read or skipped."""
    inputs, plan = job
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "LONGEST_READ_GAP", longest)
        left = list(shards.open_shards(inputs, plan, committed))
    assert [shard for shard, _ in left] == [shard for shard in range(NUM_SHARDS) if shard not in committed]
    for shard, rows in left:
        wanted = range(shard * ROWS_A_SHARD, min((shard + 1) * ROWS_A_SHARD, NUM_ROWS))
        assert [row.row_index for row in rows] == list(wanted)
        assert [row.prompt for row in rows] == [f"prompt {i}" for i in wanted]
        assert [row.extra for row in rows] == [{"input_text": i} for i in wanted]


def test_a_long_gap_is_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job with its first and last shard left once read and checked all rows between them while replicas waited."""
    inputs, plan = planned(tmp_path)
    monkeypatch.setattr(shards, "LONGEST_READ_GAP", 10)
    read: list[int] = []
    rows = inputs.rows

    def noting(start: int = 0):  # type: ignore[no-untyped-def]
        for row in rows(start):
            read.append(row.row_index)
            yield row

    monkeypatch.setattr(inputs, "rows", noting)
    assert len(list(shards.open_shards(inputs, plan, set(range(1, NUM_SHARDS - 1))))) == 2
    assert read == [0, 1, 2, 48, 49]


def test_inputs_that_shrank_are_an_error(tmp_path: Path) -> None:
    inputs, plan = planned(tmp_path)
    bigger = Plan(**{**{name: getattr(plan, name) for name in Plan.__slots__}, "num_rows": NUM_ROWS + 9})
    with pytest.raises(JobError, match="the inputs end at row 49"):
        list(shards.open_shards(inputs, bigger, set(range(NUM_SHARDS - 2))))
