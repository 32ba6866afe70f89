"""Context lookup proposes what really followed the last tokens, best match first, however the index was built."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.acceptance import MAX_MATCH, AcceptanceTable
from pipeline.context import ContextRetriever
from pipeline.forest import Forest
from pipeline.proposal import SlotView
from pipeline.tree import SOURCES, TokenTree, path_values
from pipeline.verify import Outcome
from tests.pipeline.toys import path_of

MAX_DEPTH = 24
CONTEXT, PASSAGES = SOURCES.index("context"), SOURCES.index("passages")
bounded = settings(deadline=None, max_examples=150)
# Few tokens repeat themselves often; large ids find overflow in the hash.
contexts = st.one_of(
    st.lists(st.integers(0, 2), min_size=1, max_size=120),
    st.lists(st.integers(0, 20), min_size=1, max_size=120),
    st.lists(st.sampled_from((0, 1, 151_935, 262_143, (1 << 31) - 1)), min_size=1, max_size=60),
    st.lists(st.integers(0, 9), min_size=2, max_size=12).map(lambda period: period * 8),
)


class HopefulTable(AcceptanceTable):
    """Finds every candidate worth keeping, so that the whole trie can be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.rates[:] = 1.0


def view(tokens: Sequence[int], max_depth: int = MAX_DEPTH, slot: int = 0) -> SlotView:
    return SlotView(slot, np.array(tokens, np.int32), max_depth)


def lookup(
    tokens: Sequence[int],
    max_depth: int = MAX_DEPTH,
    acceptance: AcceptanceTable | None = None,
    passages: Sequence[np.ndarray] = (),
) -> TokenTree:
    retriever = ContextRetriever(acceptance or HopefulTable())
    retriever.admit(0, np.array(tokens, np.int32), passages)
    return retriever.lookup([view(tokens, max_depth)])[0]


def match_length(tokens: Sequence[int], place: int) -> int:
    """How many tokens up to and with `place` equal the last ones, at most `MAX_MATCH`."""
    n = 0
    while n < MAX_MATCH and n <= place and tokens[place - n] == tokens[len(tokens) - 1 - n]:
        n += 1
    return n


def matches(tokens: Sequence[int]) -> dict[int, int]:
    """Every earlier place where the last token occurred, and the length of the match there."""
    return {place: n for place in range(len(tokens) - 1) if (n := match_length(tokens, place))}


def assert_same(left: TokenTree, right: TokenTree) -> None:
    for name in ("tokens", "parents", "scores", "sources", "matches"):
        assert getattr(left, name).tolist() == getattr(right, name).tolist()


@bounded
@given(contexts, st.integers(1, 40))
def test_every_path_followed_the_last_tokens_somewhere(tokens: list[int], max_depth: int) -> None:
    tree = lookup(tokens, max_depth)
    places = matches(tokens)
    assert len({path_of(tree, node) for node in range(len(tree))}) == len(tree)
    for node in range(len(tree)):
        path = path_of(tree, node)
        assert len(path) <= min(max_depth, MAX_DEPTH)
        followed = [place for place in places if tuple(tokens[place + 1 : place + 1 + len(path)]) == path]
        assert followed, f"{path} never followed the last token"
        longest = max(places[place] for place in followed) + len(path) - 1
        assert 1 <= tree.matches[node, CONTEXT] <= min(longest, MAX_MATCH)
        assert SOURCES[tree.sources[node]] == "context"


@bounded
@given(contexts)
def test_the_longest_and_latest_match_is_proposed_first(tokens: list[int]) -> None:
    tree = lookup(tokens)
    places = matches(tokens)
    assert (len(tree) > 0) == bool(places)
    if not places:
        return
    longest = max(places.values())
    latest = max(place for place, n in places.items() if n == longest)
    followed = tokens[latest + 1 : latest + 1 + MAX_DEPTH]
    assert [int(token) for token in tree.tokens[: len(followed)]] == followed
    assert tree.parents[: len(followed)].tolist() == list(range(-1, len(followed) - 1))
    assert tree.matches[: len(followed), CONTEXT].tolist() == [
        min(longest + i, MAX_MATCH) for i in range(len(followed))
    ]


def test_a_rare_token_is_found_behind_frequent_ones_of_the_same_bucket() -> None:
    """Links of tokens that only share the hash bucket must not use up the few places a single token may look at."""
    hidden = []
    for frequent in range(2, 1000):
        context = [1, 2000, *(token for i in range(12) for token in (frequent, 3000 + i)), 1]
        if not len(tree := lookup(context)) or int(tree.tokens[0]) != 2000:
            hidden.append(frequent)
    assert not hidden


