"""How each input format is read: one small class a format, all giving `base.Record`."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from jobs.readers.base import Reader
from jobs.readers.csv_rows import CsvReader
from jobs.readers.json_list import JsonListReader, json_layout
from jobs.readers.lines import JsonLinesReader, TextReader
from jobs.readers.stream import COMPRESSIONS, check_encoding
from jobs.readers.tables import ParquetReader
from pipeline.errors import InputError

PARQUET = ".parquet"
ROW_FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", PARQUET)
FORMATS = (*ROW_FORMATS, ".txt")


@dataclass(frozen=True, slots=True)
class Formats:
    """Which files a command reads, and how.

    Attributes:
        what: that it reads from them, for messages.
        names: suffixes of the files it reads; all but Parquet may be compressed.
        open: reader of a file of these formats, given its path and its name (see `base.FileSummary.path`).
    """

    what: str
    names: tuple[str, ...]
    open: Callable[[Path, str], Reader]

    def of(self, path: Path) -> str | None:
        """Which of `names` the file's name says it is; None if none."""
        return file_format(path, self.names)


def prompt_formats(text_column: str) -> Formats:
    """Rows that hold prompts; plain text is a prompt a line, in the column `text_column`."""
    return Formats("prompts", FORMATS, lambda path, name: open_reader(path, name, text_column))


def file_format(path: Path, names: Collection[str] = FORMATS) -> str | None:
    """Which of `names` the file's name says it is, compressed or not; None if none."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        return suffixes[-2] if len(suffixes) > 1 and suffixes[-2] in names and suffixes[-2] != PARQUET else None
    return suffixes[-1] if suffixes and suffixes[-1] in names else None


def open_reader(path: Path, name: str, text_column: str) -> Reader:
    """Reader of a file.

    Args:
        name: see `base.FileSummary.path`.
        text_column: the column that plain text becomes.

    Raises:
        InputError: the format is unknown, or the file is not what its name says.
    """
    found = file_format(path)
    if found not in (None, PARQUET):
        check_encoding(path)
    match found:
        case ".parquet":
            return ParquetReader(path, name)
        case ".csv" | ".tsv":
            return CsvReader(path, name, "," if found == ".csv" else "\t")
        case ".txt":
            return TextReader(path, name, text_column)
        case ".json":
            match json_layout(path):
                case "list":
                    return JsonListReader(path, name)
                case "object":
                    raise InputError(f"{path} holds one JSON object. Give a list of objects, or JSON lines.")
            return JsonLinesReader(path, name)
        case ".jsonl" | ".ndjson":
            return JsonLinesReader(path, name)
    raise InputError(
        f"{path} has an unknown format. Known are {', '.join(FORMATS)}; all but Parquet also with"
        f" {' or '.join(COMPRESSIONS)} behind."
    )
