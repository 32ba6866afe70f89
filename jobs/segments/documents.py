"""Documents as a segment holds them: tokens, names, digests and passages, new or taken from older segments.

Next to what `datastore.segment` writes, a segment made here has `digests.bin`, [D, 2] uint64: a digest of each
document's content before it was tokenised, so that documents added later can be told from those already there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datastore.format import SEGMENTS, SegmentRecord
from datastore.segment import StoredSegment, open_segment
from jobs.corpus.document import token_document
from jobs.segments.chunks import SegmentSpec
from pipeline.errors import DatastoreError

DIGESTS = "digests.bin"


@dataclass(frozen=True, slots=True)
class Documents:
    """D documents with tokens.

    Attributes:
        tokens: [n], document after document.
        offsets: [D + 1] int64.
        names: D of them.
        digests: [D, 2] uint64.
        dense: spans [P, 2] in `tokens` and vectors [P, dimension] of the passages; None without.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    names: Sequence[str]
    digests: np.ndarray
    dense: tuple[np.ndarray, np.ndarray] | None


@dataclass(frozen=True, slots=True)
class Piece:
    """Some documents of a segment on disk.

    Attributes:
        store: the datastore's directory, absolute.
        documents: [d] int64, their numbers in the segment, ascending.
    """

    store: str
    record: SegmentRecord
    documents: np.ndarray


@dataclass(frozen=True, slots=True)
class Selection:
    """A segment to be made of documents of older ones."""

    name: str
    pieces: Sequence[Piece]


def stored_digests(store: Path, stored: StoredSegment) -> np.ndarray:
    """Digests [D, 2] uint64 of a segment's documents; where no `digests.bin` is, they are those of its token ids.

    Raises:
        DatastoreError: the file does not fit the segment.
    """
    if DIGESTS not in stored.record.files:
        found = [token_document("", stored.segment.document(d)).digest for d in range(stored.record.documents)]
        return np.frombuffer(b"".join(found), np.uint64).reshape(-1, 2)
    path = store / SEGMENTS / stored.record.name / DIGESTS
    digests = np.fromfile(path, np.uint64)
    if len(digests) != 2 * stored.record.documents:
        raise DatastoreError(
            f"{path} does not fit the segment's other files; restore it, or build the datastore again."
        )
    return digests.reshape(-1, 2)


def load_documents(pieces: Sequence[Piece], spec: SegmentSpec) -> Documents:
    """The documents of several pieces, one piece after the other.

    Raises:
        DatastoreError: a segment is damaged.
    """
    parts = [_load_piece(piece, spec) for piece in pieces]
    lengths = np.concatenate([np.diff(part.offsets) for part in parts])
    shifts = np.cumsum([0, *(len(part.tokens) for part in parts)])[:-1]
    dense = [(part.dense[0] + shift, part.dense[1]) for part, shift in zip(parts, shifts, strict=True) if part.dense]
    return Documents(
        tokens=np.concatenate([part.tokens for part in parts]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        names=[name for part in parts for name in part.names],
        digests=np.concatenate([part.digests for part in parts]),
        dense=(np.concatenate([s for s, _ in dense]), np.concatenate([v for _, v in dense])) if spec.dense else None,
    )


def _load_piece(piece: Piece, spec: SegmentSpec) -> Documents:
    store = Path(piece.store)
    stored = open_segment(store, piece.record, spec.vocab_size, spec.dense.dimension if spec.dense else None)
    tokens, offsets = stored.segment.plain()
    is_kept = np.zeros(len(offsets) - 1, np.bool_)
    is_kept[piece.documents] = True
    lengths = np.diff(offsets)
    # Where each document begins among the kept tokens; meaningless for the others.
    begins = np.cumsum(np.where(is_kept, lengths, 0)) - lengths
    dense = None
    if stored.dense is not None:
        spans = stored.plain_spans()
        document = np.searchsorted(offsets, spans[:, 0], side="right") - 1
        chosen = is_kept[document]
        moved = spans + (begins - offsets[:-1])[document][:, None]
        dense = (moved[chosen], stored.dense.vectors[chosen])
    return Documents(
        tokens=tokens[np.repeat(is_kept, lengths)],
        offsets=np.concatenate([[0], np.cumsum(lengths[is_kept])]),
        names=[stored.names[document] for document in piece.documents.tolist()],
        digests=stored_digests(store, stored)[is_kept],
        dense=dense,
    )
