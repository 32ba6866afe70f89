"""Digests of model files: whole ones for small files, sampled ones where gigabytes would have to be read."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

SAMPLE_BYTES = 4096
NUM_SAMPLES = 1024


def file_sha256(path: Path) -> str:
    """Hex sha256 of every byte of `path`."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_sha256(paths: Iterable[Path]) -> str:
    """Hex sha256 that tells two sets of model files apart without reading all of them.

    Files of up to 4 MiB count whole. Of a longer one the size and 1,024 evenly spread blocks of 4 KiB count: training
    changes nearly every weight, so weights of the same shapes from another run do not collide.
    """
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        for block in _sample(path):
            digest.update(block)
    return digest.hexdigest()


def _sample(path: Path) -> Iterable[bytes]:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= NUM_SAMPLES * SAMPLE_BYTES:
            yield file.read()
            return
        for index in range(NUM_SAMPLES):
            file.seek(index * (size - SAMPLE_BYTES) // (NUM_SAMPLES - 1))
            yield file.read(SAMPLE_BYTES)
