"""A corpus: all documents that a user names, one after the other, and what of it was left out."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from actors.rows import RowFailure
from jobs.corpus.digest_set import DigestSet
from jobs.corpus.document import Document
from jobs.corpus.formats import corpus_formats
from jobs.corpus.generations import PREFIX, GenerationSource
from jobs.corpus.rows import RowSource, chat_renderer
from jobs.sources import find_readers
from pipeline.errors import InputError

log = logging.getLogger(__name__)


class Source(Protocol):
    """One file, data set or generation job."""

    name: str

    def documents(self) -> Iterator[Document | RowFailure]:
        """Its documents and bad rows, in order.

        Raises:
            InputError: it cannot be read.
        """


class Corpus:
    """Documents of several sources; counts what it leaves out while it is read.

    Attributes:
        num_sources, num_read: sources, and how many of them are read to the end.
        num_documents: given so far.
        num_duplicates: documents left out because they were seen before.
        skipped: rows left out because they are bad, by the kind of error.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self.num_sources = len(sources)
        self.num_read = 0
        self.num_documents = 0
        self.num_duplicates = 0
        self.skipped: Counter[str] = Counter()

    def documents(self, seen: DigestSet) -> Iterator[Document]:
        """All documents but duplicates, in the order of their sources; one is in memory at a time.

        Args:
            seen: documents that count as duplicates; those given are added.

        Raises:
            InputError: a source cannot be read, or not one row of them all is usable.
        """
        for source in self._sources:
            for found in source.documents():
                if isinstance(found, RowFailure):
                    self._skip(found)
                elif seen.add(found.digest):
                    self.num_documents += 1
                    yield found
                else:
                    self.num_duplicates += 1
            self.num_read += 1
        if not self.num_documents and not self.num_duplicates:
            kinds = ", ".join(f"{count} x {kind}" for kind, count in self.skipped.most_common())
            names = ", ".join(source.name for source in self._sources[:5])
            raise InputError(
                f"there is no usable document in {names} ({kinds or 'no row at all'}). Check the corpus and"
                " --text-column."
            )

    def _skip(self, failure: RowFailure) -> None:
        self.skipped[failure.error_type] += 1
        if self.skipped[failure.error_type] == 1:
            log.warning("skipped (%s, the first of its kind): %s", failure.error_type, failure.message)


def open_corpus(
    specs: Sequence[str], *, text_column: str, is_chat: bool, tokenizer: PreTrainedTokenizerBase, tokenizer_hash: str
) -> Corpus:
    """Find the sources: files and data sets sorted by path, then generation jobs, sorted too.

    Args:
        specs: files, directories, patterns, data sets, or `generations:DIR`.
        is_chat: rows hold `messages`, written as the tokenizer's chat template says.

    Raises:
        InputError: something named does not exist or cannot be read.
        DatastoreError: a generation job had another tokenizer.
        ModelError: there is no chat template.
    """
    jobs = sorted({spec.removeprefix(PREFIX) for spec in specs if spec.startswith(PREFIX)})
    paths = [spec for spec in specs if not spec.startswith(PREFIX)]
    render = chat_renderer(tokenizer) if is_chat else None
    column = "messages" if is_chat else text_column
    readers = find_readers(paths, corpus_formats(text_column)) if paths else ()
    return Corpus(
        [
            *(RowSource(reader, column, render) for reader in readers),
            *(GenerationSource(job, tokenizer_hash) for job in jobs),
        ]
    )
