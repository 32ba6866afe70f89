"""From logits to the target's own next token: penalties, filters, and argmax or a Gumbel-max sample.

Pure functions of (logits row, sampling parameters, noise key, tokens so far). Nothing here knows whether a row
belongs to a tree node or to plain decoding, which is what makes the text independent of speculation.
Filters and their order follow transformers: repetition penalty, temperature, top-k, top-p, min-p.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.noise import gumbel
from pipeline.request import SamplingParams

_NUM_CANDIDATES = 256  # rows whose filters keep more than this many tokens fall back to the whole vocabulary


@dataclass(frozen=True, slots=True)
class ChoiceRow:
    """How the token after one node is chosen.

    Attributes:
        params: the request's sampling parameters.
        key: noise key of the position being filled, from `pipeline.noise.position_key`; unused when greedy.
        seen: token ids the repetition penalty applies to (prompt, output, ancestors), repeats allowed; None without
            penalty.
    """

    params: SamplingParams
    key: int = 0
    seen: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Choices:
    """The target's choices.

    Attributes:
        token_ids: [M] int64.
        logprobs: [M] float32 log-probability under the target's unfiltered distribution, or None if no row asked.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray | None


def choose(logits: torch.Tensor, rows: Sequence[ChoiceRow]) -> Choices:
    """Chooses one token per row.

    Args:
        logits: [M, V] of the target, any float dtype; not modified.
        rows: M rows; `rows[i]` says how row i is chosen. Rows may be one object.
    """
    distinct = {id(row): row for row in rows}.values()
    if all(row.params.is_greedy and row.seen is None for row in distinct):
        token_ids = logits.argmax(dim=-1)
    else:
        token_ids = perturbed_scores(logits, rows).argmax(dim=-1)
    logprobs = None
    if any(row.params.logprobs for row in distinct):
        scores = logits.float()
        chosen = scores.gather(1, token_ids[:, None])[:, 0]
        logprobs = (chosen - scores.logsumexp(dim=-1)).cpu().numpy()
    return Choices(token_ids.cpu().numpy(), logprobs)


def perturbed_scores(
    logits: torch.Tensor, rows: Sequence[ChoiceRow], token_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """[M, V] float32 scores whose argmax is the choice: processed logits plus noise, -inf where filtered out.

    Args:
        token_ids: [V] int64 token of each column, where a draft model knows only some; no penalty goes with it.

    The difference of a row's two best scores is the margin by which rounding would have to move a logit to change the
    text.
    """
    scores = logits.float()
    scores = scores.clone() if scores is logits else scores
    for i, row in enumerate(rows):
        if row.seen is not None:
            _penalize(scores[i], row.seen, row.params.repetition_penalty)
    sampled = [i for i, row in enumerate(rows) if not row.params.is_greedy]
    if sampled:
        index = torch.tensor(sampled, device=scores.device)
        scores[index] = _sample_scores(scores[index], [rows[i] for i in sampled], token_ids)
    return scores


def _penalize(scores: torch.Tensor, seen: np.ndarray, penalty: float) -> None:
    """Repetition penalty in place on one row [V]: each seen token once, however often it occurs."""
    ids = torch.from_numpy(np.unique(seen).astype(np.int64)).to(scores.device)
    old = scores[ids]
    scores[ids] = torch.where(old < 0, old * penalty, old / penalty)


def _sample_scores(scores: torch.Tensor, rows: Sequence[ChoiceRow], token_ids: torch.Tensor | None) -> torch.Tensor:
    """Temperature, filters and noise for rows with temperature > 0. [M, V] -> [M, V]."""
    device = scores.device
    scores = scores / torch.tensor([[row.params.temperature] for row in rows], device=device)
    keys = torch.tensor([row.key for row in rows], dtype=torch.int64, device=device)
    if all(_keeps_all(row.params) for row in rows):
        tokens = torch.arange(scores.shape[1], device=device) if token_ids is None else token_ids
        return scores + gumbel(keys, tokens.expand_as(scores).contiguous())
    num_candidates = min(scores.shape[1], max(_NUM_CANDIDATES, 2 * max(row.params.top_k for row in rows)))
    values, ids, kept, is_cut_off = _filter(scores, rows, num_candidates)
    if num_candidates < scores.shape[1] and is_cut_off:
        values, ids, kept, _ = _filter(scores, rows, scores.shape[1])
    width = int(kept.sum(dim=1).max())
    values, ids, kept = values[:, :width], ids[:, :width].contiguous(), kept[:, :width]
    noisy = (values + gumbel(keys, ids if token_ids is None else token_ids[ids])).masked_fill(~kept, -torch.inf)
    return torch.full_like(scores, -torch.inf).scatter_(1, ids, noisy)


def _keeps_all(params: SamplingParams) -> bool:
    return params.top_k == 0 and params.top_p >= 1.0 and params.min_p == 0.0


def _filter(
    scores: torch.Tensor, rows: Sequence[ChoiceRow], num_candidates: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]:
    """The `num_candidates` best tokens of each row and which of them the filters keep.

    Returns:
        values [M, C] descending, token ids [M, C], kept [M, C] bool (a prefix of each row, never empty), and whether
        some row's cut may lie beyond its candidates, so that only the whole vocabulary decides it.
    """
    vocabulary = scores.shape[1]

    def column(items: list[float] | list[int]) -> torch.Tensor:
        return torch.tensor(items, device=scores.device)[:, None]

    values, ids = torch.topk(scores, num_candidates, dim=1)
    top_k = column([min(row.params.top_k or vocabulary, vocabulary) for row in rows])
    kth = values.gather(1, top_k.clamp(max=num_candidates) - 1)
    kept = (values >= kth) | (top_k > num_candidates)  # ties with the k-th token stay, as in transformers
    is_tied_beyond = kept[:, -1:] & (top_k < vocabulary)  # tokens that tie with the k-th lie beyond the candidates
    survivors = values.masked_fill(~kept, -torch.inf)
    total = torch.where(
        top_k >= vocabulary, scores.logsumexp(dim=1, keepdim=True), survivors.logsumexp(dim=1, keepdim=True)
    )
    probabilities = (survivors - total).exp()
    mass_before = probabilities.cumsum(dim=1) - probabilities
    kept &= mass_before < column([row.params.top_p if row.params.top_p < 1.0 else np.inf for row in rows])
    kept &= (values - values[:, :1]).exp() >= column([row.params.min_p for row in rows])
    kept[:, 0] = True
    kept = values >= values.masked_fill(~kept, torch.inf).amin(dim=1, keepdim=True)
    return values, ids, kept, bool((is_tied_beyond | kept[:, -1:]).any())
