"""The training loop of a draft head: optimiser, evaluation, checkpoints. Any device.

With torch.distributed set up, each worker takes its share of every batch and the sums are those of one worker alone.

A run that is killed and loaded again goes on as if nothing had happened: batches depend on the seed and the step alone.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from pipeline.head import DraftHead
from pipeline.training import workers
from pipeline.training.data import Batches, Example
from pipeline.training.lessons import LessonCache
from pipeline.training.teacher import Teacher
from pipeline.training.unrolled import Batch, StepResult, unrolled


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """How a head is trained.

    Attributes:
        steps: optimiser steps in all.
        batch_size: sequences a step; length: most tokens of one.
        learning_rate: the highest, reached after `warmup` steps; a cosine takes it to a tenth.
        unroll: drafting steps trained at once.
        discount: weight of each further one.
        is_mixed: matrix products in bfloat16; weights and optimiser stay in fp32.
    """

    steps: int
    batch_size: int = 8
    length: int = 512
    learning_rate: float = 1e-3
    warmup: int = 50
    unroll: int = 4
    discount: float = 0.8
    seed: int = 0
    is_mixed: bool = False


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Means over held-out places, by drafting step, [unroll] each: loss, and share of first choices that are right."""

    loss: tuple[float, ...]
    accuracy: tuple[float, ...]

    @staticmethod
    def of(totals: torch.Tensor) -> "Evaluation":
        """From [3, unroll] sums: loss, hits, places."""
        loss, hits, counts = totals.cpu()
        counts = counts.clamp(min=1.0)
        return Evaluation(tuple((loss / counts).tolist()), tuple((hits / counts).tolist()))


class Trainer:
    """Trains a head step by step.

    Args:
        head: changed in place.
        examples: to learn from.
        cache: of what the target says, for later epochs.

    Attributes:
        step: optimiser steps taken.
        num_tokens: places learned from in them, each as often as it was seen.
        seconds: spent on them.
    """

    def __init__(
        self,
        head: DraftHead,
        model: PreTrainedModel,
        examples: Sequence[Example],
        options: TrainOptions,
        cache: LessonCache | None = None,
    ) -> None:
        self.head = head
        self.step = 0
        self.num_tokens = 0
        self.seconds = 0.0
        self._teacher = Teacher(model, head, options.length, cache)
        self._batches = Batches(examples, options.batch_size, options.length, options.seed)
        self._options = options
        self._optimizer = torch.optim.AdamW(head.parameters(), lr=options.learning_rate, betas=(0.9, 0.95))
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, self._rate)

    @property
    def is_done(self) -> bool:
        return self.step >= self._options.steps

    def train_step(self) -> Evaluation:
        """One optimiser step; returns what it saw before it changed anything."""
        begin = time.monotonic()
        options = self._options
        chosen = self._batches[self.step]
        self._optimizer.zero_grad()
        totals = torch.zeros(3, options.unroll, device=self.head.token_ids.device)
        if mine := chosen[workers.rank() :: workers.count()]:
            results = self._unrolled(self._teacher.batch(mine))
            totals += _stacked(results)
        counts = workers.summed(totals)[2]
        if mine:
            shares = (options.discount**i / counts[i].clamp(min=1.0) for i in range(options.unroll))
            objective = torch.stack([share * result.loss for share, result in zip(shares, results, strict=True)]).sum()
            objective.backward()  # type: ignore[no-untyped-call]
        for parameter in self.head.parameters():
            parameter.grad = workers.summed(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        torch.nn.utils.clip_grad_norm_(self.head.parameters(), 1.0)
        self._optimizer.step()
        self._schedule.step()
        self.step += 1
        self.num_tokens += int(counts[0])
        self.seconds += time.monotonic() - begin
        return Evaluation.of(totals)

    @torch.no_grad()
    def evaluate(self, held_out: Sequence[Example]) -> Evaluation:
        """Means over sequences that it does not learn from."""
        totals = torch.zeros(3, self._options.unroll, device=self.head.token_ids.device)
        ordered = sorted(held_out, key=lambda example: len(example.tokens))  # less padding
        mine = ordered[workers.rank() :: workers.count()]
        for begin in range(0, len(mine), self._options.batch_size):
            chosen = mine[begin : begin + self._options.batch_size]
            totals += _stacked(self._unrolled(self._teacher.batch(chosen)))
        return Evaluation.of(workers.summed(totals))

    def save(self, path: Path) -> None:
        """Writes a checkpoint; what was there before stays until it is whole."""
        state = {
            "step": self.step,
            "num_tokens": self.num_tokens,
            "seconds": self.seconds,
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
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.step, self.num_tokens, self.seconds = int(state["step"]), int(state["num_tokens"]), state["seconds"]
        self.head.load_state_dict(state["head"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])

    def _unrolled(self, batch: Batch) -> list[StepResult]:
        with torch.autocast(batch.token_ids.device.type, torch.bfloat16, enabled=self._options.is_mixed):
            return unrolled(self.head, batch, self._options.unroll)

    def _rate(self, step: int) -> float:
        options = self._options
        if step < options.warmup:
            return (step + 1) / options.warmup
        progress = (step - options.warmup) / max(options.steps - options.warmup, 1)
        return 0.1 + 0.45 * (1.0 + float(torch.cos(torch.tensor(min(progress, 1.0) * torch.pi))))


def _stacked(results: Sequence[StepResult]) -> torch.Tensor:
    """[3, unroll] detached."""
    return torch.stack([torch.stack([r.loss, r.hits, r.count]).detach() for r in results], dim=1)
