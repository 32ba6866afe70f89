"""Ray Data datasets as inputs of a generation job, and its outputs as a dataset.

A job must read the same rows in the same order again when it resumes, which a dataset does not promise. So it is
written once, to Parquet files whose bytes follow from the rows and their order alone; from there on the job's
fingerprint and its exactly-once commits are what they always are.
"""

import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from actors.object_store import is_uri
from jobs.commit import committed_parts
from jobs.files import read_json, writing
from jobs.storage import job_name, open_storage
from pipeline.durable import fsync, replace_json
from pipeline.errors import ConfigError, InputError

if TYPE_CHECKING:
    from ray.data import Dataset

ROWS_A_FILE = 10_000
# Written last; readers of inputs pass over names that begin with `_`.
_MARKER = "_dataset.json"

log = logging.getLogger(__name__)


def write_inputs(
    dataset: "Dataset", directory: str | Path, *, sort_by: str | None = None, rows_per_file: int = ROWS_A_FILE
) -> int:
    """Write a dataset to a directory for `--prompts`, once; returns its number of rows.

    A directory that is complete is left as it is, so that the same program resumes its job; remove it to write anew.
    An incomplete one, of a program that was killed, is replaced.

    Args:
        dataset: with a column `prompt` or `messages`, see `rasd generate`.
        sort_by: column that gives the order; without it the rows come in the dataset's own (files by name, rows as they
            stand), which is not the same each time after a shuffle or an aggregation.
        rows_per_file: rows of a file, all of them in memory at a time.

    Raises:
        ConfigError: the directory holds something else.
        InputError: the dataset has no rows.
        JobError: a file cannot be written.
    """
    target = Path(directory).expanduser().absolute()
    if (done := read_json(target / _MARKER)) is not None:
        log.info("%s has %d rows already; remove it to write the dataset anew", target, done["rows"])
        return int(done["rows"])
    if target.exists() and any(target.iterdir()):
        raise ConfigError(
            f"{target} is not empty, and not a dataset that was written before. Choose another directory."
        )
    partial = target.with_name(f"{target.name}.partial")
    with writing(partial):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        rows = _write(dataset if sort_by is None else dataset.sort(sort_by), partial, rows_per_file)
        if rows == 0:
            shutil.rmtree(partial)
            raise InputError("the dataset has no rows. Check what it was made from.")
        replace_json(partial / _MARKER, {"rows": rows, "rows_per_file": rows_per_file, "sort_by": sort_by})
        fsync(partial)
        os.replace(partial, target)
        fsync(target.parent)
    return rows


def read_outputs(output: str | Path) -> "Dataset":
    """The committed rows of a job, in the order of its inputs, as a dataset.

    Args:
        output: the job's `--output`, a directory or URI; every node reads it with the settings of its own environment.

    Raises:
        ConfigError: a URI that cannot be used.
        InputError: it holds none, or a part file is not what its commit says.
    """
    import ray.data

    name = job_name(str(output))
    storage = open_storage(name)
    keys = [part.key for part in committed_parts(storage, str(output))]
    if not keys:
        raise InputError(f"{output} holds no committed rows. Run the job first.")
    if not is_uri(name):
        return _in_order(ray.data.read_parquet([storage.where(key) for key in keys]))
    # Ray reads object stores with other clients, which take their settings from elsewhere than the job did.
    parts = ray.data.from_items([{"key": key} for key in keys], override_num_blocks=len(keys))
    return _in_order(parts.map_batches(lambda batch: _read_parts(batch, name), batch_size=1, batch_format="pyarrow"))


def _read_parts(batch: pa.Table, output: str) -> pa.Table:
    """Part files of a job's output by their keys, where a task of Ray Data runs."""
    storage = open_storage(output)
    tables = []
    for key in batch["key"].to_pylist():
        with storage.open(key) as file:
            tables.append(pq.read_table(file))
    return pa.concat_tables(tables)


def _write(dataset: "Dataset", directory: Path, rows_per_file: int) -> int:
    rows = 0
    batches = _in_order(dataset).iter_batches(batch_size=rows_per_file, batch_format="pyarrow", prefetch_batches=0)
    for index, batch in enumerate(batches):
        assert isinstance(batch, pa.Table)
        path = directory / f"{index:06d}.parquet"
        # One chunk: else the bytes would follow the dataset's blocks, which are other ones on another cluster.
        pq.write_table(batch.combine_chunks().replace_schema_metadata(None), path, compression="zstd")
        fsync(path)
        rows += batch.num_rows
    return rows


def _in_order(dataset: "Dataset") -> "Dataset":
    """Otherwise blocks come as they are finished."""
    context: Any = dataset.context
    context.execution_options.preserve_order = True
    return dataset
