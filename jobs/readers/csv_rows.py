"""CSV and TSV with a header. Every value is a string: `007` stays `007`.

Records are cut by hand-feeding the csv module line by line, so that after an error, such as a quote that is never
closed, exactly the guilty line is lost and reading goes on with the next.
"""

import csv
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from jobs.readers.base import FileSummary, Record, excerpt, failed
from jobs.readers.stream import MAX_LINE_BYTES, byte_lines, open_bytes, reading, summarise
from pipeline.errors import InputError


class CsvReader:
    """A table of strings; blank lines are no rows.

    Args:
        delimiter: what stands between two fields.
    """

    def __init__(self, path: Path, name: str, delimiter: str) -> None:
        self._path = path
        self.name = name
        self._delimiter = delimiter
        with reading(path), open_bytes(path) as stream:
            self._header = self._read_header(stream)

    def schema(self) -> pa.Schema:
        """See `Reader.schema`."""
        return pa.schema([(column, pa.string()) for column in self._header])

    def summary(self) -> FileSummary:
        """See `Reader.summary`."""
        return summarise(self._path, self.name, lambda stream: sum(1 for _ in self._parse(stream)))

    def records(self, start: int) -> Iterator[Record]:
        """See `Reader.records`; skipping parses, as a quoted field may hold line ends."""
        with reading(self._path), open_bytes(self._path) as stream:
            yield from islice(self._parse(stream), start, None)

    def _read_header(self, stream: BinaryIO) -> list[str]:
        _, header = next(_RecordCutter(stream, self._delimiter), ("", None))
        if header is None:
            raise InputError(f"{self._path} is empty. It needs a header line that names the columns.")
        if isinstance(header, csv.Error):
            raise InputError(f"the header of {self._path} is malformed: {header}. Correct its first line.")
        try:
            "".join(header).encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"the header of {self._path} is not UTF-8: {excerpt(header)}. Save it as UTF-8."
            ) from error
        return [column or f"unnamed_{i}" for i, column in enumerate(header)]

    def _parse(self, stream: BinaryIO) -> Iterator[Record]:
        cutter = _RecordCutter(stream, self._delimiter)
        next(cutter, None)  # the header
        for found, values in cutter:
            where = f"{self.name} {found}"
            if isinstance(values, csv.Error):
                problem = f"not valid CSV: {values}; correct the line"
            elif len(values) != len(self._header):
                problem = (
                    f"{len(values)} fields where the header has {len(self._header)}; quote those that hold a comma"
                )
            else:
                yield Record(where, dict(zip(self._header, values, strict=True)))
                continue
            yield failed(where, "malformed_csv", f"{problem}. It begins {excerpt(cutter.first_line)}")


class _RecordCutter:
    """Iterates over (line or lines, fields or what is wrong with that line)."""

    def __init__(self, stream: BinaryIO, delimiter: str) -> None:
        self._feed = _LineFeed(stream)
        # Its default of 128 KiB is too small for long prompts; it is a setting of the whole process.
        csv.field_size_limit(MAX_LINE_BYTES)
        self._parser = csv.reader(self._feed, delimiter=delimiter, strict=True)

    @property
    def first_line(self) -> bytes:
        """First line of the last record."""
        return self._feed.given[0][1]

    def __iter__(self) -> "_RecordCutter":
        return self

    def __next__(self) -> tuple[str, list[str] | csv.Error]:
        while True:
            self._feed.given.clear()
            try:
                values = next(self._parser)
            except csv.Error as error:
                self._feed.take_back()
                return f"line {self._feed.given[0][0]}", error
            first, last = self._feed.given[0], self._feed.given[-1]
            if first is not last:
                return f"lines {first[0]}-{last[0]}", values
            if not first[1].isspace():
                return f"line {first[0]}", values


class _LineFeed:
    """Decoded lines for the csv module, which can be taken back: iterating goes on even after the end was reached."""

    def __init__(self, stream: BinaryIO) -> None:
        self._lines = byte_lines(stream, blank=True)
        self._pending: deque[tuple[int, bytes]] = deque()
        self.given: list[tuple[int, bytes]] = []

    def take_back(self) -> None:
        """Give all but the first of the lines in `given` once more."""
        self._pending.extendleft(reversed(self.given[1:]))
        del self.given[1:]

    def __iter__(self) -> "_LineFeed":
        return self

    def __next__(self) -> str:
        number, line = self._pending.popleft() if self._pending else next(self._lines)
        self.given.append((number, line))
        if len(line) > MAX_LINE_BYTES:
            raise csv.Error(f"longer than {MAX_LINE_BYTES >> 20} MiB")
        # Bytes that are not UTF-8 become lone surrogates, which validation finds in the field that has them.
        return line.decode(errors="surrogateescape")
