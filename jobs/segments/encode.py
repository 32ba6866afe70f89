"""A chunk's documents as tokens, and its passages as vectors."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from transformers import PreTrainedTokenizerBase

from datastore.embedder import Embedder
from datastore.format import DenseSpec, token_dtype
from datastore.passages import passage_spans
from jobs.corpus.document import TOKEN_ID
from jobs.segments.chunks import Chunk
from pipeline.errors import DatastoreError, InputError

MAX_DOCUMENT_TOKENS = 1 << 31

# Texts tokenised by one call: enough for all threads, and the tokenizer's own records of them stay small.
_BATCH_CHARACTERS = 1 << 21
# A longer text is tokenised piece by piece: a tokenizer takes about a hundred bytes a token.
PIECE_CHARACTERS = 1 << 22
_PASSAGES_A_BATCH = 2048


def encode_chunk(chunk: Chunk, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokenise a chunk's texts, no special tokens added, and take its token ids as they are.

    A text above 4 Mi characters is cut after line ends first, where its tokens may differ from those of the whole.

    Returns:
        Tokens [n] of `token_dtype(vocab_size)`, and lengths [D] int64 of the documents.

    Raises:
        InputError: a document has 2^31 tokens or more.
        DatastoreError: token ids are outside the vocabulary.
    """
    dtype = token_dtype(vocab_size)
    lengths = np.zeros(len(chunk.names), np.int64)
    parts = [np.empty(0, dtype)]
    for document, ids in _encoded(chunk, tokenizer):
        if len(ids) and ids.max() >= vocab_size:
            raise DatastoreError(
                f"the document {chunk.names[document]} has the token id {ids.max()}, outside the vocabulary of"
                f" {vocab_size}. Name the model that made it."
            )
        lengths[document] += len(ids)
        parts.append(ids.astype(dtype))
    if int(lengths.max()) >= MAX_DOCUMENT_TOKENS:
        name = chunk.names[int(lengths.argmax())]
        raise InputError(f"the document {name} has {int(lengths.max()):,} tokens, 2^31 or more; cut it into several.")
    return np.concatenate(parts), lengths


def embed_passages(
    tokens: np.ndarray, offsets: np.ndarray, spec: DenseSpec, tokenizer: PreTrainedTokenizerBase, embedder: Embedder
) -> tuple[np.ndarray, np.ndarray]:
    """Cut documents into passages and embed the text that each one's tokens stand for.

    Args:
        tokens, offsets: see `datastore.segment.build_segment`.

    Returns:
        Spans [P, 2] uint32 in `tokens`, and vectors [P, dimension] float16.
    """
    spans = passage_spans(offsets, spec.passage_tokens, spec.overlap)
    vectors = np.empty((len(spans), spec.dimension), np.float16)
    for begin in range(0, len(spans), _PASSAGES_A_BATCH):
        batch = spans[begin : begin + _PASSAGES_A_BATCH].tolist()
        texts = [str(tokenizer.decode(tokens[first:last].tolist())) for first, last in batch]
        vectors[begin : begin + len(batch)] = embedder.encode(texts)
    return spans, vectors


def _encoded(chunk: Chunk, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, np.ndarray]]:
    """Document numbers and ids, in order; a long document comes in pieces."""
    batch, size = list[tuple[int, str]](), 0
    for document, piece in _pieces(chunk):
        if isinstance(piece, str):
            batch.append((document, piece))
            size += len(piece)
            if size < _BATCH_CHARACTERS:
                continue
        yield from _tokenised(batch, tokenizer)
        batch, size = [], 0
        if not isinstance(piece, str):
            yield document, piece
    yield from _tokenised(batch, tokenizer)


def _tokenised(
    batch: Sequence[tuple[int, str]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[int, np.ndarray]]:
    if not batch:
        return
    texts = [text for _, text in batch]
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    for (document, _), ids in zip(batch, encoded["input_ids"], strict=True):
        yield document, np.array(ids, TOKEN_ID)


def _pieces(chunk: Chunk) -> Iterator[tuple[int, str | np.ndarray]]:
    """Document numbers, and their texts, long ones cut after line ends, or token ids."""
    for document, (begin, end) in enumerate(pairwise([0, *chunk.ends.tolist()])):
        content = chunk.content[begin:end].tobytes()
        if not chunk.is_text[document]:
            yield document, np.frombuffer(content, TOKEN_ID)
            continue
        text, start = content.decode(), 0
        while len(text) - start > PIECE_CHARACTERS:
            stop = text.rfind("\n", start, start + PIECE_CHARACTERS) + 1 or start + PIECE_CHARACTERS
            yield document, text[start:stop]
            start = stop
        yield document, text[start:]
