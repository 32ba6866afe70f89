"""What a throughput run has measured: a journal that grows with every sample, and the table made of it.

    OUTPUT/measured.jsonl    a line a sample, all methods' rows, on disk before the next sample begins
    OUTPUT/results.parquet   the same rows: one a request, method, number of slots and repeat

A run that was killed loses the sample it was at. A torn last line does not count.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from actors.contest import Answer, Question
from jobs.contest import Measured
from jobs.files import writing
from pipeline.durable import fsync

JOURNAL = "measured.jsonl"
RESULTS = "results.parquet"

Row = dict[str, Any]

_BY_DEPTH = pa.map_(pa.string(), pa.list_(pa.int32()))
_TRAIL = pa.list_(
    pa.struct(
        [
            ("token_id", pa.int32()),
            ("text", pa.string()),
            ("source", pa.string()),
            ("others", pa.list_(pa.string())),
            ("score", pa.float32()),
            ("value", pa.float32()),
            ("depth", pa.int32()),
            ("round", pa.int32()),
        ]
    )
)
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("method", "task", "sample_task", "id")),
        *((name, pa.int32()) for name in ("slots", "replicas", "repeat", "sample", "row", "turn")),
        ("seconds", pa.float64()),
        ("run_rounds", pa.int32()),
        ("phases", pa.map_(pa.string(), pa.float64())),
        *((name, pa.int32()) for name in ("num_prompt_tokens", "num_output_tokens", "rounds", "drafted", "accepted")),
        ("accepted_by_source", pa.map_(pa.string(), pa.int32())),
        ("rounds_without_draft", pa.int32()),
        ("offered", _BY_DEPTH),
        ("right", _BY_DEPTH),
        ("predicted", pa.list_(pa.float64())),
        ("predicted_right", pa.list_(pa.float64())),
        ("predicted_sum", pa.list_(pa.float64())),
        ("finish_reason", pa.string()),
        ("text", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("said", pa.string()),
        ("trail", _TRAIL),
    ]
)


class Journal:
    """The measurements of one output directory, those of earlier runs included.

    Attributes:
        rows: all of them, in the order in which they were measured.
        done: slots, repeat and sample of every line.
    """

    def __init__(self, output: Path) -> None:
        self._path = output / JOURNAL
        self._results = output / RESULTS
        self.rows: list[Row] = []
        self.done: set[tuple[int, int, int]] = set()
        good = 0
        for line in self._path.read_bytes().splitlines(keepends=True) if self._path.exists() else ():
            try:
                entry = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError):
                break  # torn by a crash: what follows is none of ours
            if not line.endswith(b"\n"):
                break
            good += len(line)
            self._take(entry)
        if self._path.exists():
            with writing(self._path), self._path.open("r+b") as file:
                file.truncate(good)

    def add(self, measured: Sequence[Measured], replicas: int, texts: Mapping[int, str]) -> None:
        """A sample by all methods, written and synced.

        Args:
            texts: of the tokens in trails, by id.

        Raises:
            JobError: it cannot be written.
        """
        first = measured[0]
        rows = [row for each in measured for row in rows_of(each, replicas, texts)]
        entry = {"slots": first.slots, "repeat": first.repeat, "sample": first.sample.number, "rows": rows}
        with writing(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._take(entry)

    def write_table(self) -> None:
        """Replaces results.parquet by all rows; raises JobError if it cannot be written."""
        temporary = self._results.with_name(f"{RESULTS}.{os.getpid()}.tmp")
        with writing(self._results):
            pq.write_table(pa.Table.from_pylist([_columns(row) for row in self.rows], SCHEMA), temporary)
            fsync(temporary)
            temporary.replace(self._results)

    def _take(self, entry: Mapping[str, Any]) -> None:
        self.done.add((entry["slots"], entry["repeat"], entry["sample"]))
        self.rows += entry["rows"]


def rows_of(measured: Measured, replicas: int, texts: Mapping[int, str]) -> list[Row]:
    """One row an answer."""
    timed, sample = measured.timed, measured.sample
    shared = {
        "method": measured.method,
        "slots": measured.slots,
        "replicas": replicas,
        "repeat": measured.repeat,
        "sample": sample.number,
        "sample_task": sample.task,
        "seconds": timed.seconds,
        "run_rounds": timed.rounds,
        "phases": dict(timed.phases),
    }
    return [{**shared, **_answer(measured, answer, texts)} for answer in timed.answers]


def _answer(measured: Measured, answer: Answer, texts: Mapping[int, str]) -> Row:
    question, generation, counts = measured.sample.questions[answer.question], answer.generation, answer.counts
    predicted = counts.predicted.tolist()
    return {
        "task": question.task,
        "id": question.id,
        "row": question.row,
        "turn": answer.turn,
        "num_prompt_tokens": generation.num_prompt_tokens,
        "num_output_tokens": len(generation.token_ids),
        "rounds": generation.rounds,
        "drafted": generation.drafted,
        "accepted": generation.accepted,
        "accepted_by_source": generation.accepted_by_source,
        "rounds_without_draft": generation.rounds_without_draft,
        **counts.by_depth(),
        "predicted": predicted[0],
        "predicted_right": predicted[1],
        "predicted_sum": predicted[2],
        "finish_reason": generation.finish_reason,
        "text": generation.text,
        "token_ids": list(generation.token_ids),
        "said": _said(question, answer.turn) if answer.trail else None,
        "trail": [token.record(texts.get(token.token_id, "")) for token in answer.trail] or None,
    }


def _said(question: Question, turn: int) -> str:
    return question.turns[turn - 1] if turn else question.said_last


def trail_tokens(measured: Iterable[Measured]) -> set[int]:
    """Ids of all tokens in trails."""
    answers = (answer for each in measured for answer in each.timed.answers)
    return {token.token_id for answer in answers for token in answer.trail}


def _columns(row: Row) -> Row:
    """A row for Arrow, whose maps are lists of pairs."""
    maps = ("phases", "accepted_by_source", "offered", "right")
    return {**row, **{name: sorted(row[name].items()) for name in maps}}


def read_rows(path: Path) -> list[Row]:
    """The rows of a results.parquet."""
    rows: list[Row] = pq.read_table(path, schema=SCHEMA).to_pylist(maps_as_pydicts="strict")
    return rows
