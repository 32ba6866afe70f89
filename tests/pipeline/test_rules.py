"""Rules: the paper's pruning and SAM-Decoding's switch against plain loops over the same trees, and both lossless."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.reference import generate
from pipeline.acceptance import AcceptanceTable
from pipeline.assemble import PAGE_SIZE
from pipeline.context import ContextRetriever
from pipeline.engine import Engine, EngineConfig
from pipeline.growth import DraftOptions
from pipeline.head_drafter import HeadDrafter
from pipeline.methods import METHODS, Proposers
from pipeline.proposal import Draft
from pipeline.request import Generation, Request, SamplingParams
from pipeline.rules import FixedPruning, Rule, Switch, chain_of
from pipeline.target import Target
from pipeline.tree import EMPTY_TREE, TokenTree
from tests.models import tiny_model
from tests.pipeline.test_engine_architectures import (
    GREEDY,
    NEW_TOKENS,
    SAMPLED,
    NoText,
    assert_equal,
    prompts_for,
    proposers_of,
    requests_for,
    run,
)
from tests.pipeline.test_head import head_for

VOCABULARY = 40


@st.composite
def trees(draw: st.DrawFn) -> TokenTree:
    size = draw(st.integers(0, 20))
    random = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    tokens: list[int] = []
    parents: list[int] = []
    for i in range(size):
        parent = int(random.integers(-1, i)) if i else -1
        free = [t for t in range(VOCABULARY) if all(parents[j] != parent or tokens[j] != t for j in range(i))]
        tokens.append(int(random.choice(free)))
        parents.append(parent)
    tree = TokenTree.of(tokens, parents, "context", random.random(size).tolist())
    return TokenTree(tree.tokens, tree.parents, tree.scores, tree.sources, random.integers(1, 9, size).astype(np.int16))


def paths(tree: TokenTree) -> set[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return set(found)


@settings(deadline=None)
@given(trees(), trees(), st.integers(0, 1 << 30))
def test_the_draft_distribution_prunes_what_was_retrieved(drafted: TokenTree, retrieved: TokenTree, seed: int) -> None:
    rule = FixedPruning(rank=5, probability=0.06)
    logprobs = (3 * torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(seed))).log_softmax(-1)
    (got,) = rule.join(Draft([drafted], logprobs), [retrieved])
    likely = logprobs[0].argsort(descending=True)[:5].tolist()
    stays = {token for token in range(VOCABULARY) if token in likely or float(logprobs[0, token].exp()) >= 0.06}
    assert paths(got) == paths(drafted) | {path for path in paths(retrieved) if path[0] in stays}
    (unpruned,) = rule.join(Draft([drafted]), [retrieved])
    assert paths(unpruned) == paths(drafted) | paths(retrieved)


@settings(deadline=None)
@given(trees(), trees())
def test_a_long_match_switches_to_its_chain(drafted: TokenTree, retrieved: TokenTree) -> None:
    rule = Switch(match=5)
    tops = [i for i in range(len(retrieved)) if retrieved.parents[i] < 0]
    is_long = any(retrieved.matches[i] >= 5 for i in tops)
    assert rule.wants_draft(retrieved) == (not is_long)
    (got,) = rule.join(Draft([EMPTY_TREE if is_long else drafted]), [retrieved])
    assert paths(got) == (paths(chain_of(retrieved)) if is_long else paths(drafted))


@settings(deadline=None)
@given(trees())
def test_a_chain_takes_the_likeliest_child(tree: TokenTree) -> None:
    expected, node = [], -1
    while children := [i for i in range(len(tree)) if tree.parents[i] == node]:
        node = max(children, key=lambda i: (tree.scores[i], -i))
        expected.append(int(tree.tokens[node]))
    chain = chain_of(tree)
    assert chain.tokens.tolist() == expected
    assert chain.parents.tolist() == list(range(-1, len(expected) - 1))


def outputs(rule: Rule, requests: list[Request], slots: int) -> list[Generation]:
    head = head_for("llama")
    target = Target(tiny_model("llama"), 128, PAGE_SIZE)
    target.read_states(head.config.depths)
    options = DraftOptions(depth=3, width=4, branches=4, num_nodes=24)
    acceptance = AcceptanceTable()
    proposers = Proposers(HeadDrafter(head, 128, PAGE_SIZE, slots, options), (ContextRetriever(acceptance),), rule)
    config = EngineConfig(num_slots=slots, budget=32, prefill_chunk=16, max_context=512)
    engine = Engine(target, NoText(), [2], proposers, acceptance, config)
    return sorted(engine.generate(requests), key=lambda generation: generation.request_id)


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
    got = outputs(METHODS[name].rule, requests, slots)
    assert_equal("llama", requests, expected, got)
    assert sum(generation.drafted for generation in got) > 0
