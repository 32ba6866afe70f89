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
        token_ids: [B, T] int64.
        states: [B, T, 3 H] hidden states of the target, place by place.
        targets: [B, T, draft_vocab] the target's probabilities of the next token, those of draft tokens.
        best: [B, T] int64 draft token that is the target's choice; -1 if that is no draft token.
        weights: [B, T] float32, 0 where no token of the output follows.
    """

    token_ids: torch.Tensor
    states: torch.Tensor
    targets: torch.Tensor
    best: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True, slots=True)
class StepResult:
    """Of one step, over the places that count: mean loss, and how often the head's first choice is the target's."""

    loss: torch.Tensor
    accuracy: torch.Tensor


def unrolled(head: DraftHead, batch: Batch, steps: int) -> list[StepResult]:
    """Loss and accuracy of each step, all from one pass."""
    num_tokens = batch.token_ids.shape[1]
    positions = torch.arange(num_tokens, device=batch.token_ids.device)
    fused = head.features(batch.states)
    features = F.pad(fused, (0, 0, 1, 0))[:, :-1]  # of the place before
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    results = []
    for step in range(steps):
        query, key, value = head.heads(head.inputs(batch.token_ids, features), positions)
        keys.append(key)
        values.append(value)
        hidden = head.close(features, _attend(query, keys, values))
        results.append(_result(head.logits(hidden), batch, step))
        features = F.pad(hidden, (0, 0, 1, 0))[:, :-1]
    return results


def _attend(query: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor]) -> torch.Tensor:
    """[B, T, heads * D]: attention of the newest step over step 1's places and its own chain's."""
    num_tokens, num_heads = query.shape[1:3]
    repeat = num_heads // keys[0].shape[2]
    steps = len(keys)
    scale = query.shape[-1] ** -0.5
    queries = query.transpose(1, 2)  # [B, heads, T, D]

    def shaped(states: torch.Tensor) -> torch.Tensor:
        return states.repeat_interleave(repeat, dim=2).transpose(1, 2)

    base = queries @ shaped(keys[0]).transpose(-1, -2) * scale  # [B, heads, T, T]
    seen = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=query.device).tril(1 - steps)
    scores = [base.masked_fill(~seen, -torch.inf)]
    chain_values = []
    for later in range(1, steps):
        back = steps - 1 - later  # how many places before its own the chain's step stands
        key, value = (F.pad(shaped(states[later]), (0, 0, back, 0))[:, :, :num_tokens] for states in (keys, values))
        scores.append((queries * key).sum(-1, keepdim=True) * scale)
        chain_values.append(value)
    weights = torch.cat(scores, dim=-1).softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    out = weights[..., :num_tokens] @ shaped(values[0])
    for i, value in enumerate(chain_values):
        out = out + weights[..., num_tokens + i, None] * value
    return out.transpose(1, 2).flatten(2)


def _result(logits: torch.Tensor, batch: Batch, step: int) -> StepResult:
    weights = batch.weights.clone()
    weights[:, : step + 1] = 0.0  # a chain of that many steps does not fit before these places
    total = weights.sum().clamp(min=1.0)
    loss = -(batch.targets * logits.float().log_softmax(dim=-1)).sum(-1)
    hits = (logits.argmax(dim=-1) == batch.best).float()
    return StepResult((loss * weights).sum() / total, (hits * weights).sum() / total)
