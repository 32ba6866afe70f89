"""Choices follow transformers' processors, the exact distribution, and nothing but the row they are made for."""

import math
from collections.abc import Sequence
from itertools import product
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pipeline.noise import gumbel, position_key
from pipeline.request import Request, SamplingParams
from pipeline.sampling import ChoiceRow, choose, perturbed_scores
from pipeline.slots import Slot
from pipeline.stopping import StopCheck
from pipeline.tree import EMPTY_TREE, TokenTree
from tests.pipeline.toys import ToyDecoder

FILTERS = [
    SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for temperature, top_k, top_p, min_p in product((0.6, 1.3), (0, 5), (1.0, 0.7), (0.0, 0.1))
] + [SamplingParams(temperature=1.0, top_k=1), SamplingParams(temperature=1.0, top_p=0.01, min_p=1.0)]
NO_IDS = cast(torch.LongTensor, torch.zeros((1, 1), dtype=torch.int64))


def reference_scores(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """What transformers leaves of rows [M, V], filtered tokens -inf, in the order of its `generate`."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    return warpers(NO_IDS, cast(torch.FloatTensor, logits.float()))


def with_noise(scores: torch.Tensor, keys: Sequence[int]) -> torch.Tensor:
    ids = torch.arange(scores.shape[1]).repeat(scores.shape[0], 1)
    return scores + gumbel(torch.tensor(keys), ids)


def random_logits(seed: int, *shape: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def kept(scores: torch.Tensor) -> torch.Tensor:
    return torch.isfinite(scores)


def slot_of(prompt: Sequence[int], output: Sequence[int], params: SamplingParams, seed: int = 5) -> Slot:
    slot = Slot.of(Request(0, tuple(prompt), params, seed), StopCheck(params, 1000, (), ToyDecoder()))
    slot.extend(np.array(output, np.int32), None)
    return slot


@pytest.mark.parametrize("params", FILTERS, ids=lambda p: f"t{p.temperature}-k{p.top_k}-p{p.top_p}-m{p.min_p}")
def test_filters_keep_what_transformers_keeps(params: SamplingParams) -> None:
    for size in (2, 40, 700):
        logits = random_logits(size, 20, size)
        keys = [position_key(size, i) for i in range(20)]
        scores = perturbed_scores(logits, [ChoiceRow(params, key) for key in keys])
        torch.testing.assert_close(scores, with_noise(reference_scores(logits, params), keys), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("params", FILTERS, ids=lambda p: f"t{p.temperature}-k{p.top_k}-p{p.top_p}-m{p.min_p}")
def test_with_ties_the_same_values_are_kept(params: SamplingParams) -> None:
    """Which of the tokens tied at the nucleus' edge stay is a matter of the sort in transformers: any, but at least
    one; those above it must stay, those below must go."""
    logits = random_logits(9, 30, 60, scale=2.0).round()
    scores = perturbed_scores(logits, [ChoiceRow(params, key) for key in range(30)])
    reference = reference_scores(logits, params)
    for row, mine, theirs in zip(logits, kept(scores), kept(reference), strict=True):
        assert row[mine].min() == row[theirs].min()
        edge = row[theirs].min()
        assert bool((mine == theirs)[row != edge].all())
    if params.top_p == 1.0:
        assert torch.equal(kept(scores), kept(reference))


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, top_p=0.97),
        SamplingParams(temperature=1.0, min_p=0.01),
        SamplingParams(temperature=1.0, top_k=700),
        SamplingParams(temperature=1.0, top_k=700, top_p=0.99, min_p=0.001),
        SamplingParams(temperature=100.0, top_p=0.99999),
    ],
    ids=str,
)
def test_a_nucleus_larger_than_the_candidates_is_kept_whole(params: SamplingParams) -> None:
    logits = torch.cat([random_logits(1, 3, 3000, scale=0.5), random_logits(2, 3, 3000, scale=4.0)])
    scores = perturbed_scores(logits, [ChoiceRow(params, key) for key in range(6)])
    reference = reference_scores(logits, params)
    assert int(kept(reference).sum(dim=1).max()) > 256
    # The cut falls between tokens that differ by 1e-6 in probability; transformers sums them from the other end.
    difference = (kept(scores) != kept(reference)).sum(dim=1)
    assert int(difference.max()) <= (1 if params.top_p < 1.0 else 0)


def test_ties_with_the_kth_token_count_beyond_the_candidates() -> None:
    """One likely token, and 1,999 that tie for the second place: the nucleus is taken from all 2,000."""
    params = SamplingParams(temperature=1.0, top_k=5, top_p=0.5)
    logits = torch.zeros(1, 2000)
    logits[0, 7] = 5.0
    scores = perturbed_scores(logits, [ChoiceRow(params, 1)])
    assert int(kept(scores).sum()) >= int(kept(reference_scores(logits, params)).sum()) > 800


def test_masked_tokens_are_never_chosen() -> None:
    logits = random_logits(4, 50, 30)
    logits[:, 10:] = -torch.inf
    for params in FILTERS:
        assert int(choose(logits, [ChoiceRow(params, key) for key in range(50)]).token_ids.max()) < 10


ANY_PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from((0.0, 0.5, 1.0, 2.0)),
    top_k=st.sampled_from((0, 0, 3, 50, 290)),
    top_p=st.sampled_from((1.0, 0.95, 0.8, 0.3)),
    min_p=st.sampled_from((0.0, 0.0, 0.05, 0.3)),
    repetition_penalty=st.sampled_from((1.0, 1.3)),
)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.tuples(ANY_PARAMS, st.integers(0, 1 << 60)), min_size=2, max_size=5),
    seed=st.integers(0, 1000),
    scale=st.sampled_from((0.3, 2.0, 6.0)),
    is_rounded=st.booleans(),
)
def test_a_choice_does_not_depend_on_its_batch(
    rows: list[tuple[SamplingParams, int]], seed: int, scale: float, is_rounded: bool
) -> None:
    """Half precision ties many logits, so the edges of the filters must not depend on the order of a sort."""
    logits = random_logits(seed, len(rows), 800, scale=scale)
    logits = logits.bfloat16() if is_rounded else logits
    choice_rows = [
        ChoiceRow(params, key, np.arange(40) if params.repetition_penalty != 1.0 else None) for params, key in rows
    ]
    together = perturbed_scores(logits, choice_rows)
    for i, row in enumerate(choice_rows):
        alone = perturbed_scores(logits[i : i + 1], [row])
        assert torch.equal(together[i], alone[0]), f"row {i} of {rows}"


def test_tokens_tied_at_the_edge_of_the_nucleus_do_not_depend_on_the_batch() -> None:
    """A neighbour with a flat distribution makes the whole vocabulary be sorted, which orders ties otherwise."""
    params = SamplingParams(temperature=1.0, top_p=0.8)
    logits = (random_logits(3, 8, 20_000, scale=4.0) * 4).round() / 4
    flat = torch.zeros(1, 20_000)
    rows = [ChoiceRow(params, key) for key in range(9)]
    beside_flat = perturbed_scores(torch.cat([logits, flat]), rows)
    assert torch.equal(perturbed_scores(logits, rows[:8]), beside_flat[:8])


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=0.7, top_p=0.9)], ids=str)
def test_logits_are_not_modified(params: SamplingParams) -> None:
    logits = random_logits(5, 4, 30)
    before = logits.clone()
    choose(logits, [ChoiceRow(params, key, np.array([1, 2, 3])) for key in range(4)])
    assert torch.equal(logits, before)


def chi_square_bound(degrees: int) -> float:
    """About the 1 - 1e-5 quantile (Wilson and Hilferty 1931)."""
    return degrees * (1 - 2 / (9 * degrees) + 4.3 * math.sqrt(2 / (9 * degrees))) ** 3


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=2.5),
        SamplingParams(temperature=1.0, top_k=4),
        SamplingParams(temperature=1.0, top_p=0.8),
        SamplingParams(temperature=1.0, min_p=0.1),
        SamplingParams(temperature=1.4, top_k=8, top_p=0.9),
        SamplingParams(temperature=0.8, top_k=9, top_p=0.95, min_p=0.02),
        SamplingParams(temperature=1.5, repetition_penalty=1.8, top_p=0.95),
    ],
    ids=lambda p: f"t{p.temperature}-k{p.top_k}-p{p.top_p}-m{p.min_p}-r{p.repetition_penalty}",
)
@pytest.mark.parametrize("axis", ["positions", "seeds"])
def test_samples_follow_the_exact_distribution(params: SamplingParams, axis: str) -> None:
    num_draws = 20_000
    logits = torch.tensor([[2.0, 1.9, 1.5, 1.0, 0.7, 0.2, -0.3, -0.5, -1.0, -1.6, -2.4, -4.0]])
    seen = np.array([0, 3, 3, 8]) if params.repetition_penalty != 1.0 else None
    keys = [position_key(11, i) if axis == "positions" else position_key(i, 11) for i in range(num_draws)]
    chosen = choose(logits.expand(num_draws, -1), [ChoiceRow(params, key, seen) for key in keys]).token_ids
    if seen is not None:
        logits = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(torch.from_numpy(seen)[None], logits)
    expected = reference_scores(logits, params).double().softmax(dim=-1)[0].numpy() * num_draws
    counts = np.bincount(chosen, minlength=len(expected))
    support = expected > 0
    assert counts[~support].sum() == 0
    statistic = ((counts - expected)[support] ** 2 / expected[support]).sum()
    assert statistic < chi_square_bound(max(int(support.sum()) - 1, 1))


def test_consecutive_choices_are_independent() -> None:
    """Pairs of choices at neighbouring positions follow the product of their distributions."""
    num_pairs, params = 20_000, SamplingParams(temperature=1.0)
    logits = torch.tensor([[1.0, 0.5, 0.0, -1.0]])
    keys = [position_key(seed, position) for seed in range(num_pairs) for position in (100, 101)]
    chosen = choose(logits.expand(len(keys), -1), [ChoiceRow(params, key) for key in keys]).token_ids.reshape(-1, 2)
    probabilities = logits[0].double().softmax(dim=-1).numpy()
    expected = np.outer(probabilities, probabilities).ravel() * num_pairs
    counts = np.bincount(chosen[:, 0] * 4 + chosen[:, 1], minlength=16)
    assert ((counts - expected) ** 2 / expected).sum() < chi_square_bound(15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_is_the_argmax_and_logprobs_are_the_targets_own(dtype: torch.dtype) -> None:
    logits = random_logits(6, 8, 50).to(dtype)
    greedy = SamplingParams(logprobs=True)
    sampled = SamplingParams(temperature=2.0, top_k=3, logprobs=True)
    for params in (greedy, sampled):
        choices = choose(logits, [ChoiceRow(params, key) for key in range(8)])
        if params is greedy:
            assert choices.token_ids.tolist() == logits.argmax(dim=-1).tolist()
        exact = logits.double().log_softmax(dim=-1).numpy()[np.arange(8), choices.token_ids]
        assert choices.logprobs is not None
        np.testing.assert_allclose(choices.logprobs, exact, atol=1e-5)
    assert choose(logits, [ChoiceRow(SamplingParams())] * 8).logprobs is None


def test_no_rows() -> None:
    assert choose(torch.zeros(0, 9), []).token_ids.shape == (0,)


@pytest.mark.parametrize("penalty", [0.7, 1.2, 3.0])
def test_repetition_penalty_is_transformers(penalty: float) -> None:
    logits = random_logits(7, 6, 40)
    seen = np.random.default_rng(0).integers(0, 40, (6, 25))
    params = SamplingParams(repetition_penalty=penalty)
    rows = [ChoiceRow(params, 0, row) for row in seen]
    reference = RepetitionPenaltyLogitsProcessor(penalty)(torch.from_numpy(seen), logits)
    assert torch.equal(perturbed_scores(logits, rows), reference)
    assert choose(logits, rows).token_ids.tolist() == reference.argmax(dim=-1).tolist()


def test_siblings_are_penalised_for_their_own_ancestors_only() -> None:
    """Two siblings, and children of each: every node's choice is the one plain decoding makes on its path."""
    params = SamplingParams(repetition_penalty=1.7, temperature=0.9, top_p=0.9)
    prompt, output = [3, 4, 3], [5]
    tree = TokenTree.of([6, 7, 8, 6, 9], [-1, -1, 0, 1, 3], "context")
    paths = [[], [6], [7], [6, 8], [7, 6], [7, 6, 9]]
    logits = random_logits(8, 6, 12)
    rows = slot_of(prompt, output, params).choice_rows(tree)
    assert [set(row.seen.tolist()) for row in rows if row.seen is not None] == [{3, 4, 5, *path} for path in paths]
    in_tree = perturbed_scores(logits, rows)
    for i, path in enumerate(paths):
        slot = slot_of(prompt, output + path, params)
        plain = perturbed_scores(logits[i : i + 1], slot.choice_rows(EMPTY_TREE))
        assert torch.equal(in_tree[i], plain[0])
        ids = torch.tensor([prompt + output + path])
        penalised = RepetitionPenaltyLogitsProcessor(1.7)(ids, logits[i : i + 1])
        reference = with_noise(reference_scores(penalised, params), [position_key(5, ids.shape[1])])
        torch.testing.assert_close(plain, reference, rtol=1e-6, atol=1e-5)


def test_nodes_at_one_depth_share_their_noise_key() -> None:
    params = SamplingParams(temperature=1.0)
    rows = slot_of([1, 2], [3], params).choice_rows(TokenTree.of([4, 5, 6, 7], [-1, -1, 0, 1], "context"))
    assert [row.key for row in rows] == [position_key(5, 3 + depth) for depth in (0, 1, 1, 2, 2)]
    assert all(row.seen is None for row in rows)


@pytest.mark.parametrize("params", [{}, {"top_k": 7}, {"top_p": 0.8}, {"top_k": 300, "min_p": 0.01}])
def test_some_tokens_alone_are_chosen_as_if_the_others_were_impossible(params: dict[str, Any]) -> None:
    torch.manual_seed(0)
    ids = torch.sort(torch.randperm(2000)[:400]).values
    some = torch.randn(6, 400)
    logits = torch.full((6, 2000), -torch.inf)
    logits[:, ids] = some
    rows = [ChoiceRow(SamplingParams(temperature=0.9, **params), key) for key in range(6)]
    assert torch.equal(perturbed_scores(some, rows, ids), perturbed_scores(logits, rows)[:, ids])
