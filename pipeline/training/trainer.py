"""The training loop of a draft head: teacher, optimiser, evaluation, checkpoints. One process, any device.

A run that is killed and loaded again goes on as if nothing had happened: batches depend on the seed and the step alone.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from pipeline.features import FeatureTap
from pipeline.head import DraftHead
from pipeline.training.data import Example, batch_of, padded
from pipeline.training.unrolled import Batch, unrolled


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """How a head is trained.

    Attributes:
        steps: optimiser steps in all.
        batch_size: sequences a step; length: most tokens of one.
        learning_rate: the highest, reached after `warmup` steps; a cosine takes it to a tenth.
        unroll: drafting steps trained at once.
        discount: weight of each further one.
    """

    steps: int
    batch_size: int = 8
    length: int = 512
    learning_rate: float = 1e-3
    warmup: int = 50
    unroll: int = 4
    discount: float = 0.8
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Means over held-out places, by drafting step, [unroll] each: loss, and share of first choices that are right."""

    loss: tuple[float, ...]
    accuracy: tuple[float, ...]


class Teacher:
    """A target that says what a head should learn."""

    def __init__(self, model: PreTrainedModel, head: DraftHead) -> None:
        self._model = model
        self._tap = FeatureTap(model, head.config.depths)
        self._token_ids = head.token_ids
        self._draft_id = torch.full((head.config.vocab_size,), -1, device=head.token_ids.device)
        self._draft_id[head.token_ids] = torch.arange(len(head.token_ids), device=head.token_ids.device)

    @torch.no_grad()
    def batch(self, examples: Sequence[Example], length: int) -> Batch:
        """One forward pass of the target over some sequences; padding stands behind, where nothing looks."""
        token_ids, weights = (tensor.to(self._model.device) for tensor in padded(examples, length))
        logits = self._model(input_ids=token_ids, use_cache=False).logits
        targets, best = [], []
        for row in logits:  # one sequence at a time: the vocabulary in fp32 is large
            scores = row.float()
            targets.append((scores[:, self._token_ids] - scores.logsumexp(-1, keepdim=True)).exp())
            best.append(self._draft_id[scores.argmax(-1)])
        return Batch(token_ids, self._tap.take().float(), torch.stack(targets), torch.stack(best), weights)


class Trainer:
    """Trains a head, in fp32, step by step.

    Args:
        head: changed in place.
        examples: to learn from; held_out: to evaluate on.
    """

    def __init__(
        self, head: DraftHead, model: PreTrainedModel, examples: Sequence[Example], options: TrainOptions
    ) -> None:
        self.head = head
        self.step = 0
        self._teacher = Teacher(model, head)
        self._examples = examples
        self._options = options
        self._optimizer = torch.optim.AdamW(head.parameters(), lr=options.learning_rate, betas=(0.9, 0.95))
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, self._rate)

    @property
    def is_done(self) -> bool:
        return self.step >= self._options.steps

    def train_step(self) -> Evaluation:
        """One optimiser step; returns what it saw before it changed anything."""
        options = self._options
        chosen = batch_of(self._examples, self.step, options.batch_size, options.length, options.seed)
        results = unrolled(self.head, self._teacher.batch(chosen, options.length), options.unroll)
        loss = sum((options.discount**i * result.loss for i, result in enumerate(results)), torch.zeros(()))
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.head.parameters(), 1.0)
        self._optimizer.step()
        self._schedule.step()
        self.step += 1
        return Evaluation(
            tuple(result.loss.item() for result in results), tuple(result.accuracy.item() for result in results)
        )

    @torch.no_grad()
    def evaluate(self, held_out: Sequence[Example]) -> Evaluation:
        """Means over sequences that it does not learn from, weighted by their places."""
        totals = torch.zeros(2, self._options.unroll)
        places = 0.0
        for begin in range(0, len(held_out), self._options.batch_size):
            chosen = held_out[begin : begin + self._options.batch_size]
            batch = self._teacher.batch(chosen, self._options.length)
            weight = float(batch.weights.sum())
            results = unrolled(self.head, batch, self._options.unroll)
            totals += weight * torch.tensor([[float(r.loss) for r in results], [float(r.accuracy) for r in results]])
            places += weight
        loss, accuracy = (totals / max(places, 1.0)).tolist()
        return Evaluation(tuple(loss), tuple(accuracy))

    def save(self, path: Path) -> None:
        """A checkpoint; what was there before stays until it is whole."""
        state = {
            "step": self.step,
            "head": self.head.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
        }
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    def load(self, path: Path) -> None:
        """Goes on from a checkpoint."""
        state = torch.load(path, weights_only=True)
        self.step = int(state["step"])
        self.head.load_state_dict(state["head"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])

    def _rate(self, step: int) -> float:
        options = self._options
        if step < options.warmup:
            return (step + 1) / options.warmup
        progress = (step - options.warmup) / max(options.steps - options.warmup, 1)
        return 0.1 + 0.45 * (1.0 + float(torch.cos(torch.tensor(min(progress, 1.0) * torch.pi))))
