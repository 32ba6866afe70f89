"""Building the suffix index: tokens a second, bytes a token on disk, and the most memory it takes."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from datastore.segment import build_segment, write_segment


def measure(tokens: Path, offsets: Path, vocab_size: int, num_threads: int) -> dict[str, Any]:
    """One segment of all the tokens, in a process of its own, whose memory is measured.

    Args:
        tokens, offsets: .npy files as `build_segment` takes them.

    Returns:
        Tokens a second of the index alone and with writing, syncing and hashing its files; bytes a token on disk; and
        the growth of resident memory over the process with the tokens loaded, in bytes a token.
    """
    arguments = [str(tokens), str(offsets), str(vocab_size), str(num_threads)]
    command = [sys.executable, "-m", "benchmarks.datastore.build", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    results: dict[str, Any] = json.loads(done.stdout)
    return results


def _measure(tokens_path: Path, offsets_path: Path, vocab_size: int, num_threads: int) -> dict[str, Any]:
    tokens, offsets = np.load(tokens_path), np.load(offsets_path)
    build_segment(tokens[:1000], np.array([0, 1000]), vocab_size, num_threads)  # compiles
    before = _peak()
    begin = time.perf_counter()
    segment = build_segment(tokens, offsets, vocab_size, num_threads)
    index_seconds = time.perf_counter() - begin
    index_peak = _peak() - before
    num_places = len(segment.suffix.places)
    del segment
    with tempfile.TemporaryDirectory() as directory:
        begin = time.perf_counter()
        names = [str(i) for i in range(len(offsets) - 1)]
        record = write_segment(
            Path(directory) / "segment", tokens, offsets, names, vocab_size=vocab_size, num_threads=num_threads
        )
        write_seconds = time.perf_counter() - begin
    return {
        "tokens": len(tokens),
        "documents": len(offsets) - 1,
        "places": num_places,
        "index_tokens_per_second": round(len(tokens) / index_seconds),
        "written_tokens_per_second": round(len(tokens) / write_seconds),
        "disk_bytes_a_token": round(record.bytes / record.tokens, 3),
        "index_peak_bytes_a_token": round(index_peak / len(tokens), 2),
        "peak_bytes_a_token": round((_peak() - before) / len(tokens), 2),
    }


def _peak() -> int:
    """Most bytes resident so far; unlike `getrusage`, not those of the process that started this one."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    print(json.dumps(_measure(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))))
