"""Documents from the outputs of `rasd generate`: token ids as they are, from committed part files alone."""

import logging
from collections.abc import Iterator

import pyarrow.parquet as pq

from actors.rows import RowFailure
from jobs.commit import StoredPart, committed_parts
from jobs.corpus.document import Document, token_document
from jobs.readers.stream import reading
from jobs.storage import open_storage, read_plan
from pipeline.errors import DatastoreError, InputError

PREFIX = "generations:"

_BATCH_ROWS = 1024
_COLUMNS = ["id", "sample", "status", "token_ids"]

log = logging.getLogger(__name__)


class GenerationSource:
    """Outputs of one generation job.

    Args:
        output: the job's `--output`, a directory or URI.
        tokenizer: hash of the tokenizer that the datastore is for.

    Raises:
        InputError: it is no output of a job.
        ConfigError: a URI that cannot be used.
        DatastoreError: the job's tokenizer is another one.
    """

    def __init__(self, output: str, tokenizer: str) -> None:
        self._storage = open_storage(output)
        self.name = f"{PREFIX}{self._storage.where()}"
        plan = read_plan(self._storage) or {}
        found = plan.get("fingerprint", {}).get("tokenizer")
        if found is None:
            raise InputError(
                f"{self._storage.where()} is no output of `rasd generate`: it holds no plan.json of one. Give the job's"
                " --output."
            )
        if found != tokenizer:
            raise DatastoreError(
                f"{self.name} was made with another tokenizer: {found}, that of --model is {tokenizer}. Its token ids"
                " mean other texts; name the model that the job ran with, or give its part files as texts."
            )
        self._has_samples = int(plan["fingerprint"].get("num_samples", 1)) > 1

    def documents(self) -> Iterator[Document | RowFailure]:
        """See `Source.documents`; in the order of the job's rows."""
        for part in committed_parts(self._storage, self.name):
            yield from self._shard(part)

    def _shard(self, part: StoredPart) -> Iterator[Document | RowFailure]:
        with reading(str(part)), part.open() as source, pq.ParquetFile(source) as file:
            for batch in file.iter_batches(_BATCH_ROWS, columns=_COLUMNS, use_threads=False):
                columns = [batch.column(name).to_pylist() for name in _COLUMNS[:3]]
                for (row_id, sample, status), ids in zip(zip(*columns, strict=True), batch["token_ids"], strict=True):
                    name = f"{row_id}#{sample}" if self._has_samples else str(row_id)
                    if status != "ok":
                        yield RowFailure("error_row", f"{part} row {name} was not generated")
                    elif not len(ids):
                        yield RowFailure("empty_text", f"{part} row {name} has no tokens")
                    else:
                        yield token_document(name, ids.values.to_numpy())
