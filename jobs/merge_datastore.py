"""`rasd datastore merge`: several datastores as a new one of fewer, larger segments; resumable, duplicates dropped.

rasd datastore merge old/ new/ --output both

Nothing is tokenised or embedded again: documents and vectors are taken as they are, and their segments indexed anew.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np

from datastore.format import Manifest, SegmentRecord, check_digests, read_manifest
from datastore.segment import open_segment
from jobs.corpus.digest_set import DigestSet
from jobs.datastore_config import MergeConfig
from jobs.segments.chunks import SegmentSpec, segment_name
from jobs.segments.documents import Piece, Selection, stored_digests
from jobs.segments.making import OpenPool, make_segments
from jobs.segments.pool import ray_pool
from jobs.segments.progress import SegmentProgress
from jobs.segments.report import log_outcome, outcome, print_outcome
from jobs.segments.store import check_published, repaired, store_directory, writing_store
from jobs.segments.task import Recipe, merge_segment
from jobs.signals import StopSignals
from pipeline.errors import ConfigError, DatastoreError


def merge(config: MergeConfig, inputs: Sequence[str], open_pool: OpenPool | None = None) -> int:
    """Merge datastores; returns the exit code.

    Args:
        inputs: their directories; segments keep this order.
        open_pool: see `jobs.build_datastore.build`.

    Raises:
        DatastoreError: one is missing or damaged, or they do not fit each other.
        RasdError: see `pipeline.errors`; complete segments stay.
    """
    began = time.monotonic()
    path = store_directory(config.output)
    stores = [Path(name).expanduser().absolute() for name in inputs]
    if path.absolute() in stores:
        raise ConfigError(f"--output is {config.output!r}, one of the datastores to merge; choose a new directory.")
    manifests = [read_manifest(store) for store in stores]
    spec = _common_spec(stores, manifests)
    merging = _Merging(stores, manifests, spec, config.segment_tokens)
    on_ray = partial(ray_pool, config.ray_address, config.num_threads, wants_gpus=False)
    signals = StopSignals()
    with writing_store(path) as store:
        store.begin(
            {"merged": [manifest.fingerprint for manifest in manifests], "segment_tokens": config.segment_tokens}
        )
        before = store.manifest()
        wanted = merging.selections() if before is None else check_published(merging.selections(), before, path)
        progress = SegmentProgress(merging.num_segments, is_quiet=config.quiet)
        with progress.shown():
            made = make_segments(
                wanted,
                merge_segment,
                Recipe(spec),
                store,
                open_pool or on_ray,
                signals,
                lambda made: progress.show(merging.num_read, merging.num_documents, made),
            )
        segments = made.segments if before is None else before.segments
        if signals.received is None and before is None:
            store.publish(Manifest(spec.tokenizer, spec.vocab_size, spec.dense, segments))
        elif signals.received is None and before is not None and made.built:
            segments = repaired(before, made.segments)
            store.publish(replace(before, segments=segments))
    is_complete = before is not None and not made.built
    state = "stopped" if signals.received is not None else "complete" if is_complete else "done"
    record = outcome(state, segments, made, time.monotonic() - began)
    record |= {"duplicates": merging.num_duplicates, "output": config.output}
    print_outcome(record, is_quiet=config.quiet)
    log_outcome(state, config.output, signals)
    return signals.exit_code


class _Merging:
    """Chooses which documents of which segments each new segment is made of, reading as it goes."""

    def __init__(self, stores: Sequence[Path], manifests: Sequence[Manifest], spec: SegmentSpec, tokens: int) -> None:
        self._inputs = [
            (store, record) for store, manifest in zip(stores, manifests, strict=True) for record in manifest.segments
        ]
        self._spec = spec
        self._tokens = tokens
        self._seen = DigestSet()
        self.num_segments = len(self._inputs)
        self.num_read = 0
        self.num_documents = 0
        self.num_duplicates = 0

    def selections(self) -> Iterator[Selection]:
        """The new segments, in order; a document longer than a segment is one of its own."""
        pieces: list[Piece] = []
        digests: list[np.ndarray] = []
        names: list[str] = []
        free, number = self._tokens, 0
        for store, record in self._inputs:
            documents, lengths, found, their_names = self._new_documents(store, record)
            begin = 0
            while begin < len(documents):
                ends = np.cumsum(lengths[begin:])
                count = int(np.searchsorted(ends, free, side="right"))
                if count == 0 and not pieces:
                    count = 1
                if count:
                    end = begin + count
                    pieces.append(Piece(str(store), record, documents[begin:end]))
                    digests.append(found[begin:end])
                    names += their_names[begin:end]
                    free -= int(ends[count - 1])
                    begin = end
                if begin < len(documents):
                    yield self._selection(number, pieces, digests, names)
                    pieces, digests, names = [], [], []
                    free, number = self._tokens, number + 1
            self.num_read += 1
        if pieces:
            yield self._selection(number, pieces, digests, names)

    def _selection(
        self, number: int, pieces: Sequence[Piece], digests: Sequence[np.ndarray], names: Sequence[str]
    ) -> Selection:
        return Selection(segment_name(number, self._spec, np.concatenate(digests), names), pieces)

    def _new_documents(
        self, store: Path, record: SegmentRecord
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
        """Numbers [d], lengths [d], digests [d, 2] and names of a segment's documents that were not seen before."""
        if problems := check_digests(store, [record]):  # or damage would get checksums of its own
            raise DatastoreError(f"{problems[0]}. Restore the file, or build {store} again.")
        stored = open_segment(store, record, self._spec.vocab_size)
        digests = stored_digests(store, stored)
        documents = np.flatnonzero(self._seen.add_all(digests))
        self.num_documents += len(documents)
        self.num_duplicates += len(digests) - len(documents)
        lengths = np.diff(stored.offsets)[documents] - 1  # a separator ends each
        return documents, lengths, digests[documents], [stored.names[d] for d in documents.tolist()]


def _common_spec(stores: Sequence[Path], manifests: Sequence[Manifest]) -> SegmentSpec:
    first = manifests[0]
    for store, manifest in zip(stores[1:], manifests[1:], strict=True):
        for key in ("tokenizer", "vocab_size"):
            if getattr(manifest, key) != getattr(first, key):
                raise DatastoreError(
                    f"{store} has the {key} {getattr(manifest, key)}, {stores[0]} has {getattr(first, key)}."
                    " Only datastores of one tokenizer can be merged; build them again with one --model."
                )
        ours, theirs = ({**asdict(m.dense), "embedder": None} if m.dense else None for m in (first, manifest))
        if ours != theirs:
            raise DatastoreError(
                f"{store} has other passages, {manifest.dense}, than {stores[0]}, {first.dense}. Build one of them"
                " again with the other's options."
            )
    return SegmentSpec(first.tokenizer, first.vocab_size, first.dense)
