"""Where the passages of a segment begin and end; knows token positions only, neither texts nor vectors."""

import numpy as np

from pipeline.errors import ConfigError


def passage_spans(offsets: np.ndarray, size: int, overlap: int) -> np.ndarray:
    """Cut documents into passages that cover all of their tokens and never cross a document's end.

    Passages of a document follow each other every `size - overlap` tokens. Its last one ends with the document and is
    moved back to full size, so that it overlaps its neighbour more instead of being short; only documents shorter than
    `size` have a shorter passage, their only one. Empty documents have none.

    Args:
        offsets: [D+1] int64, where each of D documents begins, and the end of the last.
        size: tokens of a passage, at least 1.
        overlap: tokens shared by neighbours, below `size`.

    Returns:
        [P, 2] uint32, begin and end of each passage, in the documents' order.

    Raises:
        ConfigError: `size` or `overlap` is out of range.
    """
    if not 0 <= overlap < size:
        raise ConfigError(
            f"Passages of {size} tokens with an overlap of {overlap} are not possible: "
            "the size must be at least 1, the overlap at least 0 and below the size."
        )
    begins, lengths = offsets[:-1], np.diff(offsets)
    stride = size - overlap
    counts = np.where(lengths > size, 1 - (size - lengths) // stride, lengths > 0)
    document = np.repeat(np.arange(len(counts)), counts)
    place = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    last = np.maximum(offsets[1:] - size, begins)
    begin = np.minimum(begins[document] + place * stride, last[document])
    end = np.minimum(begin + size, offsets[1:][document])
    return np.stack([begin, end], axis=1).astype(np.uint32)
