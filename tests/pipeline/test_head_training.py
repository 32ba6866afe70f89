"""Training of draft heads: batches, the cache of what the target says, resumption, several workers."""

import dataclasses
import multiprocessing as mp
import socket
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.reference import generate
from pipeline.head import HeadConfig
from pipeline.head_files import new_head
from pipeline.training.data import Batches, Example, frequent_tokens, padded
from pipeline.training.lessons import LessonCache
from pipeline.training.teacher import Teacher
from pipeline.training.trainer import Trainer, TrainOptions
from pipeline.training.unrolled import Batch, unrolled
from tests.models import VOCABULARY, tiny_model
from tests.pipeline.test_engine_architectures import prompts_for
from tests.pipeline.test_head import head_for


def examples_of(count: int) -> list[Example]:
    """Prompts with the tiny target's own outputs."""
    model = tiny_model("llama")
    prompts = prompts_for(21, count)
    return [Example(np.array([*prompt, *generate(model, prompt, 24)], np.int32), len(prompt)) for prompt in prompts]


def trainer_of(examples: list[Example], steps: int) -> Trainer:
    model = tiny_model("llama")
    config = HeadConfig.for_target(model, "target", VOCABULARY, 4)
    torch.manual_seed(0)
    head = new_head(model, config, torch.arange(VOCABULARY))
    options = TrainOptions(steps=steps, batch_size=4, length=64, learning_rate=3e-3, warmup=5, unroll=3)
    return Trainer(head, model, examples, options)


def test_training_learns_and_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    examples = examples_of(8)
    trainer = trainer_of(examples, 60)
    before = trainer.evaluate(examples)
    for _ in range(30):
        trainer.train_step()
    trainer.save(tmp_path / "checkpoint.pt")
    resumed = trainer_of(examples, 60)
    resumed.load(tmp_path / "checkpoint.pt")
    while not trainer.is_done:
        assert trainer.train_step() == resumed.train_step()
    after = trainer.evaluate(examples)
    assert resumed.is_done and after == resumed.evaluate(examples)
    assert all(a < b - 0.3 for a, b in zip(after.loss, before.loss, strict=True)), (before, after)
    assert all(a > b for a, b in zip(after.accuracy, before.accuracy, strict=True)), (before, after)


def test_what_is_cached_is_what_the_target_said(tmp_path: Path) -> None:
    examples = examples_of(6)
    head, model = head_for("llama").bfloat16(), tiny_model("llama").bfloat16()
    sizes = [3 * 32 * 2 * min(len(e.tokens), 40) + 388 * min(len(e.tokens) - e.num_prompt, 39) for e in examples]
    caches = [
        LessonCache(tmp_path, examples, 40, 96, torch.bfloat16, sum(sizes[:4]), is_new) for is_new in (True, False)
    ]
    first, second = (Teacher(model, head, 40, cache) for cache in caches)
    kept, chosen = [examples[i] for i in (3, 0, 1)], [examples[i] for i in (5, 1, 4)]
    expected = Teacher(model, head, 40).batch(kept)
    assert_same(first.batch(kept), expected)
    first.batch(chosen)
    assert [cache.get(examples[i]) is not None for cache in caches for i in range(6)] == [1, 1, 0, 1, 0, 0] * 2
    second._lessons = None  # type: ignore[assignment,method-assign]  # the target is not asked again
    assert_same(second.batch(kept), expected)


def assert_same(batch: Batch, expected: Batch) -> None:
    for field in dataclasses.fields(Batch):
        assert torch.equal(getattr(batch, field.name), getattr(expected, field.name)), field.name


def test_sequences_side_by_side_are_what_they_are_alone() -> None:
    head, examples = head_for("llama"), examples_of(5)
    teacher = Teacher(tiny_model("llama"), head, 34)
    alone = [unrolled(head, teacher.batch([example]), 3) for example in examples]
    together = unrolled(head, teacher.batch(examples), 3)
    for step, result in enumerate(together):
        for name in ("loss", "hits", "count"):
            expected = sum(getattr(results[step], name) for results in alone)
            torch.testing.assert_close(getattr(result, name), expected, rtol=1e-4, atol=1e-4)
    lengths = {len(example.tokens) for example in examples}
    assert len(lengths) > 2 and max(lengths) > 34


def test_padding_passes_no_gradient_that_is_no_number() -> None:
    head, examples = head_for("llama").requires_grad_(True), examples_of(4)
    batch = Teacher(tiny_model("llama"), head, 34).batch(examples)
    sum(result.loss for result in unrolled(head, batch, 3)).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in head.parameters())


def test_only_places_before_output_tokens_count() -> None:
    examples = [Example(np.arange(10, dtype=np.int32), 4), Example(np.arange(20, dtype=np.int32), 15)]
    token_ids, places = padded(examples, 12)
    assert token_ids[0].tolist() == [*range(10), 0, 0]
    assert token_ids[1].tolist() == list(range(8, 20))
    assert places.tolist() == [[0, place] for place in range(3, 9)] + [[1, place] for place in range(6, 11)]


@pytest.mark.parametrize(("count", "batch_size"), [(24, 4), (15, 8), (29, 4), (3, 8)])
def test_every_epoch_has_every_example_once_but_for_a_random_rest(count: int, batch_size: int) -> None:
    examples = [Example(np.full(length, 7, np.int32), 1) for length in range(2, 2 + count)]
    batches = Batches(examples, batch_size, 64, seed=5)
    size = min(batch_size, count)
    an_epoch = count // size
    seen: set[int] = set()
    for epoch in range(8):
        chosen = [batches[number] for number in range(an_epoch * epoch, an_epoch * (epoch + 1))]
        lengths = [len(example.tokens) for batch in chosen for example in batch]
        assert len(lengths) == len(set(lengths)) == an_epoch * size
        assert all(max(map(len_of, batch)) - min(map(len_of, batch)) < size + count % size for batch in chosen)
        seen |= set(lengths)
    assert len(seen) == count
    again = Batches(examples, batch_size, 64, seed=5)
    assert again[an_epoch + 1] == batches[an_epoch + 1]


def len_of(example: Example) -> int:
    return len(example.tokens)


def test_the_draft_vocabulary_is_what_outputs_use_most() -> None:
    examples = [Example(np.array([1, 1, 1, 5, 5, 9, 3], np.int32), 3)]
    assert frequent_tokens(examples, 12, 3).tolist() == [3, 5, 9]
    assert frequent_tokens(examples, 12, 1).tolist() == [5]


def _train_share(rank: int, size: int, port: int, examples: list[Example], results: "mp.Queue[list[float]]") -> None:
    """One of `size` workers."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    trainer = trainer_of(examples, 20)
    losses = [trainer.train_step().loss[0] for _ in range(5)]
    losses += trainer.evaluate(examples).loss
    if rank == 0:
        results.put(losses)
    torch.distributed.destroy_process_group()


def test_several_workers_do_what_one_does() -> None:
    examples = examples_of(7)  # no multiple of the workers
    alone = trainer_of(examples, 20)
    expected = [alone.train_step().loss[0] for _ in range(5)]
    expected += alone.evaluate(examples).loss
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=_train_share, args=(rank, 3, port, examples, results)) for rank in range(3)]
    for worker in workers:
        worker.start()
    got = results.get(timeout=120)
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert got == pytest.approx(expected, rel=1e-4)
