"""How each input format is read: one small class a format, all giving `base.Record`."""

from pathlib import Path

from jobs.readers.base import Reader
from jobs.readers.csv_rows import CsvReader
from jobs.readers.json_list import JsonListReader, is_json_list
from jobs.readers.lines import JsonLinesReader, TextReader
from jobs.readers.stream import COMPRESSIONS, check_encoding
from jobs.readers.tables import ParquetReader
from pipeline.errors import InputError

_TEXT_FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
FORMATS = (*_TEXT_FORMATS, ".parquet")


def file_format(path: Path) -> str | None:
    """Which of `FORMATS` the file's name says it is, compressed or not; None if none."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        return suffixes[-2] if len(suffixes) > 1 and suffixes[-2] in _TEXT_FORMATS else None
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS else None


def open_reader(path: Path, name: str, text_column: str) -> Reader:
    """Reader of a file.

    Args:
        name: see `base.FileSummary.path`.
        text_column: the column that plain text becomes.

    Raises:
        InputError: the format is unknown, or the file is not what its name says.
    """
    found = file_format(path)
    if found in _TEXT_FORMATS:
        check_encoding(path)
    match found:
        case ".parquet":
            return ParquetReader(path, name)
        case ".csv" | ".tsv":
            return CsvReader(path, name, "," if found == ".csv" else "\t")
        case ".txt":
            return TextReader(path, name, text_column)
        case ".json" if is_json_list(path):
            return JsonListReader(path, name)
        case ".json" | ".jsonl" | ".ndjson":
            return JsonLinesReader(path, name)
    raise InputError(
        f"{path} has an unknown format. Known are {', '.join(FORMATS)}; all but Parquet also with"
        f" {' or '.join(COMPRESSIONS)} behind."
    )
