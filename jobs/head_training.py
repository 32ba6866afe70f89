"""Training of a draft head from its data to its files: what one worker of `rasd train-draft` does."""

import json
import logging
import platform
import shutil
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from jobs.curve import CURVE, curve_line, described, plot_curve
from jobs.files import read_json, writing
from jobs.report import print_table
from jobs.train_config import TrainConfig
from jobs.training_data import corpus_examples, read_examples, split
from pipeline.digests import files_sha256
from pipeline.durable import replace_json
from pipeline.errors import ConfigError, InputError
from pipeline.head import NUM_DEPTHS, HeadConfig
from pipeline.head_files import WEIGHTS, load_head, new_head, save_head
from pipeline.models import ResolvedModel, load_causal_lm, load_tokenizer, resolve_model
from pipeline.training import workers
from pipeline.training.data import Example, frequent_tokens
from pipeline.training.lessons import LessonCache
from pipeline.training.trainer import Evaluation, Trainer, TrainOptions

# What fixes the course of training; a checkpoint is of no use to another one.
_FIXED = (
    *("dtype", "draft_vocab", "rank", "epochs", "batch_size", "length", "learning_rate", "unroll", "seed"),
    *("held_out", "corpus_tokens"),
)

CHECKPOINT = "checkpoint.pt"
_HALF = 2  # bytes

log = logging.getLogger(__name__)


def run(config: TrainConfig, began: float, stops: Callable[[], bool], device: torch.device | str) -> dict[str, Any]:
    """Trains, or goes on training, as one of the workers; the first of them writes.

    Args:
        config: with absolute paths.
        began: `time.monotonic()` at the start of the job.
        stops: whether to stop, behind a checkpoint; the first worker's answer counts.
        device: of this worker.

    Returns:
        What came of it, for `finish`.
    """
    output = Path(config.output)
    resolved = resolve_model(config.model, config.revision)
    examples, held_out = _examples(config, output, resolved)
    is_first = workers.rank() == 0
    if config.num_threads != "auto":
        torch.set_num_threads(config.num_threads)
    trainer = _trainer(config, output, resolved, examples, held_out, device)
    evaluation = trainer.evaluate(held_out)
    is_stopped = _agreed(stops, device)
    while not trainer.is_done and not is_stopped:
        seen = trainer.train_step()
        is_stopped = _agreed(stops, device)
        if trainer.step % config.evaluate_every == 0 or trainer.is_done or is_stopped:
            evaluation = trainer.evaluate(held_out)
            if is_first:
                _record(output, trainer, seen, evaluation)
    if is_first and trainer.is_done:
        with writing(output):
            save_head(trainer.head, output)
            plot_curve(output / CURVE, output / "curve.png")
            (output / "README.md").write_text(_card(config, trainer, evaluation), encoding="utf-8")
        shutil.rmtree(output / "cache", ignore_errors=True)
    return {
        "state": "done" if trainer.is_done else "stopped",
        "steps": trainer.step,
        "sequences": len(examples),
        "tokens": trainer.num_tokens,
        "loss": list(evaluation.loss),
        "accuracy": list(evaluation.accuracy),
        "seconds": round(time.monotonic() - began, 1),
        "output": config.output,
    }


def _agreed(stops: Callable[[], bool], device: torch.device | str) -> bool:
    flag = torch.tensor(float(workers.rank() == 0 and stops()), device=device)
    return bool(workers.summed(flag))


def finish(config: TrainConfig, record: dict[str, Any]) -> None:
    """Prints what came of it: a table, and a last line for programs."""
    if not config.quiet:
        print_table(record.items())
    print(json.dumps(record), flush=True)


def _examples(config: TrainConfig, output: Path, resolved: ResolvedModel) -> tuple[list[Example], list[Example]]:
    """To learn from, and held out. Documents are only learned from, unless there are no answers."""
    tokenizer = load_tokenizer(resolved, trust_remote_code=config.trust_remote_code)
    jobs = [*([str(output / "answers")] if config.prompts else []), *config.answers]
    answers = [example for job in jobs for example in read_examples(job, tokenizer)]
    documents: list[Example] = []
    if config.corpus:
        documents = corpus_examples(config.corpus, tokenizer, config.length, config.corpus_tokens)
    examples, held_out = split(answers or documents, config.held_out)
    if answers:
        examples += documents
    if len(held_out) == 0 or len(examples) < config.batch_size:
        raise InputError(
            f"there are {len(examples)} sequences to learn from, fewer than a batch of {config.batch_size}; give more"
            " prompts, answers or documents."
        )
    return examples, held_out


