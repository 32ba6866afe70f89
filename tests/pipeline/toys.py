"""A toy target with known outputs that checks its cache on every read, and random trees."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from hypothesis import strategies as st

from pipeline.packing import Run, Runs
from pipeline.pages import PageRun
from pipeline.target import Forward
from pipeline.tree import SOURCES, TokenTree


class ToyDecoder:
    """Tokens are bytes; ids above 255 are special tokens without text."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str | list[str]:
        assert skip_special_tokens
        return bytes(token for token in token_ids if token < 256).decode(errors="replace")


@st.composite
def trees(draw: st.DrawFn, max_nodes: int = 12, vocabulary: int = 4) -> TokenTree:
    """Trees with parents before children and siblings of distinct tokens, scores and sources included."""
    tokens: list[int] = []
    parents: list[int] = []
    for _ in range(draw(st.integers(0, max_nodes))):
        parent = draw(st.integers(-1, len(tokens) - 1))
        token = draw(st.integers(0, vocabulary - 1))
        if (parent, token) not in zip(parents, tokens, strict=True):
            parents.append(parent)
            tokens.append(token)
    n = len(tokens)
    score = draw(
        st.sampled_from((st.floats(0, 1, width=32), st.sampled_from((0.25, 0.5, 1.0))))
    )  # some trees with ties
    scores = draw(st.lists(score, min_size=n, max_size=n))
    sources = draw(st.lists(st.integers(0, len(SOURCES) - 1), min_size=n, max_size=n))
    matches = draw(st.lists(st.integers(0, 40), min_size=n, max_size=n))
    return TokenTree.proposed(
        np.array(tokens, np.int32),
        np.array(parents, np.int32),
        np.array(scores, np.float32),
        np.array(sources, np.int8),
        np.array(matches, np.int16),
    )


def path_of(tree: TokenTree, node: int) -> tuple[int, ...]:
    """Tokens from the root's child to `node`."""
    tokens: list[int] = []
    while node >= 0:
        tokens.append(int(tree.tokens[node]))
        node = int(tree.parents[node])
    return tuple(reversed(tokens))


def runs_of(columns: Runs, page_size: int) -> list[Run]:
    """One by one, with the pages that each needs."""
    runs: list[Run] = []
    at_known, at_node = 0, 0
    for i in range(len(columns)):
        known = columns.known[at_known : at_known + columns.num_known[i]]
        nodes = slice(at_node, at_node + columns.num_nodes[i])
        at_known, at_node = at_known + len(known), nodes.stop
        tree = TokenTree.of(columns.tokens[nodes].tolist(), columns.parents[nodes].tolist(), "draft")
        cached = int(columns.cached[i])
        num_pages = -(-(cached + len(known) + len(tree)) // page_size)
        pages = PageRun.of(columns.block_table[i, :num_pages].tolist())
        wants_logits, num_done = bool(columns.wants_logits[i]), int(columns.num_done[i])
        runs.append(Run(known, tree, cached, pages, wants_logits, num_done))
    assert (at_known, at_node) == (len(columns.known), len(columns.tokens))
    return runs


@dataclass(frozen=True, slots=True)
class Entry:
    """What the toy keeps of one token in its cache: the whole prefix it was computed for, itself included."""

    prefix: tuple[int, ...]


class ToyTarget:
    """Stands in for `pipeline.target.Target`: the next token is a function of the whole prefix, read from the pages.

    Every cached token carries the prefix it was computed for, so a page that is shared, moved or reused wrongly is
    caught when it is read.

    Args:
        vocabulary: few tokens repeat themselves soon, which is what context lookup drafts from.
    """

    def __init__(self, num_pages: int, page_size: int, vocabulary: int = 5) -> None:
        self.vocabulary = vocabulary
        self.config = SimpleNamespace(vocab_size=vocabulary)
        self.device = torch.device("cpu")
        self.page_size = page_size
        self.num_pages = num_pages
        self.is_shared = False
        self.cache = SimpleNamespace(page_size=page_size)
        self.num_computed = 0
        self.num_forwards = 0
        self.longest_prefill = 0
        self._pool: list[Entry | None] = [None] * (num_pages * page_size)

    def next_token(self, prefix: Sequence[int]) -> int:
        """Mostly the token that followed the last two modulo a cycle, now and then a surprise from the whole prefix."""
        digest = hash(tuple(prefix)) % 8
        return (prefix[-1] + 1 + (digest == 0)) % self.vocabulary

    def continuation(self, prompt: Sequence[int], length: int) -> list[int]:
        """Plain decoding of `length` tokens."""
        known = list(prompt)
        for _ in range(length):
            known.append(self.next_token(known))
        return known[len(prompt) :]

    def forward(self, columns: Runs) -> Forward:
        """Checks what is cached, writes what is new and gives one-hot logits."""
        runs = runs_of(columns, self.page_size)
        self.num_forwards += 1
        self.longest_prefill = max(self.longest_prefill, sum(len(run.known) for run in runs if len(run.known) > 1))
        logits: list[torch.Tensor] = []
        begin: list[int] = []
        self._check_places(runs)
        for run in runs:
            begin.append(len(logits) if run.wants_logits else -1)
            prefixes = self._prefixes(run)
            for index, prefix in enumerate(prefixes, run.cached):
                self._pool[self._place(run, index)] = Entry(prefix)
            self.num_computed += len(prefixes)
            if run.wants_logits:
                logits += [self._one_hot(prefix) for prefix in prefixes[len(run.known) - 1 :]]
        return Forward(torch.stack(logits) if logits else torch.empty(0, self.vocabulary), np.array(begin, np.int64))

    def _prefixes(self, run: Run) -> list[tuple[int, ...]]:
        """The prefix of each known token and tree node, after a check of the cached ones."""
        cached: tuple[int, ...] = ()
        for index in range(run.cached):
            entry = self._pool[self._place(run, index)]
            assert entry is not None, f"token {index} was never computed"
            assert entry.prefix[:-1] == cached, f"token {index} was computed for another prefix"
            cached = entry.prefix
        prefixes: list[tuple[int, ...]] = []
        for token in run.known.tolist():
            cached = (*cached, token)
            prefixes.append(cached)
        return prefixes + [(*cached, *path_of(run.tree, node)) for node in range(len(run.tree))]

    def _check_places(self, runs: list[Run]) -> None:
        """No two runs write to one page, and none writes to a page that another reads."""
        written: set[int] = set()
        for run in runs:
            pages = set(run.pages.pages[run.cached // self.page_size :])
            assert not pages & written, "two runs own one page"
            written |= pages
        for run in runs:
            assert not written & set(run.pages.pages[: run.cached // self.page_size]), "a shared page is written to"

    def _place(self, run: Run, index: int) -> int:
        return run.pages.pages[index // self.page_size] * self.page_size + index % self.page_size

    def _one_hot(self, prefix: tuple[int, ...]) -> torch.Tensor:
        row = torch.zeros(self.vocabulary)
        row[self.next_token(prefix)] = 1.0
        return row

    def move(self, source: np.ndarray, target: np.ndarray) -> None:
        entries = [self._pool[place] for place in source.tolist()]
        for place, entry in zip(target.tolist(), entries, strict=True):
            self._pool[place] = entry
