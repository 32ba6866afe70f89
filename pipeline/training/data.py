"""Sequences to train on: a target's own outputs behind their prompts, as batches that a seed and a number decide."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt and the target's answer.

    Attributes:
        tokens: [L] int32, prompt and output.
        num_prompt: how many of them are the prompt.
    """

    tokens: np.ndarray
    num_prompt: int


def batch_of(examples: Sequence[Example], number: int, batch_size: int, length: int, seed: int) -> list[Example]:
    """Batch `number` of an endless shuffled stream; each epoch has every example once, but for a rest.

    Longer sequences keep their end; to keep padding small, a batch is taken from a run of sequences of like length.
    """
    a_epoch = max(len(examples) // batch_size, 1)
    epoch, place = divmod(number, a_epoch)
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(examples))
    lengths = np.array([min(len(examples[i].tokens), length) for i in order])
    pools = np.array_split(order[np.argsort(lengths, kind="stable")], a_epoch)
    pool = pools[random.permutation(a_epoch)[place]]
    return [examples[i] for i in pool[:batch_size]]


def padded(examples: Sequence[Example], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, T] int64, padded with 0 behind, T at most `length`; and weights [B, T] float32.

    A place has weight 1 if the token after it belongs to the output.
    """
    width = min(max(len(example.tokens) for example in examples), length)
    token_ids = torch.zeros(len(examples), width, dtype=torch.int64)
    weights = torch.zeros(len(examples), width)
    for row, example in enumerate(examples):
        kept = example.tokens[-width:]
        first = max(example.num_prompt - (len(example.tokens) - len(kept)), 1)
        token_ids[row, : len(kept)] = torch.from_numpy(kept.astype(np.int64))
        weights[row, first - 1 : len(kept) - 1] = 1.0
    return token_ids, weights


def frequent_tokens(examples: Sequence[Example], vocab_size: int, count: int) -> torch.Tensor:
    """[count] int64, ascending: the tokens most frequent in outputs, the lower id of equally frequent ones first."""
    counts = np.zeros(vocab_size, np.int64)
    for example in examples:
        counts += np.bincount(example.tokens[example.num_prompt :], minlength=vocab_size)
    return torch.from_numpy(np.sort(np.argsort(-counts, kind="stable")[:count]))
