"""A file as one row: prose and source code, whose lines mean nothing apart."""

import io
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from jobs.readers.base import FileSummary, Record, excerpt, failed
from jobs.readers.stream import hash_files, open_bytes, reading
from pipeline.errors import InputError

# A longer file is not one document, and reading it whole could exhaust memory.
MAX_FILE_BYTES = 4 << 30

_UTF8_MARK = b"\xef\xbb\xbf"


class WholeFileReader:
    """One row: the file's text, as it is, and its name in the column `path`."""

    def __init__(self, path: Path, name: str, text_column: str) -> None:
        self._path = path
        self.name = name
        self._column = text_column

    def schema(self) -> pa.Schema:
        """See `Reader.schema`."""
        return pa.schema([(self._column, pa.string()), ("path", pa.string())])

    def summary(self) -> FileSummary:
        """See `Reader.summary`."""
        return FileSummary(self.name, 1, *hash_files([self._path]))

    def records(self, start: int) -> Iterator[Record]:
        """See `Reader.records`."""
        if start == 0:
            yield self._record(self._content())

    def _content(self) -> bytes:
        with reading(self._path), open_bytes(self._path) as stream:
            content = io.BytesIO()
            while block := stream.read(1 << 20):
                content.write(block)
                if content.tell() > MAX_FILE_BYTES:
                    raise InputError(
                        f"{self._path} is longer than {MAX_FILE_BYTES >> 30} GiB, too long for one document. Cut it"
                        " into files, or give JSON lines."
                    )
            return content.getvalue().removeprefix(_UTF8_MARK)

    def _record(self, content: bytes) -> Record:
        try:
            return Record(self.name, {self._column: content.decode(), "path": self.name})
        except UnicodeDecodeError as error:
            shown = excerpt(content[max(0, error.start - 20) : error.start + 20])
            problem = f"byte {error.start} is not UTF-8, in {shown}; save the file as UTF-8"
            return failed(self.name, "invalid_unicode", problem)
