"""Rules: the paper's pruning and SAM-Decoding's switch against plain loops over the same trees, and both lossless."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.reference import generate
from pipeline.acceptance import AcceptanceTable
from pipeline.context import ContextRetriever
from pipeline.growth import DraftOptions
from pipeline.methods import METHODS
from pipeline.proposal import Draft
from pipeline.request import SamplingParams
from pipeline.rules import FixedPruning, Switch, chain_of
from pipeline.tree import EMPTY_TREE, TokenTree
from tests.models import tiny_model
from tests.pipeline.test_budget import all_paths
from tests.pipeline.test_engine_architectures import (
    GREEDY,
    NEW_TOKENS,
    SAMPLED,
    assert_equal,
    prompts_for,
    proposers_of,
    requests_for,
    run,
)
from tests.pipeline.test_head import engine_with, head_for, outputs
from tests.pipeline.toys import trees

VOCABULARY = 40
random_trees = trees(max_nodes=20, vocabulary=VOCABULARY)


@settings(deadline=None)
@given(random_trees, random_trees, st.integers(0, 1 << 30))
def test_the_draft_distribution_prunes_what_was_retrieved(drafted: TokenTree, retrieved: TokenTree, seed: int) -> None:
    rule = FixedPruning(rank=5, probability=0.06)
    logprobs = (3 * torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(seed))).log_softmax(-1)
    (got,) = rule.join(Draft([drafted], logprobs), [retrieved])
    likely = logprobs[0].argsort(descending=True)[:5].tolist()
    stays = {token for token in range(VOCABULARY) if token in likely or float(logprobs[0, token].exp()) >= 0.06}
    assert all_paths(got) == all_paths(drafted) | {path for path in all_paths(retrieved) if path[0] in stays}
    (unpruned,) = rule.join(Draft([drafted]), [retrieved])
    assert all_paths(unpruned) == all_paths(drafted) | all_paths(retrieved)


@settings(deadline=None)
@given(random_trees, random_trees)
def test_a_long_match_switches_to_its_chain(drafted: TokenTree, retrieved: TokenTree) -> None:
    rule = Switch(match=5)
    tops = [i for i in range(len(retrieved)) if retrieved.parents[i] < 0]
    is_long = any(retrieved.matches[i] >= 5 for i in tops)
    assert rule.wants_draft(retrieved) == (not is_long)
    (got,) = rule.join(Draft([EMPTY_TREE if is_long else drafted]), [retrieved])
    assert all_paths(got) == (all_paths(chain_of(retrieved)) if is_long else all_paths(drafted))


@settings(deadline=None)
@given(random_trees)
def test_a_chain_takes_the_likeliest_child(tree: TokenTree) -> None:
    expected, node = [], -1
    while children := [i for i in range(len(tree)) if tree.parents[i] == node]:
        node = max(children, key=lambda i: (tree.scores[i], -i))
        expected.append(int(tree.tokens[node]))
    chain = chain_of(tree)
    assert chain.tokens.tolist() == expected
    assert chain.parents.tolist() == list(range(-1, len(expected) - 1))


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("name", ["switch", "rasd-fixed"])
def test_no_rule_changes_the_output(name: str, slots: int, params: SamplingParams) -> None:
    prompts = [prompt * 3 for prompt in prompts_for(31, 8)]  # so that something matches
    requests = requests_for(prompts, params)
    if params.is_greedy:
        expected = [generate(tiny_model("llama"), prompt, NEW_TOKENS) for prompt in prompts]
    else:
        expected = [list(g.token_ids) for g in run("llama", requests, proposers_of("plain", {}), slots=1)]
    options = DraftOptions(depth=3, width=4, branches=4, num_nodes=24)
    context = ContextRetriever(AcceptanceTable())
    engine = engine_with("llama", head_for("llama"), slots, options, retrievers=(context,), rule=METHODS[name].rule)
    got = outputs(engine, requests)
    assert_equal("llama", requests, expected, got)
    assert sum(generation.drafted for generation in got) > 0
