"""A `.json` file that holds one list of objects, parsed piece by piece: it may be larger than memory."""

import codecs
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Literal

from jobs.readers.base import FileSummary, Record, excerpt
from jobs.readers.lines import beyond_limits, object_record, unique_object
from jobs.readers.stream import MAX_LINE_BYTES, open_bytes, reading, summarise
from pipeline.errors import InputError

_BLOCK = 1 << 20
_WHITE_SPACE = " \t\r\n"


class JsonListReader:
    """The elements of one list. A syntax error makes the file unreadable, as nobody knows where the next one begins."""

    def __init__(self, path: Path, name: str) -> None:
        self._path = path
        self.name = name

    def schema(self) -> None:
        """See `Reader.schema`; types are inferred."""

    def summary(self) -> FileSummary:
        """See `Reader.summary`."""
        return summarise(self._path, self.name, lambda stream: sum(1 for _ in self._values(stream)))

    def records(self, start: int) -> Iterator[Record]:
        """See `Reader.records`; skipping parses."""
        with reading(self._path), open_bytes(self._path) as stream:
            for index, value in islice(enumerate(self._values(stream)), start, None):
                yield object_record(f"{self.name} element {index}", value, excerpt(value))

    def _values(self, stream: BinaryIO) -> Iterator[object]:
        return _ListParser(stream, self._path).values()


def json_layout(path: Path) -> Literal["list", "object", "lines"]:
    """What the beginning of a `.json` file looks like: a list, one object over several lines, or JSON lines.

    Raises:
        InputError: the file cannot be read.
    """
    with reading(path), open_bytes(path) as stream:
        head = stream.read(_BLOCK).decode("utf-8-sig", errors="replace").lstrip(_WHITE_SPACE)
        if head.startswith("{") and head.splitlines()[0].strip() == "{":
            return "object"
        return "list" if head.startswith("[") else "lines"


class _ListParser:
    """Cuts a list into its elements; keeps one block of text, or one element if that is longer."""

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self._stream = stream
        self._path = path
        # Bytes that are not UTF-8 become lone surrogates, which validation finds in the row that has them.
        self._bytes_to_text = codecs.getincrementaldecoder("utf-8-sig")(errors="surrogateescape")
        self._decode = json.JSONDecoder(object_pairs_hook=unique_object).raw_decode
        self._text = ""
        self._at = 0  # what stands before is done with
        self._count = 0

    def values(self) -> Iterator[object]:
        """Each element, parsed.

        Raises:
            InputError: the file is not a well-formed list.
        """
        self._take("[")
        if self._next_character() == "]":
            self._take("]")
        else:
            yield self._element()
            while self._take(",]") == ",":
                yield self._element()
        if extra := self._next_character():
            raise self._error(f"{extra!r} after the end of the list")

    def _element(self) -> object:
        self._next_character()
        while True:
            try:
                value, end = self._decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if not self._read_more():
                    raise self._error(error.msg) from error
            except (ValueError, RecursionError) as error:
                raise self._error(beyond_limits(error)) from error
            else:
                # A number at the very end may go on in the next block.
                if end < len(self._text) or not self._read_more():
                    self._at = end
                    self._count += 1
                    return value

    def _take(self, wanted: str) -> str:
        found = self._next_character()
        if not found or found not in wanted:
            raise self._error(f"{found!r} where one of {wanted!r} should be" if found else "the file ends early")
        self._at += 1
        return found

    def _next_character(self) -> str:
        """Skip white space; "" at the end of the file."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _WHITE_SPACE:
                    return self._text[self._at]
                self._at += 1
            if not self._read_more():
                return ""

    def _read_more(self) -> bool:
        rest = self._text[self._at :]
        if len(rest) > MAX_LINE_BYTES:
            raise self._error(f"not JSON, or longer than {MAX_LINE_BYTES >> 20} MiB")
        # At least as much again, so that the repeated parsing of a long element stays linear.
        block = self._stream.read(max(_BLOCK, len(rest)))
        self._text, self._at = rest + self._bytes_to_text.decode(block, final=not block), 0
        return bool(block)

    def _error(self, problem: str) -> InputError:
        shown = excerpt(self._text[self._at : self._at + 80])
        return InputError(
            f"{self._path}: {problem}, at element {self._count} (from 0), near {shown}. Correct the file, or give JSON"
            " lines, of which only bad lines are lost."
        )
