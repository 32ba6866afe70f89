"""Which page of the KV pool belongs to whom: allocation, sharing of common prefixes, eviction. No tensors here.

A page holds `page_size` consecutive tokens of one sequence. A page whose tokens are all committed is *published*
under (the page before it, its tokens); any sequence that continues a published chain with the same tokens shares the
page instead of computing it. A page nobody uses stays published until its memory is needed, oldest first, ends before
beginnings. Where a sequence leaves the chain in the middle of a page, it copies the tokens it has in common with it.
Keys compare tokens themselves, so a hash collision cannot mix sequences up.
Source: paged attention (Kwon et al., arXiv 2309.06180) with vLLM's prefix caching.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count, islice

import numpy as np
from numba import njit

ChainKey = tuple[int, bytes]
_ROOT_CHAIN = 0
_MAX_LENDERS = 8  # pages compared for a copy: after a template all of them begin alike
_MIN_BORROWED = 4  # tokens; fewer are computed as fast as copied


@dataclass(slots=True)
class PageRun:
    """The pages of one sequence, in order.

    Attributes:
        pages: page ids, as an array of C integers; token i lies in `pages[i // page_size]`.
        num_published: leading pages whose content is known to the pool (shared, or published by this run).
        chain: identity of the content of those leading pages.
    """

    pages: "array[int]" = field(default_factory=lambda: array("i"))
    num_published: int = 0
    chain: int = _ROOT_CHAIN

    @classmethod
    def of(cls, pages: Iterable[int]) -> "PageRun":
        """Pages of which the pool knows nothing."""
        return cls(array("i", pages))


class PagePool:
    """Bookkeeping for `num_pages` pages of `page_size` tokens."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._users = [0] * num_pages
        self._idle: OrderedDict[int, None] = OrderedDict((page, None) for page in range(num_pages))
        self._published: dict[ChainKey, tuple[int, int]] = {}  # key -> (page, chain id)
        self._key_of: dict[int, ChainKey] = {}
        self._chain_ids = count(_ROOT_CHAIN + 1)
        self._lenders: dict[int, dict[int, np.ndarray]] = {}  # chain -> pages that follow it -> their committed tokens
        self._chain_before: dict[int, int] = {}  # lending page -> the chain it follows

    @property
    def num_idle(self) -> int:
        """Pages that can be had now: never used, or published and unused."""
        return len(self._idle)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens need."""
        return -(-num_tokens // self.page_size)

    def grow(self, run: PageRun, num_tokens: int) -> bool:
        """Gives `run` room for `num_tokens` tokens in all; False, and no change, if the pool has too few idle pages."""
        missing = self.pages_for(num_tokens) - len(run.pages)
        if missing > len(self._idle):
            return False
        for _ in range(missing):
            page, _none = self._idle.popitem(last=False)
            self._forget(page)
            self._users[page] = 1
            run.pages.append(page)
        return True

    def share(self, run: PageRun, tokens: np.ndarray, num_cached: int) -> int:
        """Attaches published pages that continue `run`, leaving at least the last token to be computed.

        Args:
            run: holds `num_cached` tokens; nothing is shared unless those end at the last published page.
            tokens: [L] int32, the whole known sequence.

        Returns:
            Tokens cached afterwards.
        """
        size = self.page_size
        if num_cached != run.num_published * size:
            return num_cached
        while num_cached + size < len(tokens):
            hit = self._published.get((run.chain, tokens[num_cached : num_cached + size].tobytes()))
            if hit is None:
                break
            page, chain = hit
            for spare in run.pages[run.num_published :]:  # room grown for tokens that need no computing now
                self._release_page(spare)
            del run.pages[run.num_published :]
            self._users[page] += 1
            self._idle.pop(page, None)
            run.pages.append(page)
            run.num_published += 1
            run.chain = chain
            num_cached += size
        return num_cached

    def borrow(self, run: PageRun, tokens: np.ndarray, num_cached: int) -> tuple[int, int, int] | None:
        """A page whose first tokens continue `run`, to be copied into a new page of it, after `share` found no more.

        Returns:
            (source, target, n): pool token indices of n tokens and of their new place; None if nothing can be copied.
        """
        size = self.page_size
        if num_cached != run.num_published * size or len(run.pages) != run.num_published:
            return None
        wanted = tokens[num_cached : min(num_cached + size, len(tokens) - 1)]
        lenders = islice(reversed(self._lenders.get(run.chain, {}).items()), _MAX_LENDERS)
        length, page = max(((_common_length(wanted, lent), page) for page, lent in lenders), default=(0, -1))
        if length < _MIN_BORROWED or not self.grow(run, num_cached + length):
            return None
        return page * size, run.pages[-1] * size, length

    def next_key(self, run: PageRun, tokens: np.ndarray) -> ChainKey | None:
        """Key of the first page of `run` that is not published yet; None if `tokens` do not fill it."""
        begin = run.num_published * self.page_size
        end = begin + self.page_size
        return (run.chain, tokens[begin:end].tobytes()) if end <= len(tokens) else None

    def is_filling(self, run: PageRun, num_tokens: int) -> bool:
        """Whether `publish` of so many tokens would change no more than what is lent of the page being filled."""
        return num_tokens < (run.num_published + 1) * self.page_size

    def publish(self, run: PageRun, tokens: np.ndarray) -> None:
        """Publishes the pages of `run` that the committed `tokens` ([L] int32) fill, and lends the one being filled."""
        while (key := self.next_key(run, tokens)) is not None:
            page = run.pages[run.num_published]
            hit = self._published.get(key)
            if hit is None:
                hit = (page, next(self._chain_ids))
                self._published[key] = hit
                self._key_of[page] = key
                self._lend(page, run.chain, tokens[run.num_published * self.page_size :][: self.page_size])
            run.num_published += 1
            run.chain = hit[1]
        tail = tokens[run.num_published * self.page_size :]
        if len(tail) >= _MIN_BORROWED:
            self._lend(run.pages[run.num_published], run.chain, tail)

    def release(self, run: PageRun) -> None:
        """Gives all pages back; published ones stay findable until their memory is needed."""
        for page in reversed(run.pages):
            self._release_page(page)
        del run.pages[:]
        run.num_published = 0
        run.chain = _ROOT_CHAIN

    def _release_page(self, page: int) -> None:
        self._users[page] -= 1
        if self._users[page] == 0:
            self._idle[page] = None
            if page not in self._key_of and page not in self._chain_before:  # of no use to anyone: taken first
                self._idle.move_to_end(page, last=False)

    def _forget(self, page: int) -> None:
        key = self._key_of.pop(page, None)
        if key is not None:
            del self._published[key]
        chain = self._chain_before.pop(page, None)
        if chain is not None:
            del self._lenders[chain][page]
            if not self._lenders[chain]:
                del self._lenders[chain]

    def _lend(self, page: int, chain: int, tokens: np.ndarray) -> None:
        self._chain_before[page] = chain
        self._lenders.setdefault(chain, {})[page] = tokens.copy()


def _common_length(a: np.ndarray, b: np.ndarray) -> int:
    """Tokens that two sequences begin with in common."""
    length = min(len(a), len(b))
    differs = np.flatnonzero(a[:length] != b[:length])
    return int(differs[0]) if len(differs) else length


def block_table(runs: Sequence[PageRun]) -> np.ndarray:
    """[S, B] int32 page ids, padded with 0."""
    counts = np.array([len(run.pages) for run in runs], np.int64)
    table: np.ndarray = _table(np.frombuffer(b"".join([run.pages for run in runs]), np.intc), counts)
    return table


@njit(cache=True, nogil=True)
def _table(pages: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[S, B] int32 of all pages, run by run, and how many each run has."""
    table = np.zeros((len(counts), counts.max() if len(counts) else 0), np.int32)
    at = 0
    for run in range(len(counts)):
        table[run, : counts[run]] = pages[at : at + counts[run]]
        at += counts[run]
    return table
