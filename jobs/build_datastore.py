"""`rasd datastore build` and `append`: documents in, a datastore out, on a Ray cluster; resumable, duplicates dropped.

rasd datastore build --model smollm2-135m --corpus docs/ rows.jsonl --output store
ray job submit --working-dir . -- python -m jobs.build_datastore --model ... --corpus ... --output ...

The driver streams documents and cuts them into chunks; tasks make segments of these. The same command again reads the
corpus once more, which is cheap, and makes only the segments that are not there; `manifest.json` comes last.
"""

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from datastore.format import Manifest, SegmentRecord, read_manifest
from datastore.segment import open_segment
from jobs.corpus.corpus import Corpus, open_corpus
from jobs.corpus.digest_set import DigestSet
from jobs.datastore_config import AppendConfig, BuildConfig, CorpusConfig
from jobs.segments.chunks import Chunk, SegmentSpec, cut_chunks
from jobs.segments.documents import stored_digests
from jobs.segments.facts import Vocabulary, check_embedder, dense_spec, load_vocabulary, recipe_of
from jobs.segments.making import Made, OpenPool, make_segments
from jobs.segments.pool import ray_pool
from jobs.segments.progress import SegmentProgress
from jobs.segments.report import corpus_outcome, log_outcome, outcome, print_outcome
from jobs.segments.store import (
    StoreWriter,
    check_published,
    next_number,
    repaired,
    store_directory,
    writing_store,
)
from jobs.segments.task import Recipe, build_segment
from jobs.signals import StopSignals
from pipeline.errors import DatastoreError, InputError


def build(config: BuildConfig, open_pool: OpenPool | None = None) -> int:
    """Build a datastore, or what is left of it; returns the exit code.

    Args:
        open_pool: where segments are made; None for the Ray cluster that the configuration names.

    Raises:
        RasdError: see `pipeline.errors` for the kinds; complete segments stay.
    """
    began = time.monotonic()
    path = store_directory(config.output)
    vocabulary = load_vocabulary(config)
    corpus = _open_corpus(config, vocabulary)
    dense = dense_spec(config)
    spec = SegmentSpec(vocabulary.hash, vocabulary.size, dense)
    recipe = recipe_of(config, vocabulary, spec, dense.embedder if dense else None)
    signals = StopSignals()
    with writing_store(path) as store:
        store.begin(_fingerprint(config, spec))
        before = store.manifest()
        chunks = cut_chunks(corpus.documents(DigestSet()), spec, config.segment_tokens)
        if before is not None:
            chunks = check_published(chunks, before, path)
        made = _make(config, corpus, chunks, recipe, store, signals, open_pool)
        segments = made.segments if before is None else before.segments
        if signals.received is None:
            if not segments:
                raise InputError("not one document of the corpus has a token. Check the corpus and --text-column.")
            if before is None:
                store.publish(Manifest(spec.tokenizer, spec.vocab_size, spec.dense, segments))
            elif made.built:  # segments that had been damaged: other bytes may have come out
                segments = repaired(before, made.segments)
                store.publish(replace(before, segments=segments))
    is_complete = before is not None and not made.built
    return _finish(config, corpus, made, segments, signals, began, is_complete=is_complete)


def append(config: AppendConfig, open_pool: OpenPool | None = None) -> int:
    """Add the documents that a datastore does not have yet; until they are all there, readers see the old one.

    Raises:
        DatastoreError: there is no complete datastore, or it has another tokenizer or embedder.
        RasdError: see `build`.
    """
    began = time.monotonic()
    path = store_directory(config.output)
    read_manifest(path)  # before a directory is made
    vocabulary = load_vocabulary(config)
    corpus = _open_corpus(config, vocabulary)
    signals = StopSignals()
    with writing_store(path) as store:
        store.clean()
        before = read_manifest(path)
        if before.tokenizer != vocabulary.hash or before.vocab_size != vocabulary.size:
            raise DatastoreError(
                f"{path} was built with tokenizer {before.tokenizer} and a vocabulary of {before.vocab_size};"
                f" {config.model} has {vocabulary.hash} and {vocabulary.size}. Name the model it was built with."
            )
        spec = SegmentSpec(before.tokenizer, before.vocab_size, before.dense)
        embedder = check_embedder(before.dense, config.embedder or before.dense.embedder) if before.dense else None
        recipe = recipe_of(config, vocabulary, spec, embedder)
        documents = corpus.documents(_known_documents(store, before))
        chunks = cut_chunks(documents, spec, config.segment_tokens, next_number(before))
        made = _make(config, corpus, chunks, recipe, store, signals, open_pool)
        segments = before.segments
        if made.segments and signals.received is None:
            segments += made.segments
            store.publish(replace(before, segments=segments))
    return _finish(config, corpus, made, segments, signals, began, is_complete=not made.segments)


def _open_corpus(config: CorpusConfig, vocabulary: Vocabulary) -> Corpus:
    return open_corpus(
        config.corpus,
        text_column=config.text_column,
        is_chat=config.chat,
        tokenizer=vocabulary.tokenizer,
        tokenizer_hash=vocabulary.hash,
    )


def _fingerprint(config: BuildConfig, spec: SegmentSpec) -> dict[str, Any]:
    """What fixes a datastore's content but for the bytes of its corpus, which the segments' names tell apart."""
    dense = {f"dense {key}": value for key, value in asdict(spec.dense).items()} if spec.dense else {}
    return {
        "corpus": sorted(set(config.corpus)),
        "text_column": config.text_column,
        "chat": config.chat,
        "segment_tokens": config.segment_tokens,
        "tokenizer": spec.tokenizer,
        "vocab_size": spec.vocab_size,
        "dense": config.dense,
        **dense,
    }


def _known_documents(store: StoreWriter, manifest: Manifest) -> DigestSet:
    """Digests of all documents that are there already."""
    known = DigestSet()
    for record in manifest.segments:
        known.add_all(stored_digests(store.path, open_segment(store.path, record, manifest.vocab_size)))
    return known


def _make(
    config: CorpusConfig,
    corpus: Corpus,
    chunks: Iterable[Chunk],
    recipe: Recipe,
    store: StoreWriter,
    signals: StopSignals,
    open_pool: OpenPool | None,
) -> Made:
    wants_gpus = recipe.spec.dense is not None
    on_ray = partial(ray_pool, config.ray_address, config.num_threads, wants_gpus=wants_gpus)
    progress = SegmentProgress(corpus.num_sources, is_quiet=config.quiet)

    def show(made: Made) -> None:
        progress.show(corpus.num_read, corpus.num_documents, made)

    with progress.shown():
        return make_segments(chunks, build_segment, recipe, store, open_pool or on_ray, signals, show)


def _finish(
    config: CorpusConfig,
    corpus: Corpus,
    made: Made,
    segments: Sequence[SegmentRecord],
    signals: StopSignals,
    began: float,
    *,
    is_complete: bool,
) -> int:
    is_stopped = signals.received is not None
    state = "stopped" if is_stopped else "complete" if is_complete else "done"
    record = outcome(state, segments, made, time.monotonic() - began)
    record |= {**corpus_outcome(corpus, made, is_whole=not is_stopped), "output": config.output}
    print_outcome(record, is_quiet=config.quiet)
    log_outcome(state, config.output, signals)
    return signals.exit_code


if __name__ == "__main__":
    from jobs.cli import main as rasd

    sys.exit(rasd(["datastore", "build", *sys.argv[1:]]))