def _trainer(
    config: TrainConfig,
    output: Path,
    resolved: ResolvedModel,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    device: torch.device | str,
) -> Trainer:
    trusted = config.trust_remote_code
    model = load_causal_lm(resolved, getattr(torch, config.dtype), device, trust_remote_code=trusted)
    torch.manual_seed(config.seed)
    if config.initial is not None:
        head = load_head(Path(config.initial), model, resolved.hash).float().requires_grad_(True)
    else:
        shape = HeadConfig.for_target(model, resolved.hash, config.draft_vocab, config.rank)
        head = new_head(model, shape, frequent_tokens(examples, shape.vocab_size, shape.draft_vocab_size))
    steps = max(round(config.epochs * len(examples) / config.batch_size), 1)
    options = TrainOptions(
        steps=steps,
        batch_size=config.batch_size,
        length=config.length,
        learning_rate=config.learning_rate,
        unroll=config.unroll,
        seed=config.seed,
        is_mixed=config.dtype == "bfloat16",
    )
    fixed = {name: getattr(config, name) for name in _FIXED}
    initial = None if config.initial is None else files_sha256([Path(config.initial) / WEIGHTS])
    data = sum(int(zlib.crc32(example.tokens.tobytes())) for example in (*examples, *held_out))
    fixed |= {"target": resolved.hash, "initial head": initial, "answers and documents": data}
    goes_on = _is_begun(output, fixed)  # another course is refused before gigabytes are reserved
    cache = _cache(config, output, [*held_out, *examples], model) if config.cache else None
    trainer = Trainer(head, model, examples, options, cache)
    if goes_on:
        trainer.load(output / CHECKPOINT)
        log.info("going on from step %d", trainer.step)
    return trainer


def _cache(
    config: TrainConfig, output: Path, examples: Sequence[Example], model: PreTrainedModel
) -> LessonCache | None:
    """Made anew at every start: what a machine that crashed left of it may be torn."""
    if model.dtype.itemsize != _HALF:
        log.info("no cache of the target's states: it takes a --dtype of 16 bits")
        return None
    width = NUM_DEPTHS * int(model.config.get_text_config().hidden_size)
    directory = output / "cache" / platform.node()

    def opened(is_new: bool) -> LessonCache:
        with writing(directory):
            return LessonCache(directory, examples, config.length, width, model.dtype, config.cache, is_new)

    cache = opened(True) if workers.local_rank() == 0 else None
    workers.summed(torch.zeros(1, device=model.device))  # the others wait for it
    return cache or opened(False)


def _is_begun(output: Path, fixed: dict[str, Any]) -> bool:
    """Whether there is a checkpoint of this very course of training; if not, the course is written down.

    Raises:
        ConfigError: there is one of another course.
    """
    recorded = read_json(output / "train.json")
    if recorded is None or not (output / CHECKPOINT).exists():
        with writing(output / "train.json"):
            replace_json(output / "train.json", fixed)
        return False
    changed = [key for key in sorted({*recorded, *fixed}) if recorded.get(key) != fixed.get(key)]
    if changed:
        lines = "; ".join(f"{key}: {recorded.get(key)} -> {fixed.get(key)}" for key in changed)
        raise ConfigError(
            f"--output {output} holds another course of training: {lines}. Restore that or choose another --output."
        )
    return True


def _record(output: Path, trainer: Trainer, seen: Evaluation, evaluation: Evaluation) -> None:
    """A line of the curve, then a checkpoint: a step that is repeated after a kill comes twice in the curve."""
    line = curve_line(trainer.step, trainer.num_tokens, seen, evaluation)
    with writing(output / CURVE), (output / CURVE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    log.info("%s", described(line))
    with writing(output / CHECKPOINT):
        trainer.save(output / CHECKPOINT)


def _card(config: TrainConfig, trainer: Trainer, evaluation: Evaluation) -> str:
    """The model card."""
    shape = trainer.head.config
    is_cuda = trainer.head.token_ids.is_cuda
    device = torch.cuda.get_device_name() if is_cuda else f"{torch.get_num_threads()} CPU thread(s) each"
    rows = "\n".join(
        f"| {depth} | {loss:.3f} | {accuracy:.3f} |"
        for depth, (loss, accuracy) in enumerate(zip(evaluation.loss, evaluation.accuracy, strict=True), 1)
    )
    return f"""# Draft head for {config.model}

Trained by `rasd train-draft` for the target with hash `{shape.target}` and no other: {trainer.step} steps of
{config.batch_size} sequences, {trainer.num_tokens:,} target tokens learned, {trainer.seconds / 3600:.2f} hours of
{workers.count()} worker(s) on {device}. It proposes {shape.draft_vocab_size:,} of the target's {shape.vocab_size:,}
tokens; embedding and output matrix are the target's own and not stored here.

| drafted token | held-out loss | first choice is the target's |
|---|---|---|
{rows}

Use: `rasd generate --model {config.model} --draft DIR`
"""
