"""What tests of datastore jobs share: a tiny model, segments made in this process, and a store's bytes."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from datastore import Datastore
from jobs.build_datastore import append, build
from jobs.datastore_config import AppendConfig, BuildConfig, MergeConfig
from jobs.merge_datastore import merge
from jobs.segments.pool import Order, Pool, Room
from jobs.segments.task import Built

VOCABULARY = 310
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<open>{% endif %}"
)


class InlinePool:
    """Makes segments in this process, a given number of them when the driver asks what is done."""

    def __init__(self, capacity: int = 1) -> None:
        self.room = Room(capacity, 1, 0)
        self.most_pending = 0
        self._orders: list[Order] = []

    @property
    def pending(self) -> int:
        return len(self._orders)

    def submit(self, order: Order) -> None:
        self._orders.append(order)
        self.most_pending = max(self.most_pending, len(self._orders))

    def done(self) -> Iterator[tuple[Order, Built]]:
        order = self._orders.pop(0)
        yield order, order.function(*order.arguments, order.directory)


@contextlib.contextmanager
def inline() -> Iterator[Pool]:
    yield InlinePool()


def no_pool() -> contextlib.AbstractContextManager[Pool]:
    raise AssertionError("a segment is made that is there already")


@lru_cache
def _trained(merges: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=257 + merges,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog, line after line"] * 3, trainer)
    return tokenizer


def tiny_model(path: Path, *, merges: int = 20, chat: bool = False) -> Path:
    """A model directory whose tokenizer knows all bytes; its output is wider than its tokenizer. It has no weights."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_trained(merges), eos_token="<eos>", model_max_length=16)
    if chat:
        tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    LlamaConfig(vocab_size=VOCABULARY).save_pretrained(path)
    (path / "pytorch_model.bin").write_bytes(b"none")
    return path


def add_weights(model: Path, vocab_size: int, *, num_layers: int, max_context: int) -> None:
    """Gives what `tiny_model` made the weights of a random Llama, the same each time."""
    (model / "pytorch_model.bin").unlink()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_context,
        initializer_range=0.4,  # spreads the logits, so that hardly a choice is within rounding
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(model)


def write_rows(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"id": f"d{i}", "text": text}) + "\n" for i, text in enumerate(texts)))
    return path


def build_config(model: Path, output: Path, *corpus: Path | str, **options: Any) -> BuildConfig:
    paths = tuple(str(path) for path in corpus)
    return BuildConfig(
        **{"model": str(model), "output": str(output), "corpus": paths, "dense": "off", "quiet": True, **options}
    )


def run_build(model: Path, output: Path, *corpus: Path | str, **options: Any) -> int:
    return build(build_config(model, output, *corpus, **options), inline)


def run_append(model: Path, output: Path, *corpus: Path, **options: Any) -> int:
    paths = tuple(str(path) for path in corpus)
    return append(AppendConfig(model=str(model), output=str(output), corpus=paths, quiet=True, **options), inline)


def run_merge(output: Path, *inputs: Path, **options: Any) -> int:
    config = MergeConfig(output=str(output), quiet=True, **options)
    return merge(config, [str(path) for path in inputs], inline)


def content_of(store: Path) -> dict[str, bytes]:
    """Every file of a datastore, but for the lock of its lease."""
    files = (path for path in store.rglob("*") if path.is_file() and path.name != "_lease.lock")
    return {path.relative_to(store).as_posix(): path.read_bytes() for path in files}


def documents_of(store: Path) -> list[tuple[str, list[int]]]:
    """Names and tokens of all documents, in order."""
    return [
        (stored.names[d], stored.segment.document(d).tolist())
        for stored in Datastore.open(store).segments
        for d in range(stored.record.documents)
    ]


def encoded(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[tuple[str, list[int]]]:
    """What `documents_of` gives for `write_rows` of these texts."""
    return [(f"d{i}", tokenizer(text, add_special_tokens=False)["input_ids"]) for i, text in enumerate(texts)]


def outcome(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """A command's last line."""
    record: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return record
