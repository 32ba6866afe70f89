"""A datastore opened for reading: suffix lookups over all its segments, and search for similar passages."""

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from datastore.format import DenseSpec, Manifest, check_sizes, read_manifest
from datastore.lookup import MAX_DEPTH, MAX_NODES, MAX_SAMPLES, LookupOptions, SegmentSet
from datastore.segment import StoredSegment, open_segment
from pipeline.errors import DatastoreError
from pipeline.lookup import Lookup

if TYPE_CHECKING:
    from datastore.embedder import Embedder


@dataclass(frozen=True, slots=True)
class Passage:
    """A passage near to a text.

    Attributes:
        score: cosine similarity.
        document: name of its document.
        begin, end: its place among the document's tokens.
        tokens: [n] int32.
    """

    score: float
    document: str
    begin: int
    end: int
    tokens: np.ndarray


class Datastore:
    """An open datastore; made by `open`. Lookups may come from any number of threads."""

    def __init__(self, path: Path, manifest: Manifest, segments: Sequence[StoredSegment]) -> None:
        self.path = path
        self.manifest = manifest
        self._segments = tuple(segments)
        self._set = SegmentSet([stored.segment for stored in segments], manifest.token_dtype)
        self._embedder: Embedder | None = None
        self._embedder_lock = threading.Lock()
        self.lookup([np.zeros(1, np.int32)])  # compiles, or loads what was compiled, before it matters

    @staticmethod
    def open(
        path: str | os.PathLike[str], *, tokenizer: str | None = None, dense: bool = True, preload: bool = True
    ) -> "Datastore":
        """Map a datastore into memory.

        Args:
            tokenizer: hash that its tokens must have been made with, see `pipeline.models.tokenizer_hash`.
            dense: open the passages, too, if it has any.
            preload: read the index once, so that first lookups do not wait for the disk, and see that it is sound.

        Raises:
            DatastoreError: it is missing, incomplete or damaged, of another format, or of another tokenizer.
        """
        store = Path(path)
        manifest = read_manifest(store)
        if tokenizer is not None and tokenizer != manifest.tokenizer:
            raise DatastoreError(
                f"{store} was built with tokenizer {manifest.tokenizer[:16]}, the model has {tokenizer[:16]}. Build a"
                " datastore with this model: rasd datastore build --model MODEL ..."
            )
        check_sizes(store, manifest.segments)
        dimension = manifest.dense.dimension if manifest.dense is not None and dense else None
        segments = [open_segment(store, record, manifest.vocab_size, dimension) for record in manifest.segments]
        if preload:
            for segment in segments:
                segment.preload()
        return Datastore(store, manifest, segments)

    @property
    def segments(self) -> tuple[StoredSegment, ...]:
        """Its segments, oldest first."""
        return self._segments

    @property
    def depth(self) -> int:
        """Longest match that is told from longer ones, in tokens."""
        return self._set.depth

    def lookup(
        self,
        contexts: Sequence[np.ndarray] | Sequence[Sequence[int]] | np.ndarray,
        *,
        max_depth: int = MAX_DEPTH,
        max_samples: int = MAX_SAMPLES,
        max_nodes: int = MAX_NODES,
        min_match: int = 1,
        depths: np.ndarray | None = None,
    ) -> Lookup:
        """Longest match of each context's end, and a counted trie of what followed it.

        Args:
            contexts: B sequences of token ids, the newest last, or [B, L] of them.
            max_depth, max_samples, max_nodes, min_match: see `LookupOptions`.
            depths: [B] deepest node of each, at most `max_depth`.
        """
        options = LookupOptions(max_depth, max_samples, max_nodes, min_match)
        if not isinstance(contexts, np.ndarray):
            contexts = [np.asarray(context, np.int32) for context in contexts]
        return self._set.lookup(contexts, options, depths)

    def search(self, texts: Sequence[str], k: int) -> list[list[Passage]]:
        """The k passages nearest to each text, nearest first.

        Raises:
            DatastoreError: the datastore has no passages, or was built with another embedder of that name.
            ModelError: the embedder cannot be loaded.
        """
        if not texts:
            return []
        if self.manifest.dense is not None and any(stored.dense is None for stored in self._segments):
            raise DatastoreError(f"{self.path} was opened without its passages; open it with dense=True.")
        vectors = self.embedder().encode(texts)
        found: list[list[Passage]] = [[] for _ in texts]
        for stored in self._segments:
            assert stored.dense is not None
            scores, numbers = stored.dense.search(vectors, k)
            for passages, row_scores, row_numbers in zip(found, scores, numbers, strict=True):
                hits = zip(row_scores.tolist(), row_numbers.tolist(), strict=True)
                passages += [_passage(stored, number, score) for score, number in hits if number >= 0]
        return [sorted(passages, key=lambda passage: -passage.score)[:k] for passages in found]

    def embedder(self) -> "Embedder":
        """The encoder its passages were embedded with, loaded when first needed; see `search` for errors."""
        with self._embedder_lock:
            if self._embedder is None:
                self._embedder = _load_embedder(self.path, self.manifest.dense)
            return self._embedder

    def close(self) -> None:
        """Lets go of the mapped files; the datastore must not be used any more."""
        self._segments = ()
        self._set = SegmentSet((), self.manifest.token_dtype)


def _passage(stored: StoredSegment, number: int, score: float) -> Passage:
    assert stored.dense is not None
    begin, end = map(int, stored.dense.spans[number])
    document = int(np.searchsorted(stored.offsets, begin, side="right")) - 1
    start = int(stored.offsets[document])
    return Passage(
        score=float(score),
        document=stored.names[document],
        begin=begin - start,
        end=end - start,
        tokens=np.asarray(stored.tokens[begin:end], np.int32),
    )


def _load_embedder(store: Path, spec: DenseSpec | None) -> "Embedder":
    from datastore.embedder import Embedder  # torch and transformers take seconds to import

    if spec is None:
        raise DatastoreError(f"{store} has no passages (it was built with --dense off). Build it with --dense on.")
    embedder = Embedder.load(spec.embedder)
    if embedder.hash != spec.embedder_hash:
        raise DatastoreError(
            f"{store} was embedded with {spec.embedder} {spec.embedder_hash[:16]}, but here that model is"
            f" {embedder.hash[:16]}. Use the same files, or build the datastore again."
        )
    return embedder
