"""Lookups become scored trees; a searcher that says nothing costs nothing."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from pipeline.acceptance import MAX_MATCH, AcceptanceTable
from pipeline.lookup import Lookup, context_ends, context_tails
from pipeline.proposal import SlotView
from pipeline.search import SearchRetriever, trees_of
from pipeline.tree import SOURCES
from tests.pipeline.toys import path_of

CORPUS, LIVE = SOURCES.index("corpus"), SOURCES.index("live")


def lookup_of(*tries: tuple[int, list[tuple[int, int, int]]]) -> Lookup:
    """Each trie: its match length and (token, parent, count) of its nodes."""
    nodes = [node for _, trie in tries for node in trie]
    columns = np.array(nodes, np.int32).reshape(-1, 3)
    offsets = np.cumsum([0, *(len(trie) for _, trie in tries)], dtype=np.int64)
    return Lookup(np.array([length for length, _ in tries], np.int32), offsets, *columns.T.copy())


class Scripted:
    """Answers with what it was given, once; checks that it was asked first."""

    def __init__(self, answer: Mapping[str, Lookup]) -> None:
        self._answer = answer
        self.asked: list[list[int]] | None = None

    def send(self, contexts: Sequence[np.ndarray], depths: np.ndarray) -> None:
        self.asked = [context.tolist() for context in contexts]

    @property
    def is_ready(self) -> bool:
        return True

    def receive(self) -> Mapping[str, Lookup]:
        assert self.asked is not None
        return self._answer


def views(*contexts: list[int]) -> list[SlotView]:
    return [SlotView(slot, np.array(tokens, np.int32), 8) for slot, tokens in enumerate(contexts)]


def test_siblings_share_the_rate_of_their_source_and_match_by_their_counts() -> None:
    rates = AcceptanceTable().rates
    rates[CORPUS, 3], rates[CORPUS, 4] = 0.8, 0.9
    (tree,) = trees_of("corpus", lookup_of((3, [(7, -1, 3), (9, 0, 3), (8, -1, 1)])), rates, 100)
    assert tree.tokens.tolist() == [7, 9, 8]
    assert tree.scores.tolist() == pytest.approx([0.6, 0.9, 0.2])
    assert tree.matches[:, CORPUS].tolist() == [3, 4, 3], "a node adds its parent's token to the match"
    assert set(tree.sources.tolist()) == {CORPUS}


def test_unlikely_paths_are_dropped_and_matches_are_capped() -> None:
    rates = np.full((len(SOURCES), MAX_MATCH + 1), 0.5, np.float32)
    chain = [(token, token - 1, 1) for token in range(40)]
    (tree,) = trees_of("live", lookup_of((20, chain)), rates, 100)
    assert len(tree) == 5, "0.5 ** 5 is the last of at least 0.02"
    assert trees_of("live", lookup_of((30, chain[:4])), rates, 100)[0].matches.max(axis=1).tolist() == [30, 31, 32, 32]


def test_sources_of_all_searchers_are_fused_for_each_slot() -> None:
    near = Scripted({"live": lookup_of((2, [(5, -1, 1)]), (0, []))})
    far = Scripted({"corpus": lookup_of((4, [(5, -1, 2), (6, 0, 2)]), (1, [(8, -1, 1)]))})
    retriever = SearchRetriever([near, far], AcceptanceTable(), 100)
    both = views([1, 2], [3])
    retriever.send(both)
    first, second = retriever.lookup(both)
    assert near.asked == far.asked == [[1, 2], [3]]
    assert {path_of(first, i) for i in range(len(first))} == {(5,), (5, 6)}
    assert first.sources.tolist() == [CORPUS, CORPUS], "the longer match is the likelier one"
    assert second.tokens.tolist() == [8]


def test_ids_that_the_target_does_not_have_are_left_out_with_what_follows_them() -> None:
    lookup = lookup_of((3, [(7, -1, 3), (100, 0, 3), (8, 1, 3), (9, 0, 1)]))
    (tree,) = trees_of("corpus", lookup, AcceptanceTable().rates, 100)
    assert tree.tokens.tolist() == [7, 9]
    assert tree.parents.tolist() == [-1, 0]


def test_silence_is_an_empty_tree() -> None:
    retriever = SearchRetriever([Scripted({})], AcceptanceTable(), 100)
    some = views([1, 2], [3])
    retriever.send(some)
    assert [len(tree) for tree in retriever.lookup(some)] == [0, 0]
    assert len(retriever.lookup([])) == 0


def test_a_lookup_survives_the_journey_as_bytes() -> None:
    for lookup in (
        Lookup.empty(0),
        Lookup.empty(3),
        lookup_of((3, [(7, -1, 3), (9, 0, 2)]), (0, []), (1, [(8, -1, 1)])),
    ):
        again = Lookup.from_bytes(lookup.to_bytes())
        for name in ("match_lengths", "offsets", "tokens", "parents", "counts"):
            assert getattr(again, name).tolist() == getattr(lookup, name).tolist()
            assert getattr(again, name).dtype == getattr(lookup, name).dtype


def test_tails_have_the_newest_token_first_and_end_at_a_negative_one() -> None:
    contexts = [np.array(tokens) for tokens in ([1, 2, 3, 4, 5], [7], [], [1, -1, 2, 3])]
    tails, lengths = context_tails(contexts, 4)
    assert [tail[:n].tolist() for tail, n in zip(tails, lengths, strict=True)] == [[5, 4, 3, 2], [7], [], [3, 2]]
    for depth in (2, 4, 6):
        matrix = context_tails(context_ends(contexts, depth), depth)
        assert [a.tolist() for a in matrix] == [a.tolist() for a in context_tails(contexts, depth)]