@bounded
@given(contexts)
def test_siblings_share_the_estimate_of_their_longest_match(tokens: list[int]) -> None:
    acceptance = AcceptanceTable()
    acceptance.rates[:] = np.linspace(0.3, 0.95, MAX_MATCH + 1)
    whole, tree = lookup(tokens), lookup(tokens, acceptance=acceptance)
    assert {path_of(tree, i) for i in range(len(tree))} <= {path_of(whole, i) for i in range(len(whole))}
    assert bool(((tree.scores > 0) & (tree.scores <= 0.951)).all())
    for parent in {int(parent) for parent in tree.parents}:
        children = tree.parents == parent
        assert tree.scores[children].sum() <= acceptance.rates[CONTEXT, whole.matches.max()] + 1e-5
    assert bool((path_values(tree.parents, tree.scores) >= 0.02).all())


@pytest.mark.parametrize("counts", [(3, 1), (2, 2), (5, 2)])
def test_candidates_of_one_match_length_share_by_their_counts(counts: tuple[int, int]) -> None:
    tokens: list[int] = []
    for i in range(sum(counts)):
        tokens += [100 + i, 1, 2, 10 if i < counts[0] else 11]  # another token before each, so all match two tokens
    tree = lookup([*tokens, 99, 1, 2])
    share = {int(tree.tokens[node]): float(tree.scores[node]) for node in np.flatnonzero(tree.parents == -1)}
    assert share == {10: pytest.approx(counts[0] / sum(counts)), 11: pytest.approx(counts[1] / sum(counts))}


def test_a_longer_match_outweighs_shorter_ones() -> None:
    longer, shorter = [5, 1, 2, 10], [6, 1, 2, 11]
    tree = lookup([*longer, *shorter, 5, 1, 2])
    share = {int(tree.tokens[node]): float(tree.scores[node]) for node in np.flatnonzero(tree.parents == -1)}
    assert share == {10: pytest.approx(0.8), 11: pytest.approx(0.2)}


@bounded
@given(contexts, st.lists(st.integers(1, 30), max_size=20))
def test_an_index_extended_piece_by_piece_equals_one_built_at_once(tokens: list[int], sizes: list[int]) -> None:
    retriever = ContextRetriever(HopefulTable())
    known = 1
    retriever.admit(0, np.array(tokens[:1], np.int32), ())
    for size in [*sizes, len(tokens)]:
        retriever.extend(0, np.array(tokens[known : known + size], np.int32))
        known = min(known + size, len(tokens))
    assert_same(retriever.lookup([view(tokens)])[0], lookup(tokens))


@pytest.mark.parametrize("step", [1, 7, 300])
def test_growth_across_capacities_keeps_every_place(step: int) -> None:
    """From 10 tokens to 5,000, past every doubling of the buffers."""
    tokens = np.random.default_rng(2).integers(0, 60, 5000).astype(np.int32)
    retriever = ContextRetriever(HopefulTable())
    retriever.admit(3, tokens[:10], ())
    for begin in range(10, len(tokens), step):
        retriever.extend(3, tokens[begin : begin + step])
        end = min(begin + step, len(tokens))
        if end % 500 < step:
            assert_same(retriever.lookup([view(tokens[:end].tolist(), slot=3)])[0], lookup(tokens[:end].tolist()))


def test_slots_do_not_see_each_other_and_a_slot_can_be_taken_again() -> None:
    retriever = ContextRetriever(HopefulTable())
    first, second = [1, 2, 3, 1, 2], [1, 2, 7, 1, 2]
    retriever.admit(0, np.array(first, np.int32), ())
    retriever.admit(1, np.array(second, np.int32), ())
    trees = retriever.lookup([view(second, slot=1), view(first, slot=0)])
    assert [int(tree.tokens[0]) for tree in trees] == [7, 3]
    retriever.release(0)
    retriever.admit(0, np.array(second, np.int32), ())
    assert_same(retriever.lookup([view(second, slot=0)])[0], lookup(second))


@pytest.mark.parametrize(("tokens", "max_depth"), [([4], 5), ([4, 5, 6], 5), ([4, 4, 4], 0), ([4, 4, 4], -1)])
def test_nothing_to_propose_is_an_empty_tree(tokens: list[int], max_depth: int) -> None:
    assert len(lookup(tokens, max_depth)) == 0


