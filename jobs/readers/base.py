"""What a reader gives: records, one for each row, good or bad, and a summary of its file.

A record is raw: parsed, but neither its prompt nor its other columns have been looked at (that is `jobs.validate`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from actors.rows import RowFailure

EXCERPT_LENGTH = 200


@dataclass(frozen=True, slots=True)
class BadValue:
    """Stands where a value could not be read, so that the rest of its row still can be.

    Attributes:
        error_type: as in `RowFailure`.
        problem: what is wrong with the value, without the place.
    """

    error_type: str
    problem: str


@dataclass(frozen=True, slots=True)
class Record:
    """One row as found in the input.

    Attributes:
        where: file and line or row, for messages.
        fields: the columns; a `BadValue` stands for one that is unreadable. None if the whole row is.
        error: why the row is unreadable; None if it is not.
    """

    where: str
    fields: Mapping[str, Any] | None
    error: RowFailure | None = None


@dataclass(frozen=True, slots=True)
class FileSummary:
    """What the job's plan remembers of one input.

    Attributes:
        path: relative to the directory it was found in, so that moved inputs stay the same inputs.
        rows, bytes: number of rows, and size on disk.
        sha256: of the bytes on disk, hexadecimal.
    """

    path: str
    rows: int
    bytes: int
    sha256: str


class Reader(Protocol):
    """One file, or one data set."""

    @property
    def name(self) -> str:
        """Path relative to where it was found; see `FileSummary.path`."""

    def schema(self) -> pa.Schema | None:
        """Types of all its columns where the format fixes them, else None."""

    def summary(self) -> FileSummary:
        """Count the rows and hash the bytes in one streaming pass.

        Raises:
            InputError: it cannot be read.
        """

    def records(self, start: int) -> Iterator[Record]:
        """All rows from row `start` on, in order; at most a batch of them is in memory.

        Raises:
            InputError: it cannot be read.
        """


def excerpt(value: object) -> str:
    """`value` as printable ASCII, cut so that a message stays readable; of bytes, the first 200."""
    if isinstance(value, bytes):
        return repr(value[:EXCERPT_LENGTH]) + ("..." if len(value) > EXCERPT_LENGTH else "")
    text = ascii(value)
    return text if len(text) <= EXCERPT_LENGTH else text[:EXCERPT_LENGTH] + "..."


def failed(where: str, error_type: str, problem: str) -> Record:
    """Record of an unreadable row; `problem` ends with the remedy."""
    return Record(where, None, RowFailure(error_type, f"{where}: {problem}"))
