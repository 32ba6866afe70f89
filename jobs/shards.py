"""From input rows to the shards still to be generated, in order, one shard in memory at a time."""

from collections.abc import Container, Iterator
from dataclasses import replace
from itertools import islice

from actors.rows import InputRow
from jobs.inputs import Inputs, coerce_extra
from jobs.plan import Plan
from pipeline.errors import JobError


def open_shards(inputs: Inputs, plan: Plan, committed: Container[int]) -> Iterator[tuple[int, tuple[InputRow, ...]]]:
    """Each shard that is not committed with its rows, ready for a replica.

    Raises:
        JobError: the inputs hold fewer rows than when the job was planned.
    """
    first = next((shard for shard in range(plan.num_shards) if shard not in committed), plan.num_shards)
    rows = inputs.rows(first * plan.rows_per_shard)
    for shard in range(first, plan.num_shards):
        wanted = len(plan.shard_rows(shard))
        batch = tuple(islice(rows, wanted))
        if len(batch) < wanted:
            raise JobError(f"the inputs end at row {batch[-1].row_index if batch else 0}; they changed under the job.")
        if shard not in committed:
            yield shard, tuple(_prepare(row, plan) for row in batch)


def _prepare(row: InputRow, plan: Plan) -> InputRow:
    row = coerce_extra(row, plan.extra, plan.prompt_columns)
    return replace(row, extra={plan.renamed[name]: value for name, value in row.extra.items()})
