"""Output rows: the schema of part files, and how a result or a failure becomes a row of it.

The order of the columns is part of the product (design section 8). Values that do not exist are null.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from actors.rows import InputRow, RowFailure, ShardStats
from pipeline.request import Generation

Record = dict[str, Any]

PROMPT_FIELDS: Mapping[str, pa.DataType] = {
    "prompt": pa.string(),
    "messages": pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
}
_KEY_FIELDS = [("row_index", pa.int64()), ("id", pa.string()), ("sample", pa.int32())]
_RESULT_FIELDS = [
    ("text", pa.string()),
    ("token_ids", pa.list_(pa.int32())),
    ("finish_reason", pa.string()),
    ("num_prompt_tokens", pa.int32()),
    ("num_output_tokens", pa.int32()),
    ("rounds", pa.int32()),
    ("drafted", pa.int32()),
    ("accepted", pa.int32()),
    ("accepted_by_source", pa.map_(pa.string(), pa.int32())),
    ("rounds_without_draft", pa.int32()),
    ("seed", pa.int64()),
]
_LOGPROBS_FIELD = ("logprobs", pa.list_(pa.float32()))
_STATUS_FIELDS = [("status", pa.string()), ("error_type", pa.string()), ("error_message", pa.string())]

RESERVED = frozenset(
    [name for name, _ in [*_KEY_FIELDS, *_RESULT_FIELDS, _LOGPROBS_FIELD, *_STATUS_FIELDS]] + list(PROMPT_FIELDS)
)


def passthrough_names(columns: Iterable[str]) -> dict[str, str]:
    """Output name of each pass-through column: its own, or with `input_` before it as often as a clash needs."""
    columns = list(columns)
    names: dict[str, str] = {}
    taken = set(RESERVED) | {name for name in columns if name not in RESERVED}
    for column in columns:
        name = column
        if column in RESERVED:
            while name in taken:
                name = f"input_{name}"
            taken.add(name)
        names[column] = name
    return names


def output_schema(prompt_columns: Iterable[str], extra: pa.Schema, *, logprobs: bool) -> pa.Schema:
    """Schema of every part file of a job.

    Args:
        prompt_columns: which of `prompt` and `messages` the inputs have.
        extra: the inputs' other columns under their own names.
        logprobs: whether log-probabilities were asked for.
    """
    wanted = set(prompt_columns) or {"prompt"}
    prompts = [(name, kind) for name, kind in PROMPT_FIELDS.items() if name in wanted]
    own = [*_KEY_FIELDS, *prompts, *result_fields(logprobs=logprobs)]
    names = passthrough_names(extra.names)
    return pa.schema([pa.field(name, kind) for name, kind in own] + [f.with_name(names[f.name]) for f in extra])


def result_fields(*, logprobs: bool) -> list[tuple[str, pa.DataType]]:
    """Names and types of the columns that say what became of a row."""
    return [*_RESULT_FIELDS, *([_LOGPROBS_FIELD] if logprobs else []), *_STATUS_FIELDS]


def generated_schema(part: pa.Schema) -> pa.Schema:
    """The columns of a part file that only a generation can fill, and those that name a row."""
    status = {name for name, _ in _STATUS_FIELDS}
    names = {name for name, _ in result_fields(logprobs=True)} - status | {"row_index", "sample"}
    return pa.schema([field for field in part if field.name in names])


def generated_record(row: InputRow, sample: int, seed: int, generation: Generation) -> Record:
    """Row of a finished sample; `row.extra` already carries output names.

    Args:
        seed: the sample's unsigned 64-bit seed; stored as the int64 with the same bits.
    """
    return {
        **_shared_fields(row, sample, seed),
        "text": generation.text,
        "token_ids": generation.token_ids,
        "finish_reason": generation.finish_reason,
        "num_prompt_tokens": generation.num_prompt_tokens,
        "num_output_tokens": len(generation.token_ids),
        "rounds": generation.rounds,
        "drafted": generation.drafted,
        "accepted": generation.accepted,
        "accepted_by_source": sorted(generation.accepted_by_source.items()),
        "rounds_without_draft": generation.rounds_without_draft,
        "logprobs": generation.logprobs,
        "status": "ok",
    }


def failed_record(row: InputRow, sample: int, seed: int, failure: RowFailure) -> Record:
    """Row of a sample that could not be generated; see `generated_record`."""
    return {
        **_shared_fields(row, sample, seed),
        "status": "error",
        "error_type": failure.error_type,
        "error_message": failure.message,
    }


def restored_record(row: InputRow, sample: int, seed: int, generated: Record) -> Record:
    """Row of a sample that was finished before.

    Args:
        generated: its values of `generated_schema`; see `generated_record` for the others.
    """
    return {**_shared_fields(row, sample, seed), **generated, "status": "ok"}


def _shared_fields(row: InputRow, sample: int, seed: int) -> Record:
    return {
        **row.extra,
        "row_index": row.row_index,
        "id": row.id,
        "sample": sample,
        "prompt": row.prompt,
        "messages": row.messages,
        "seed": seed - (1 << 64) if seed >= 1 << 63 else seed,
    }


def stats_of(record: Record) -> ShardStats:
    """Counts of one output row."""
    if record["status"] != "ok":
        return ShardStats(rows=1, errors=1, error_types={record["error_type"]: 1})
    return ShardStats(
        rows=1,
        prompt_tokens=record["num_prompt_tokens"],
        output_tokens=record["num_output_tokens"],
        rounds=record["rounds"],
        drafted=record["drafted"],
        accepted=record["accepted"],
        rounds_without_draft=record["rounds_without_draft"],
        accepted_by_source=dict(record["accepted_by_source"]),
        samples_ok=1,
    )
