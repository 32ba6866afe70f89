"""Provenance: each token's proposer agrees with the row's own statistics, and counts with a recount by paths."""

from collections import Counter
from itertools import groupby
from typing import cast

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.acceptance import AcceptanceTable
from pipeline.context import ContextRetriever
from pipeline.engine import Engine, EngineConfig
from pipeline.methods import Proposers
from pipeline.proposal import NullDrafter
from pipeline.provenance import ANY, MAX_DEPTH, NUM_BINS, TARGET, Recorder
from pipeline.request import Request, SamplingParams
from pipeline.target import Target
from pipeline.tree import SOURCES, TokenTree
from pipeline.verify import walk
from tests.pipeline.toys import ToyDecoder, ToyTarget, path_of, trees

PROMPTS = [(0, 1, 2, 3, 4, 0, 1, 2), (3, 4, 0, 1), (2,), (1, 1, 2, 3, 1, 1, 2, 3)]


def engine_of(toy: ToyTarget) -> Engine:
    acceptance = AcceptanceTable()
    proposers = Proposers(NullDrafter(), (ContextRetriever(acceptance),))
    config = EngineConfig(num_slots=2, budget=6, prefill_chunk=4, max_context=64)
    return Engine(cast(Target, toy), ToyDecoder(), [], proposers, acceptance, config)


def requests() -> list[Request]:
    return [Request(i, prompt, SamplingParams(max_new_tokens=20 + i)) for i, prompt in enumerate(PROMPTS)]


def test_a_trail_is_the_output_with_the_rows_own_statistics() -> None:
    engine = engine_of(ToyTarget(100, 16))
    engine.recorder = recorder = Recorder()
    for number in (0, 2, 3):
        recorder.follow(number)
    seen = Counter[str]()
    for generation in engine.generate(requests()):
        counts, trail = recorder.take(generation.request_id)
        assert counts.right[-1].sum() >= generation.accepted  # a token behind the output's end counts, too
        if generation.request_id == 1:
            assert trail == ()
            continue
        assert tuple(token.token_id for token in trail) == generation.token_ids
        sources = Counter(token.source for token in trail)
        assert {name: n for name, n in sources.items() if name != TARGET} == generation.accepted_by_source
        assert [token.round for token in trail] == sorted(token.round for token in trail)
        assert trail[-1].round == generation.rounds
        for _, emitted in groupby(trail, key=lambda token: token.round):
            own = list(emitted)
            assert all(token.source != TARGET for token in own[:-1]), "the target's own token ends a round"
            proposed = [token for token in own if token.source != TARGET]
            assert [token.depth for token in proposed] == list(range(1, len(proposed) + 1))
            values = np.cumprod([token.score for token in proposed])
            np.testing.assert_allclose([token.value for token in proposed], values, atol=2e-4)
        seen += sources
    assert seen["context"] > 20 and seen[TARGET] > 10
    assert recorder.take(0)[1] == (), "what was taken is forgotten"


def test_recording_changes_no_output() -> None:
    outputs = []
    for recorder in (None, Recorder()):
        engine = engine_of(ToyTarget(100, 16))
        engine.recorder = recorder
        outputs.append({g.request_id: g for g in engine.generate(requests())})
    assert outputs[0] == outputs[1]


@given(trees(max_nodes=20, vocabulary=3), st.lists(st.integers(0, 2), min_size=21, max_size=21))
def test_counts_equal_a_recount_by_paths(tree: TokenTree, choices: list[int]) -> None:
    accepted = walk(tree.tokens, tree.parents, np.array(choices))
    recorder = Recorder()
    recorder.emitted(5, 1, tree, accepted, np.array([0], np.int32))
    counts, _ = recorder.take(5)
    paths = [path_of(tree, node) for node in range(len(tree))]
    offered, right = Counter[tuple[str, int]](), Counter[tuple[str, int]]()
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(NUM_BINS)]
    taken = [(), *(paths[node] for node in accepted)]
    for depth, parent in enumerate(taken):
        children = [node for node, path in enumerate(paths) if path[:-1] == parent and len(path) == len(parent) + 1]
        chosen = [node for node in children if paths[node] in taken]
        for names, nodes in ((offered, children), (right, chosen)):
            own = {SOURCES[i] for node in nodes for i in np.flatnonzero(tree.evidence[node])}
            names.update((name, min(depth, MAX_DEPTH - 1)) for name in (own | {ANY} if nodes else own))
        for node in children:
            score = float(tree.scores[node])
            bins[min(int(score * NUM_BINS), NUM_BINS - 1)].append((score, node in chosen))
    by_depth = counts.by_depth()
    for name, expected in (("offered", offered), ("right", right)):
        found = {(s, d): n for s, row in by_depth[name].items() for d, n in enumerate(row) if n}
        assert found == expected
    assert counts.predicted[0].tolist() == [len(each) for each in bins]
    assert counts.predicted[1].tolist() == [sum(hit for _, hit in each) for each in bins]
    np.testing.assert_allclose(counts.predicted[2], [sum(score for score, _ in each) for each in bins], rtol=1e-6)
