"""What a Ray task does: one segment, from a chunk of documents or from pieces of older segments, into a work directory.

Knows nothing of the store's manifest and of other segments; whether its work counts is the driver's business.
"""

import os
import shutil
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from datastore.embedder import Embedder
from datastore.format import DenseSpec, SegmentRecord, record_files, write_array, write_record
from datastore.segment import write_segment
from jobs.segments.chunks import Chunk, SegmentSpec
from jobs.segments.documents import DIGESTS, Documents, Selection, load_documents
from jobs.segments.encode import embed_passages, encode_chunk
from pipeline.errors import DatastoreError
from pipeline.models import load_tokenizer, resolve_model, tokenizer_hash


@dataclass(frozen=True, slots=True)
class Recipe:
    """How segments are made.

    Attributes:
        model: whose tokenizer to load, by a name that means the same on every node; None where nothing is tokenised.
        embedder: likewise; None where nothing is embedded.
        device: of the embedder.
        num_threads: threads of one task.
    """

    spec: SegmentSpec
    model: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    embedder: str | None = None
    device: str = "cpu"
    num_threads: int = 1


@dataclass(frozen=True, slots=True)
class Built:
    """A segment in its work directory.

    Attributes:
        record: None if not one of its documents has a token.
        tokenise_seconds, embed_seconds, index_seconds: wall time in the task.
    """

    record: SegmentRecord | None
    tokenise_seconds: float = 0.0
    embed_seconds: float = 0.0
    index_seconds: float = 0.0


def build_segment(recipe: Recipe, chunk: Chunk, directory: str) -> Built:
    """Make a segment of a chunk; documents without a token are left out.

    Args:
        directory: absolute; what an earlier try left there is removed.

    Raises:
        DatastoreError: it cannot be written, or this node's tokenizer or embedder is not the driver's.
        InputError: a document is too long.
    """
    assert recipe.model is not None
    # Before the tokenizer makes its thread pool, which happens once in a process.
    os.environ.update(TOKENIZERS_PARALLELISM="true", RAYON_NUM_THREADS=str(recipe.num_threads))
    spec = recipe.spec
    tokenizer = _tokenizer(recipe.model, recipe.revision, recipe.trust_remote_code, spec.tokenizer)
    began = time.monotonic()
    tokens, lengths = encode_chunk(chunk, tokenizer, spec.vocab_size)
    tokenised = time.monotonic()
    is_kept = lengths > 0
    if not is_kept.any():
        return Built(None, tokenise_seconds=tokenised - began)
    offsets = np.concatenate([[0], np.cumsum(lengths[is_kept])])
    dense = None
    if spec.dense is not None:
        assert recipe.embedder is not None
        embedder = _embedder(recipe.embedder, recipe.device, recipe.num_threads, spec.dense)
        dense = embed_passages(tokens, offsets, spec.dense, tokenizer, embedder)
    embedded = time.monotonic()
    names = [name for name, kept in zip(chunk.names, is_kept, strict=True) if kept]
    record = _write(recipe, Path(directory), Documents(tokens, offsets, names, chunk.digests[is_kept], dense))
    return Built(record, tokenised - began, embedded - tokenised, time.monotonic() - embedded)


def merge_segment(recipe: Recipe, selection: Selection, directory: str) -> Built:
    """Make a segment of documents of older ones; see `build_segment`."""
    began = time.monotonic()
    record = _write(recipe, Path(directory), load_documents(selection.pieces, recipe.spec))
    return Built(record, index_seconds=time.monotonic() - began)


def _write(recipe: Recipe, directory: Path, documents: Documents) -> SegmentRecord:
    shutil.rmtree(directory, ignore_errors=True)
    record = write_segment(
        directory,
        documents.tokens,
        documents.offsets,
        documents.names,
        vocab_size=recipe.spec.vocab_size,
        num_threads=recipe.num_threads,
        dense=documents.dense,
    )
    path = directory / DIGESTS
    try:
        write_array(path, documents.digests)
        files = {**record.files, **record_files(directory, [DIGESTS])}
    except OSError as error:
        raise DatastoreError(
            f"{path} cannot be written: {error}. Free space there; the same command then goes on."
        ) from error
    record = replace(record, files=files)
    write_record(directory, record)
    return record


@lru_cache(maxsize=1)
def _tokenizer(model: str, revision: str | None, trust_remote_code: bool, wanted: str) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(resolve_model(model, revision), trust_remote_code=trust_remote_code)
    if (found := tokenizer_hash(tokenizer)) != wanted:
        raise DatastoreError(
            f"the tokenizer of {model!r} on the node {os.uname().nodename} has the hash {found}, the driver's {wanted}."
            " Put the same files on all nodes."
        )
    return tokenizer


@lru_cache(maxsize=1)
def _embedder(name: str, device: str, num_threads: int, wanted: DenseSpec) -> Embedder:
    embedder = Embedder.load(name, device=device, num_threads=num_threads)
    if embedder.hash != wanted.embedder_hash:
        raise DatastoreError(
            f"the embedder {name!r} on the node {os.uname().nodename} has the hash {embedder.hash}, the datastore's is"
            f" {wanted.embedder_hash}. Put the same files on all nodes."
        )
    return embedder
