"""The prompts of a job: any number of files and data sets as one sequence of numbered rows.

Reads and checks; knows nothing of shards, models or output. `row_index` is a row's ordinal over all inputs, sorted by
path, so it depends neither on the order of arguments nor on which rows are bad.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import pyarrow as pa

from actors.rows import InputRow
from jobs.extra import PROMPT_COLUMNS, ColumnTypes, coerce_extra
from jobs.readers import prompt_formats
from jobs.readers.base import FileSummary, Reader
from jobs.sources import find_readers
from jobs.validate import input_row
from pipeline.errors import ConfigError, InputError

__all__ = ["FileSummary", "InputSummary", "Inputs", "coerce_extra", "open_inputs"]

TYPED_ROWS = 10_000
_TYPED_ROWS_PER_FILE = 100


@dataclass(frozen=True, slots=True)
class InputSummary:
    """What the inputs are, for the job's plan."""

    num_rows: int
    files: tuple[FileSummary, ...]


class Inputs:
    """Rows of several readers, one after the other. Made by `open_inputs`."""

    def __init__(self, readers: Sequence[Reader], text_column: str) -> None:
        self._readers = readers
        self._text_column = text_column
        self._summary: InputSummary | None = None
        self._columns: dict[int, tuple[tuple[str, ...], pa.Schema]] = {}

    def summary(self) -> InputSummary:
        """Count and hash everything in one streaming pass; remembered.

        Raises:
            InputError: an input cannot be read, or there is no row at all.
        """
        if self._summary is None:
            files = tuple(reader.summary() for reader in self._readers)
            num_rows = sum(file.rows for file in files)
            if num_rows == 0:
                names = ", ".join(file.path for file in files[:5])
                raise InputError(f"there is not one row in {names}. Check that the inputs were written.")
            self._summary = InputSummary(num_rows, files)
        return self._summary

    def rows(self, start: int = 0) -> Iterator[InputRow]:
        """Rows from `row_index` `start` on, in order; at most a batch is in memory.

        Raises:
            InputError: an input cannot be read any more, or has changed since `summary`.
        """
        first = 0
        for reader, file in zip(self._readers, self.summary().files, strict=True):
            end = first + file.rows
            if start < end:
                row_index = max(start, first)
                for record in islice(reader.records(row_index - first), end - row_index):
                    yield input_row(record, row_index, self._text_column)
                    row_index += 1
                if row_index != end:
                    rows = row_index - first
                    raise InputError(f"{file.path} had {file.rows} rows, now {rows}. Put the file back as it was.")
            first = end

    def extra_schema(self, limit: int = TYPED_ROWS) -> pa.Schema:
        """Names and types of all columns but the prompt, `messages` and `id`; see `jobs.extra`.

        Args:
            limit: rows to infer from, where the format does not fix the types. They are the first rows of a file;
                several such files share them, so that each one's columns are known.
        """
        return self._infer_columns(limit)[1]

    def prompt_columns(self, limit: int = TYPED_ROWS) -> tuple[str, ...]:
        """Which of `prompt` and `messages` the inputs have, found as `extra_schema` finds the other columns."""
        return self._infer_columns(limit)[0]

    def _infer_columns(self, limit: int) -> tuple[tuple[str, ...], pa.Schema]:
        if limit not in self._columns:
            self._columns[limit] = self._read_columns(limit)
        return self._columns[limit]

    def _read_columns(self, limit: int) -> tuple[tuple[str, ...], pa.Schema]:
        columns, prompts = ColumnTypes(), set[str]()
        own = {self._text_column: "prompt", "messages": "messages", "id": "id"}
        untyped = []
        for reader in self._readers:
            schema = reader.schema()
            if schema is None:
                untyped.append(reader)
                continue
            prompts.update(own[name] for name in schema.names if name in own)
            columns.declare(field for field in schema if field.name not in own)
        for reader in untyped:
            for record in islice(reader.records(0), max(_TYPED_ROWS_PER_FILE, limit // len(untyped))):
                row = input_row(record, 0, self._text_column)
                prompts.update(name for name in PROMPT_COLUMNS if getattr(row, name) is not None)
                columns.observe(row.extra)
        return tuple(name for name in PROMPT_COLUMNS if name in prompts), columns.schema()


def open_inputs(spec: Sequence[str], *, text_column: str = "prompt") -> Inputs:
    """Find the inputs and check what can be checked without reading them whole.

    Args:
        spec: files, directories, patterns, data sets saved to disk, or names of data sets on the Hugging Face hub
            (NAME, NAME:SPLIT or NAME:CONFIG:SPLIT).
        text_column: column that holds the prompt.

    Raises:
        InputError: something named does not exist or is not what it seems.
        ConfigError: `text_column` names a column of another meaning.
    """
    if text_column in ("messages", "id"):
        raise ConfigError(f"text_column is {text_column!r}, which has a meaning of its own; rename that column.")
    readers = find_readers(spec, prompt_formats(text_column))
    for reader in readers:
        _check_columns(reader, text_column)
    return Inputs(readers, text_column)


def _check_columns(reader: Reader, text_column: str) -> None:
    schema = reader.schema()
    if schema is None:
        return
    names = schema.names
    if not {text_column, "messages"} & set(names):
        raise InputError(
            f"{reader.name} has no column {text_column!r} or 'messages', but {', '.join(names[:20])}. Name the prompt's"
            " column with --text-column."
        )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{reader.name} has two columns named {twice!r}. Rename one of them.")