def test_the_caller_may_change_its_tokens_afterwards() -> None:
    """Slots reuse their buffers."""
    tokens = np.array([1, 2, 3, 1, 2], np.int32)
    retriever = ContextRetriever(HopefulTable())
    retriever.admit(0, tokens, ())
    tokens[:] = 9
    assert int(retriever.lookup([view([1, 2, 3, 1, 2])])[0].tokens[0]) == 3


def observed(table: AcceptanceTable, accepted: Sequence[int], rounds: int) -> np.ndarray:
    """Rates after `rounds` rounds with a chain of two nodes that matched 3 and 4 tokens."""
    chain = TokenTree.of([1, 2], [-1, 0], "context")
    chain.matches[:, CONTEXT] = (3, 4)
    for _ in range(rounds):
        choices = np.array([*(chain.tokens[node] for node in accepted), 7])
        table.observe(Forest.of([chain]), Outcome.of([choices]))
    rates: np.ndarray = table.rates[CONTEXT]
    return rates


def test_estimates_follow_what_verification_shows() -> None:
    prior = AcceptanceTable().rates[CONTEXT]
    never, half = observed(AcceptanceTable(), [], 200), observed(AcceptanceTable(), [0], 200)
    assert never[3] < 0.1 and never[4] == prior[4], "a node never reached teaches nothing"
    assert half[3] > 0.9 and half[4] < 0.1
    untouched = [m for m in range(MAX_MATCH + 1) if m not in (3, 4)]
    assert half[untouched].tolist() == prior[untouched].tolist()


def test_estimates_are_probabilities_that_rise_with_the_match_and_can_be_unlearned() -> None:
    table = AcceptanceTable()
    assert bool((np.diff(table.rates) >= 0).all()) and bool(((table.rates > 0) & (table.rates < 1)).all())
    observed(table, [0, 1], 5000)
    assert table.rates[CONTEXT, 3] <= 1.0
    assert observed(table, [], 5000)[3] < 0.05


def test_a_source_teaches_nothing_about_another() -> None:
    table = AcceptanceTable()
    observed(table, [], 200)
    assert table.rates[PASSAGES].tolist() == AcceptanceTable().rates[PASSAGES].tolist()


def test_passages_are_searched_like_the_context_but_never_across_their_ends() -> None:
    passages = [np.array([7, 1, 2, 3, 4], np.int32), np.array([8, 9], np.int32)]
    tree = lookup([5, 6, 1, 2], passages=passages)
    assert tree.tokens.tolist() == [3, 4], "the second passage must not follow the first"
    assert set(tree.sources.tolist()) == {PASSAGES}
    assert len(lookup([5, 9], passages=passages)) == 0, "nor the prompt the second"
    assert len(lookup([4, 8], passages=passages)) == 1, "9 after 8, a match of one token"
    both = lookup([1, 2, 6, 5, 1, 2], passages=passages)
    assert {int(t): int(s) for t, s in zip(both.tokens, both.sources, strict=True)} == {
        6: CONTEXT,
        5: CONTEXT,
        1: CONTEXT,
        2: CONTEXT,
        3: PASSAGES,
        4: PASSAGES,
    }


@bounded
@given(contexts, st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=20), max_size=4))
def test_passages_never_shorten_what_the_context_gives(tokens: list[int], found: list[list[int]]) -> None:
    passages = [np.array(passage, np.int32) for passage in found]
    with_passages, own = lookup(tokens, passages=passages), lookup(tokens)
    assert bool((with_passages.tokens >= 0).all())
    longest = [int(tree.matches[tree.parents == -1].max(initial=0)) for tree in (with_passages, own)]
    assert longest[0] >= longest[1]


@bounded
@given(st.lists(st.tuples(st.integers(0, 3), contexts, st.booleans()), min_size=1, max_size=25))
def test_slots_that_come_grow_and_go_do_not_disturb_each_other(steps: list[tuple[int, list[int], bool]]) -> None:
    """Each slot's tree is that of a retriever which knows nothing else, though all of them lie in one array."""
    retriever = ContextRetriever(HopefulTable())
    known: dict[int, list[int]] = {}
    for slot, tokens, ends in steps:
        if slot not in known:
            known[slot] = list(tokens)
            retriever.admit(slot, np.array(tokens, np.int32), ())
        elif ends:
            del known[slot]
            retriever.release(slot)
        else:
            known[slot] += 3 * tokens  # sometimes beyond what there was room for
            retriever.extend(slot, np.array(3 * tokens, np.int32))
        views = [view(text, slot=number) for number, text in known.items()]
        for text, tree in zip(known.values(), retriever.lookup(views), strict=True):
            assert_same(tree, lookup(text))
