"""What a datastore is on disk: its manifest, its segments' records, and how they are read and written.

    STORE/manifest.json              written last: tokenizer, vocabulary, embedder, the records of all segments
    STORE/segments/NAME/*.bin        the arrays of a segment; see datastore/README.md
    STORE/segments/NAME/segment.json the segment's record, written last in its directory

A segment without a record, or one that the manifest does not name, does not exist for readers.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.digests import file_sha256
from pipeline.durable import replace_json
from pipeline.errors import DatastoreError

FORMAT = 1
MANIFEST = "manifest.json"
RECORD = "segment.json"
SEGMENTS = "segments"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size and hexadecimal sha256 of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class SegmentRecord:
    """What a segment holds.

    Attributes:
        name: its directory below `segments/`.
        tokens, documents, passages: how many of each; passages is 0 without a dense index.
        files: every file of the segment but the record itself.
    """

    name: str
    tokens: int
    documents: int
    passages: int
    files: Mapping[str, FileRecord]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files.values())


@dataclass(frozen=True, slots=True)
class DenseSpec:
    """How passages are cut and embedded; equal in all segments of a datastore.

    Attributes:
        embedder: name of the encoder, as the user wrote it.
        embedder_hash: digest of its files.
        dimension: length of a vector.
        passage_tokens, overlap: tokens (of the target's tokenizer) of a passage, shared by neighbours.
    """

    embedder: str
    embedder_hash: str
    dimension: int
    passage_tokens: int
    overlap: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a whole datastore is.

    Attributes:
        tokenizer: `pipeline.models.tokenizer_hash` of the tokenizer that made the tokens.
        vocab_size: token ids are below it; decides between 2 and 4 bytes a token.
        dense: None without a dense index.
        segments: oldest first.
    """

    tokenizer: str
    vocab_size: int
    dense: DenseSpec | None
    segments: tuple[SegmentRecord, ...]

    @property
    def token_dtype(self) -> np.dtype[Any]:
        return token_dtype(self.vocab_size)

    @property
    def tokens(self) -> int:
        return sum(segment.tokens for segment in self.segments)

    @property
    def fingerprint(self) -> str:
        """Hex digest of all of it."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 while ids and one more value fit, else uint32 (21 bits of it are used).

    Raises:
        DatastoreError: the vocabulary is too large for the index.
    """
    if vocab_size >= (1 << 21) - 1:
        raise DatastoreError(f"The vocabulary has {vocab_size:,} tokens; a datastore holds at most {(1 << 21) - 2:,}.")
    return np.dtype(np.uint16 if vocab_size < (1 << 16) - 1 else np.uint32)


def write_manifest(store: Path, manifest: Manifest) -> None:
    """Publish a datastore: readers see the old manifest or this one.

    Raises:
        DatastoreError: it cannot be written.
    """
    _write_json(store / MANIFEST, {"format": FORMAT, **asdict(manifest), "fingerprint": manifest.fingerprint})


def read_manifest(store: Path) -> Manifest:
    """The manifest of a datastore.

    Raises:
        DatastoreError: there is none, it is damaged, or its format is another program version's.
    """
    value = _read_json(store / MANIFEST, "Build it with `rasd datastore build`, or give the directory it wrote.")
    if value.get("format") != FORMAT:
        raise DatastoreError(
            f"{store} has datastore format {value.get('format')!r}; this program reads format {FORMAT}. Build it again."
        )
    try:
        dense = value["dense"]
        manifest = Manifest(
            tokenizer=value["tokenizer"],
            vocab_size=int(value["vocab_size"]),
            dense=None if dense is None else DenseSpec(**dense),
            segments=tuple(_segment(segment) for segment in value["segments"]),
        )
        recorded = value["fingerprint"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DatastoreError(f"{store / MANIFEST} is damaged ({error}); build the datastore again.") from error
    if manifest.fingerprint != recorded:
        raise DatastoreError(
            f"{store / MANIFEST} is damaged: its content has the fingerprint {manifest.fingerprint[:16]}, recorded is"
            f" {recorded[:16]}. Restore the file, or build the datastore again."
        )
    return manifest


def write_record(directory: Path, record: SegmentRecord) -> None:
    """Complete a segment's directory; raises DatastoreError if it cannot be written."""
    _write_json(directory / RECORD, asdict(record))


def read_record(directory: Path) -> SegmentRecord | None:
    """The record of a segment; None if its directory is not complete."""
    try:
        return _segment(json.loads((directory / RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def record_files(directory: Path, names: Sequence[str]) -> dict[str, FileRecord]:
    """Sizes and checksums of files just written."""
    return {n: FileRecord((directory / n).stat().st_size, file_sha256(directory / n)) for n in sorted(names)}


def check_sizes(store: Path, segments: Sequence[SegmentRecord]) -> None:
    """Compare each file's size with the manifest.

    Raises:
        DatastoreError: a file is missing or has another size; the message lists all of them, up to five.
    """
    problems = []
    for segment in segments:
        for name, file in segment.files.items():
            path = store / SEGMENTS / segment.name / name
            size = path.stat().st_size if path.is_file() else None
            if size != file.bytes:
                found = "is missing" if size is None else f"has {size:,} bytes"
                problems.append(f"{path} {found}, the manifest says {file.bytes:,}")
    if problems:
        raise DatastoreError(f"{'; '.join(problems[:5])}. Restore the files, or build the datastore again.")


def check_digests(store: Path, segments: Sequence[SegmentRecord]) -> list[str]:
    """Problems found by reading every byte, one line each."""
    problems = []
    for segment in segments:
        for name, file in segment.files.items():
            path = store / SEGMENTS / segment.name / name
            if not path.is_file():
                problems.append(f"{path} is missing")
            elif (found := file_sha256(path)) != file.sha256:
                problems.append(f"{path} has sha256 {found}, the manifest says {file.sha256}")
    return problems


def write_array(path: Path, array: np.ndarray) -> None:
    """Write an array's bytes and make them survive a power cut; unlike `tofile`, notices a full disk.

    Raises:
        OSError: they cannot be written.
    """
    with path.open("wb") as file:
        if array.size:  # an empty view cannot be cast
            file.write(np.ascontiguousarray(array).data.cast("B"))
        file.flush()
        os.fsync(file.fileno())


def _segment(value: Mapping[str, Any]) -> SegmentRecord:
    files = {name: FileRecord(**file) for name, file in value["files"].items()}
    return SegmentRecord(**{**value, "files": files})


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DatastoreError(f"{path} does not exist, so {path.parent} is no datastore. {remedy}") from None
    except (OSError, ValueError) as error:
        raise DatastoreError(f"{path} cannot be read: {error}. {remedy}") from error
    if not isinstance(value, dict):
        raise DatastoreError(f"{path} holds no JSON object. {remedy}")
    return value


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    try:
        replace_json(path, value)
    except OSError as error:
        raise DatastoreError(f"{path} cannot be written: {error}. Free space or mend the directory.") from error
