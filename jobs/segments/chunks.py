"""Chunks: the documents of one segment, packed so that they travel to a task without being copied.

How many tokens a text has is known only once it is tokenised, which happens in the task; until then a token counts as
four bytes, about right for English prose and code, and exact for token ids.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np

from datastore.format import FORMAT, DenseSpec
from jobs.corpus.document import Document

BYTES_A_TOKEN = 4
_NAME_DIGITS = 12


@dataclass(frozen=True, slots=True)
class SegmentSpec:
    """What fixes a segment's bytes besides its documents.

    Attributes:
        tokenizer: `pipeline.models.tokenizer_hash`.
        dense: None without passages.
    """

    tokenizer: str
    vocab_size: int
    dense: DenseSpec | None


class Wanted(Protocol):
    """A segment that should be there, and what a task makes it of."""

    @property
    def name(self) -> str:
        """The segment's name."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Documents of one segment.

    Attributes:
        name: of the segment.
        names: of the D documents.
        content: [n] uint8, the documents' contents one after the other.
        ends: [D] int64, where each ends in `content`.
        is_text: [D] bool, UTF-8 rather than token ids.
        digests: [D, 2] uint64.
    """

    name: str
    names: Sequence[str]
    content: np.ndarray
    ends: np.ndarray
    is_text: np.ndarray
    digests: np.ndarray


def segment_name(number: int, spec: SegmentSpec, digests: np.ndarray, names: Sequence[str]) -> str:
    """Ordinal of a segment, and a digest that equal segments share: a complete one of that name need not be made again.

    Args:
        digests: [D, 2] uint64 of its documents.
        names: of its documents.
    """
    dense = None if spec.dense is None else {**asdict(spec.dense), "embedder": None}  # its hash counts
    fixed = hashlib.sha256(json.dumps([FORMAT, spec.tokenizer, spec.vocab_size, dense]).encode())
    fixed.update(np.ascontiguousarray(digests).tobytes())
    fixed.update(json.dumps(list(names)).encode())
    return f"{number:06d}-{fixed.hexdigest()[:_NAME_DIGITS]}"


def cut_chunks(documents: Iterable[Document], spec: SegmentSpec, tokens: int, first: int = 0) -> Iterator[Chunk]:
    """Cut a stream of documents into chunks; one chunk is in memory at a time.

    Args:
        tokens: of a chunk, as far as `BYTES_A_TOKEN` tells; a longer document is a chunk of its own.
        first: number of the first segment.
    """
    limit, held, size, number = tokens * BYTES_A_TOKEN, list[Document](), 0, first
    for document in documents:
        if held and size + len(document.content) > limit:
            yield _packed(held, number, spec)
            held, size, number = [], 0, number + 1
        held.append(document)
        size += len(document.content)
    if held:
        yield _packed(held, number, spec)


def _packed(documents: Sequence[Document], number: int, spec: SegmentSpec) -> Chunk:
    names = [document.name for document in documents]
    digests = np.frombuffer(b"".join(document.digest for document in documents), np.uint64).reshape(-1, 2)
    return Chunk(
        name=segment_name(number, spec, digests, names),
        names=names,
        content=np.frombuffer(b"".join(document.content for document in documents), np.uint8),
        ends=np.cumsum([len(document.content) for document in documents], dtype=np.int64),
        is_text=np.array([document.is_text for document in documents], np.bool_),
        digests=digests,
    )
