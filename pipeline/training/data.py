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


class Batches:
    """An endless shuffled stream of batches that a seed and a number decide.

    Each epoch has every example once, but for a random rest that fills no batch. Longer sequences keep their end; to
    keep padding small, a batch holds sequences of like length.
    """

    def __init__(self, examples: Sequence[Example], batch_size: int, length: int, seed: int) -> None:
        self._examples = examples
        self._lengths = np.array([min(len(example.tokens), length) for example in examples])
        self._batch_size = min(batch_size, len(examples))
        self._seed = seed
        self._epoch = -1
        self._batches = np.empty((0, batch_size), np.int64)

    def __getitem__(self, number: int) -> list[Example]:
        an_epoch = len(self._examples) // self._batch_size
        epoch, place = divmod(number, an_epoch)
        if epoch != self._epoch:
            random = np.random.default_rng([self._seed, epoch])
            chosen = random.permutation(len(self._examples))[: an_epoch * self._batch_size]
            order = chosen[np.argsort(self._lengths[chosen], kind="stable")]
            self._batches = random.permutation(order.reshape(an_epoch, self._batch_size))
            self._epoch = epoch
        return [self._examples[i] for i in self._batches[place]]


def span(example: Example, length: int) -> tuple[int, int]:
    """How many tokens of a sequence are kept, at most `length`, and the first of them that belongs to the output."""
    kept = min(len(example.tokens), length)
    return kept, max(example.num_prompt - (len(example.tokens) - kept), 1)


def padded(examples: Sequence[Example], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, T] int64, padded with 0 behind, T at most `length`; and places [N, 2] int64, sequence and place.

    The places are those that a token of the output follows.
    """
    width = min(max(len(example.tokens) for example in examples), length)
    token_ids = torch.zeros(len(examples), width, dtype=torch.int64)
    follows = torch.zeros(len(examples), width, dtype=torch.bool)
    for row, example in enumerate(examples):
        kept, first = span(example, length)
        token_ids[row, :kept] = torch.from_numpy(example.tokens[-kept:].astype(np.int64))
        follows[row, first - 1 : kept - 1] = True
    return token_ids, follows.nonzero()


def frequent_tokens(examples: Sequence[Example], vocab_size: int, count: int) -> torch.Tensor:
    """[count] int64, ascending: the tokens most frequent in outputs, the lower id of equally frequent ones first."""
    counts = np.zeros(vocab_size, np.int64)
    for example in examples:
        counts += np.bincount(example.tokens[example.num_prompt :], minlength=vocab_size)
    return torch.from_numpy(np.sort(np.argsort(-counts, kind="stable")[:count]))
