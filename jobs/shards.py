"""From input rows to the shards still to be generated, in order, one shard in memory at a time."""

from collections.abc import Container, Iterator
from dataclasses import replace
from itertools import islice

from actors.rows import InputRow
from jobs.inputs import Inputs, coerce_extra
from jobs.plan import Plan
from pipeline.errors import JobError

# Of committed rows. More are skipped in the input's format, which parses none of most, but begins at the file's start.
LONGEST_READ_GAP = 50_000


def open_shards(inputs: Inputs, plan: Plan, committed: Container[int]) -> Iterator[tuple[int, tuple[InputRow, ...]]]:
    """Each shard that is not committed with its rows, ready for a replica.

    Raises:
        JobError: the inputs hold fewer rows than when the job was planned.
    """
    rows, at = inputs.rows(0), 0
    for shard in (shard for shard in range(plan.num_shards) if shard not in committed):
        wanted = plan.shard_rows(shard)
        if wanted.start - at > LONGEST_READ_GAP:
            rows, at = inputs.rows(wanted.start), wanted.start
        batch = tuple(islice(rows, wanted.start - at, wanted.stop - at))
        if len(batch) < len(wanted):
            raise JobError(f"the inputs end at row {batch[-1].row_index if batch else at}; they changed under the job.")
        at = wanted.stop
        yield shard, tuple(_prepare(row, plan) for row in batch)


def _prepare(row: InputRow, plan: Plan) -> InputRow:
    row = coerce_extra(row, plan.extra, plan.prompt_columns)
    return replace(row, extra={plan.renamed[name]: value for name, value in row.extra.items()})
