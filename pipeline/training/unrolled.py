"""Training-time test (EAGLE-3, arXiv 2503.01840, section 3.2): the head is trained on its own outputs, several steps.

Step 1 sees the target's features everywhere. At step s the feature before place j is the head's output of step s - 1
at place j - 1, so a loss at step s is that of the s-th drafted token. Attention at step s sees, of step 1, the places
up to j - s + 1, and of each later step t the place j - s + t: what a chain drafted from place j - s + 1 on would have
in its cache. All steps learn the target's own distribution at place j.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from pipeline.head import DraftHead


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences with what the target says of them, B of T tokens.

    Attributes:
        token_ids: [B, T] int64; shorter sequences stand at the end, so that outputs are side by side.
        padding: [B] int64 places before each sequence.
        states: [B, T, 3 H] hidden states of the target, place by place; 0 for padding.
        places: [N, 2] int64 sequence and place of what is learned: those that a token of the output follows.
        ids: [N, k] int64 likeliest draft tokens; probabilities: [N, k] float32, the target's.
        best: [N] int64 draft token that is the target's choice; -1 if that is no draft token.
    """

    token_ids: torch.Tensor
    padding: torch.Tensor
    states: torch.Tensor
    places: torch.Tensor
    ids: torch.Tensor
    probabilities: torch.Tensor
    best: torch.Tensor


@dataclass(frozen=True, slots=True)
class StepResult:
    """Of one step, summed over the places that count.

    Attributes:
        loss: summed cross-entropy.
        hits: how often the head's first choice is the target's.
        count: the places.
    """

    loss: torch.Tensor
    hits: torch.Tensor
    count: torch.Tensor


def unrolled(head: DraftHead, batch: Batch, steps: int) -> list[StepResult]:
    """Loss and hits of each step, all from one pass.

    Of places that only come before what is learned, keys and values are computed and nothing else.
    """
    num_tokens = batch.token_ids.shape[1]
    begin = max(int(batch.places[:, 1].min()) - steps + 1, 0)
    positions = torch.arange(num_tokens, device=batch.token_ids.device) - batch.padding[:, None]
    fused = head.features(batch.states.to(head.fuse.weight.dtype))
    features = F.pad(fused, (0, 0, 1, 0))[:, :-1]  # of the place before
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    results = []
    for step in range(steps):
        first = begin if step else 0  # of the features' places
        inputs = head.inputs(batch.token_ids[:, first:], features)
        query, key, value = head.heads(inputs, positions[:, first:])
        keys.append(key)
        values.append(value)
        skip = begin - first
        attended = _attend(query[:, skip:], keys, values, batch.padding)
        hidden = head.close(head.residual(inputs[:, skip:], features[:, skip:]), attended)
        results.append(_result(head, hidden, batch, step, begin))
        features = F.pad(hidden, (0, 0, 1, 0))[:, :-1]
    return results


def _attend(
    query: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor], padding: torch.Tensor
) -> torch.Tensor:
    """[B, Q, heads * D]: attention of the newest step, for the last Q places, over step 1's places and its own chain's.

    Args:
        query: [B, Q, heads, D]; keys, values: [B, T, K, D] of step 1, [B, Q, K, D] of each later one.
    """
    num_seqs, num_queries, num_heads, size = query.shape
    num_tokens, num_kv = keys[0].shape[1:3]
    steps = len(keys)
    grouped = query.reshape(num_seqs, num_queries, num_kv, num_heads // num_kv, size)
    queries = grouped.movedim(1, 3) * size**-0.5  # [B, K, heads / K, Q, D]

    def shaped(states: torch.Tensor) -> torch.Tensor:
        return states.transpose(1, 2)[:, :, None]  # [B, K, 1, places, D]

    base = _grouped(queries, shaped(keys[0]).squeeze(2).transpose(-1, -2))
    seen = _seen(num_queries, num_tokens, steps, padding)
    scores = [base.masked_fill(~seen[:, None, None], -torch.inf)]
    chain_values = []
    for later in range(1, steps):
        back = steps - 1 - later  # how many places before its own the chain's step stands
        key, value = (F.pad(shaped(states[later]), (0, 0, back, 0))[..., :num_queries, :] for states in (keys, values))
        scores.append((queries * key).sum(-1, keepdim=True))
        chain_values.append(value)
    weights = torch.cat(scores, dim=-1).softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    out = _grouped(weights[..., :num_tokens], shaped(values[0]).squeeze(2))
    for i, value in enumerate(chain_values):
        out = out + weights[..., num_tokens + i, None] * value
    return out.movedim(3, 1).flatten(2)


def _seen(num_queries: int, num_tokens: int, steps: int, padding: torch.Tensor) -> torch.Tensor:
    """[B, Q, T] which of step 1's places the last Q places see; padding sees itself, for it has to see something."""
    place = torch.arange(num_tokens, device=padding.device)
    newest = place[num_tokens - num_queries :, None] - steps + 1  # of the places seen, [Q, 1]
    return ((place <= newest) & (place >= padding[:, None, None])) | (place == newest)


def _grouped(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """[B, K, G, T, m] @ [B, K, m, n] for each of a key head's G query heads, without repeating what they share."""
    product = left.flatten(2, 3) @ right
    return product.reshape(*left.shape[:-1], right.shape[-1])


def _result(head: DraftHead, hidden: torch.Tensor, batch: Batch, step: int, begin: int) -> StepResult:
    row, place = batch.places.unbind(1)
    counts = (place - batch.padding[row] > step).float()  # before that a chain of so many steps does not fit
    logits = head.logits(hidden[row, place - begin]).float()
    loss = -(batch.probabilities * logits.log_softmax(dim=-1).gather(1, batch.ids)).sum(-1)
    hits = (logits.detach().argmax(dim=-1) == batch.best).float()
    return StepResult((loss * counts).sum(), (hits * counts).sum(), counts.sum())
