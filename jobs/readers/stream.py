"""The bytes of an input file: opened, decompressed, hashed, cut into lines. No format is known here."""

import hashlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import pyarrow as pa

from jobs.readers.base import FileSummary
from pipeline.errors import InputError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

# A longer line is taken for a file that has no lines; reading it whole could exhaust memory.
MAX_LINE_BYTES = 64 << 20
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}

_BLOCK = 1 << 20
_UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


class _HashingFile(io.RawIOBase):
    """A file that hashes whatever is read from it."""

    def __init__(self, path: Path) -> None:
        self._file = io.FileIO(path)
        self.digest = hashlib.sha256()
        self.num_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        count = self._file.readinto(buffer)
        self.digest.update(memoryview(buffer)[:count])
        self.num_bytes += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Turn what the file system, a decompressor or Arrow raises into an InputError that names the file."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(f"cannot read {path}: {reason}. Check that the file is whole and readable.") from error


def open_bytes(path: Path) -> BinaryIO:
    """The file's bytes, decompressed if its name ends in .gz or .zst."""
    return _decompressed(io.FileIO(path), path)


def _decompressed(raw: io.RawIOBase, path: Path) -> BinaryIO:
    compression = COMPRESSIONS.get(path.suffix.lower())
    if compression:
        raw = pa.CompressedInputStream(pa.PythonFile(raw, "r"), compression)
    return io.BufferedReader(raw, _BLOCK)


def summarise(path: Path, name: str, count: Callable[[BinaryIO], int]) -> FileSummary:
    """Hash a file while `count` reads its rows.

    Args:
        count: reads the decompressed bytes and returns the number of rows.
    """
    with reading(path), _HashingFile(path) as raw:
        stream = _decompressed(raw, path)  # kept: without it, Python would close `raw`
        rows = count(stream)
        while raw.read(_BLOCK):  # what a decompressor leaves unread belongs to the file, too
            pass
        return FileSummary(name, rows, raw.num_bytes, raw.digest.hexdigest())


def hash_files(paths: list[Path]) -> tuple[int, str]:
    """Size and hexadecimal sha256 of the files' bytes, one after the other."""
    digest, size = hashlib.sha256(), 0
    for path in paths:
        with reading(path), io.FileIO(path) as file:
            while block := file.read(_BLOCK):
                digest.update(block)
                size += len(block)
    return size, digest.hexdigest()


def check_encoding(path: Path) -> None:
    """Refuse UTF-16, of which every line would be an error row.

    Raises:
        InputError: the file is UTF-16 or cannot be read.
    """
    with reading(path), open_bytes(path) as stream:
        if stream.read(2) in _UTF16_MARKS:
            raise InputError(f"{path} is UTF-16. Convert it first: iconv -f UTF-16 -t UTF-8.")


def byte_lines(stream: BinaryIO, *, blank: bool = False) -> Iterator[tuple[int, bytes]]:
    """Number, from 1, and bytes of each line, line end included, byte order mark not.

    A line above `MAX_LINE_BYTES` comes as its first `MAX_LINE_BYTES + 1` bytes; its rest is skipped.

    Args:
        blank: give lines of nothing but white space, too.
    """
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(_UTF8_MARK)
        if len(line) > MAX_LINE_BYTES:
            _skip_line(stream, line)
        if blank or (line and not line.isspace()):
            yield number, line


def _skip_line(stream: BinaryIO, line: bytes) -> None:
    while line and not line.endswith(b"\n"):
        line = stream.readline(_BLOCK)
