"""Formats of one row a line: JSON lines and plain text.

Lines of nothing but white space are no rows: tools for JSON lines agree on that, and the last line often is one.
"""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from jobs.readers.base import BadValue, FileSummary, Record, excerpt, failed
from jobs.readers.stream import MAX_LINE_BYTES, byte_lines, open_bytes, reading, summarise


class LinesReader:
    """What the line formats share: counting and skipping look at line ends alone."""

    def __init__(self, path: Path, name: str) -> None:
        self._path = path
        self.name = name

    def summary(self) -> FileSummary:
        """See `Reader.summary`."""
        return summarise(self._path, self.name, _count_lines)

    def records(self, start: int) -> Iterator[Record]:
        """See `Reader.records`."""
        with reading(self._path), open_bytes(self._path) as stream:
            for number, line in islice(byte_lines(stream), start, None):
                yield self._checked(f"{self.name} line {number}", line.rstrip(b"\r\n"))

    def _checked(self, where: str, line: bytes) -> Record:
        if len(line) > MAX_LINE_BYTES:
            limit = MAX_LINE_BYTES >> 20
            return failed(where, "line_too_long", f"longer than {limit} MiB; shorten it. It begins {excerpt(line)}")
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            problem = f"byte {error.start} of the line is not UTF-8; save it as UTF-8. It begins {excerpt(line)}"
            return failed(where, "invalid_unicode", problem)
        return self._record(where, text, line)

    def _record(self, where: str, text: str, line: bytes) -> Record:
        raise NotImplementedError


class TextReader(LinesReader):
    """Plain text, a prompt a line; the line end is not part of it."""

    def __init__(self, path: Path, name: str, text_column: str) -> None:
        super().__init__(path, name)
        self._column = text_column

    def schema(self) -> pa.Schema:
        """See `Reader.schema`."""
        return pa.schema([(self._column, pa.string())])

    def _record(self, where: str, text: str, line: bytes) -> Record:
        return Record(where, {self._column: text})


class JsonLinesReader(LinesReader):
    """JSON lines: an object a line."""

    def schema(self) -> None:
        """See `Reader.schema`; types are inferred."""

    def _record(self, where: str, text: str, line: bytes) -> Record:
        try:
            value = json.loads(text, object_pairs_hook=unique_object)
        except json.JSONDecodeError as error:
            problem = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        except (ValueError, RecursionError) as error:
            problem = beyond_limits(error)
        else:
            return object_record(where, value, excerpt(line))
        return failed(
            where, "malformed_json", f"not valid JSON: {problem}; correct the line. It begins {excerpt(line)}"
        )


def beyond_limits(error: ValueError | RecursionError) -> str:
    """Why Python's parser gave up on what may be well-formed JSON."""
    return "nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"


def unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | BadValue:
    """The object of `pairs`; JSON leaves open which of two equal keys counts, so that is no object but a bad value."""
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    keys = [key for key, _ in pairs]
    twice = next(key for key in keys if keys.count(key) > 1)
    return BadValue("malformed_json", f"the key {excerpt(twice)} is there twice; keep one")


def object_record(where: str, value: object, shown: str) -> Record:
    """Record of one parsed JSON value; `shown` is what a message quotes of it."""
    match value:
        case dict():
            return Record(where, value)
        case BadValue(error_type, problem):
            return failed(where, error_type, f"{problem}. It begins {shown}")
    kind = {"NoneType": "null", "str": "a string", "list": "a list", "bool": "a boolean"}.get(
        type(value).__name__, "a number"
    )
    return failed(where, "not_an_object", f'{kind}, not an object such as {{"prompt": "..."}}. It begins {shown}')


def _count_lines(stream: BinaryIO) -> int:
    return sum(1 for _ in byte_lines(stream))
