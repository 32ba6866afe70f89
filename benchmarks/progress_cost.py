"""What it costs a replica to keep the finished rows of a shard: its seconds with and without, at a known rate of rows.

    python -m benchmarks.progress_cost --output benchmarks/results/progress_cost.json

Rows come at a steady rate, as from an engine; measured are the seconds that the shard's thread is at work (conversion,
writing, waiting for the disk), the part file at the end included. The engine has a thread of its own.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from actors.records import Record, generated_record, output_schema
from actors.rows import InputRow, ProgressPlace, ShardTask
from actors.shard_output import ShardOutput
from actors.shard_progress import PROGRESS, ShardProgress
from benchmarks.common import report
from tests.fakes import fake_generation

_SCHEMA = output_schema(["prompt"], pa.schema([]), logprobs=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows-per-second", type=float, default=50.0)
    parser.add_argument("--seconds", type=float, default=30.0, help="how long the shard takes")
    parser.add_argument("--tokens", type=int, default=256, help="of a row")
    parser.add_argument("--directory", type=Path, help="where to write; by default the temporary directory")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    records = [_record(i, options.tokens) for i in range(int(options.rows_per_second * options.seconds))]
    results: dict[str, Any] = {"rows": len(records), "tokens": options.tokens, "seconds": options.seconds}
    for name in ("warm-up", "without", "with"):
        with tempfile.TemporaryDirectory(prefix="progress-", dir=options.directory) as directory:
            rows, rate = (records[:100], 1e9) if name == "warm-up" else (records, options.rows_per_second)
            results[name] = measure(Path(directory), rows, rate, is_kept=name == "with")
    del results["warm-up"]
    results["share_of_time"] = (results["with"]["busy_seconds"] - results["without"]["busy_seconds"]) / options.seconds
    report(results, options.output)


def measure(directory: Path, records: list[Record], rate: float, *, is_kept: bool) -> dict[str, Any]:
    """One shard; the time at work, and what reading its progress takes."""
    (directory / PROGRESS).mkdir()
    place = ProgressPlace(str(directory / PROGRESS / "000000" / "001000"), bytes(32)) if is_kept else None
    output = ShardOutput(ShardTask(0, 1000, (), str(directory / "part"), _SCHEMA.serialize().to_pybytes(), place))
    begin, busy = time.perf_counter(), 0.0
    for number, record in enumerate(records):
        time.sleep(max(0.0, begin + number / rate - time.perf_counter()))
        at = time.perf_counter()
        output.add(record)
        busy += time.perf_counter() - at
    at = time.perf_counter()
    output.finish()
    busy += time.perf_counter() - at
    if place is None:
        return {"busy_seconds": busy}
    at = time.perf_counter()
    found = ShardProgress(place, _SCHEMA).read()
    seconds = time.perf_counter() - at
    return {"busy_seconds": busy, "bytes": Path(place.path).stat().st_size, "kept": len(found), "read_seconds": seconds}


def _record(index: int, tokens: int) -> Record:
    generation = fake_generation(f"prompt {index}", index)
    token_ids = random.Random(index).choices(range(49_152), k=tokens)
    text = " ".join(f"{token:x}" for token in token_ids)
    generation = replace(generation, token_ids=tuple(token_ids), text=text)
    return generated_record(InputRow(index, str(index), prompt=text), 0, index, generation)


if __name__ == "__main__":
    main()
