"""A document: what the suffix index never looks beyond, as a text or as the token ids of a generation."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DIGEST_BYTES = 16
TOKEN_ID = np.dtype("<u4")


@dataclass(frozen=True, slots=True)
class Document:
    """One document.

    Attributes:
        name: the row's id or path, else FILE:ROW; printable, need not be unique.
        content: UTF-8 of the text, or token ids as `TOKEN_ID`.
        is_text: which of the two.
        digest: 16 bytes that two documents share if and only if their contents are equal.
    """

    name: str
    content: bytes
    is_text: bool
    digest: bytes


def text_document(name: str, text: str) -> Document:
    """A document of valid Unicode."""
    content = text.encode()
    return Document(name, content, True, _digest(b"text", content))


def token_document(name: str, ids: Sequence[int] | np.ndarray) -> Document:
    """A document of ids in [0, 2^32)."""
    content = np.asarray(ids, TOKEN_ID).tobytes()
    return Document(name, content, False, _digest(b"tokens", content))


def _digest(kind: bytes, content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES, person=kind).digest()
