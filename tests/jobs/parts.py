"""Part files as a replica writes them, for tests of what a driver does with them."""

import pyarrow as pa

from actors.parts import PartWriter, finish_shard
from actors.records import generated_record, output_schema
from actors.rows import InputRow, ShardResult, ShardTask
from jobs.commit import CommitLog
from tests.fakes import fake_generation

SCHEMA = output_schema(["prompt"], pa.schema([("text", pa.string())]), logprobs=False)


def write_part(log: CommitLog, shard: int, attempt: int = 0, rows: int = 3) -> ShardResult:
    """What a replica does with a shard."""
    path = str(log.part_path(shard, attempt))
    task = ShardTask(shard, attempt, (), path, SCHEMA.serialize().to_pybytes())
    writer = PartWriter(task.part_path, task.schema)
    for index in reversed(range(shard * rows, (shard + 1) * rows)):
        row = InputRow(index, str(index), prompt=f"prompt {index}", extra={"input_text": "kept"})
        writer.add(generated_record(row, 0, (1 << 64) - 1, fake_generation(row.prompt or "", 0)))
    return finish_shard(task, writer, 0.1)
