"""Hugging Face data sets, saved to disk or from the hub: memory-mapped Arrow files.

Apart from the others because importing `datasets` takes seconds.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow as pa

from jobs.readers.base import FileSummary, Record
from jobs.readers.stream import hash_files, reading
from jobs.readers.tables import BATCH_ROWS, batch_records, plain_schema
from pipeline.errors import InputError

_LOG = logging.getLogger(__name__)


class DatasetReader:
    """One split of a data set; images and the like come as their stored bytes and paths."""

    def __init__(self, dataset: datasets.Dataset, name: str) -> None:
        self._dataset = dataset.with_format("arrow")
        self._schema = plain_schema(dataset.features.arrow_schema)
        self.name = name

    def schema(self) -> pa.Schema:
        """See `Reader.schema`."""
        return self._schema

    def summary(self) -> FileSummary:
        """See `Reader.summary`; bytes and hash are those of its Arrow files."""
        files = [Path(file["filename"]) for file in self._dataset.cache_files]
        return FileSummary(self.name, len(self._dataset), *hash_files(files))

    def records(self, start: int) -> Iterator[Record]:
        """See `Reader.records`."""
        total = len(self._dataset)
        with reading(self.name):
            batches = (self._dataset[i : min(i + BATCH_ROWS, total)] for i in range(start, total, BATCH_ROWS))
            yield from batch_records(self.name, batches, self._schema, start)


def saved_dataset(path: Path, name: str) -> DatasetReader:
    """Reader of a data set in a directory.

    Args:
        name: see `base.FileSummary.path`.

    Raises:
        InputError: it cannot be loaded, or it has several splits.
    """
    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise InputError(f"cannot load the data set {path}: {error}. Save it again with save_to_disk.") from error
    return DatasetReader(_only_split(found, str(path), "/"), name)


def hub_dataset(spec: str) -> DatasetReader:
    """Reader of a data set from the Hugging Face hub, downloaded into its cache.

    Args:
        spec: NAME, NAME:SPLIT or NAME:CONFIG:SPLIT.

    Raises:
        InputError: it cannot be loaded, or it has several splits.
    """
    name, *options = spec.split(":")
    split = options.pop() if options else None
    _LOG.warning("%s is no file or directory here; looking for a data set of that name on the Hugging Face hub", name)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns of each retry
    try:
        found = datasets.load_dataset(name, *options, split=split)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise InputError(
            f"{spec} is neither a file nor a directory here, nor a data set that could be loaded from the Hugging Face"
            f" hub: {error}. Check the spelling and the network."
        ) from error
    return DatasetReader(_only_split(found, spec, ":"), spec)


def _only_split(found: datasets.Dataset | datasets.DatasetDict, spec: str, separator: str) -> datasets.Dataset:
    if isinstance(found, datasets.Dataset):
        return found
    if len(found) != 1:
        splits = ", ".join(f"{spec}{separator}{name}" for name in found)
        raise InputError(f"{spec} has {len(found)} splits. Name one: {splits}.")
    return next(iter(found.values()))
