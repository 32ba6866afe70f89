"""`rasd train-draft`: a draft head for a target, trained on the target's own answers; resumable.

rasd train-draft --model smollm2-135m --prompts prompts.jsonl --output head
ray job submit --working-dir . -- python -m jobs.train_draft --model ... --prompts ... --output ...

    OUTPUT/answers/          a generation job
    OUTPUT/checkpoint.pt     the newest state of training
    OUTPUT/curve.jsonl       evaluations by step
    OUTPUT/head.json, head.safetensors, README.md    the head, for --draft OUTPUT
"""

import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from jobs.backend import ModelBackend
from jobs.config import GenerateConfig
from jobs.files import read_json, writing
from jobs.generation import generate
from jobs.lease import Lease
from jobs.options import Parser, add_options, build_config
from jobs.report import print_table
from jobs.signals import StopSignals
from jobs.train_config import TrainConfig
from jobs.training_data import read_examples, split
from pipeline.durable import replace_json
from pipeline.errors import ConfigError, InputError
from pipeline.head import HeadConfig
from pipeline.head_files import new_head, save_head
from pipeline.models import ResolvedModel, load_causal_lm, load_tokenizer, resolve_model
from pipeline.training.data import Example, frequent_tokens
from pipeline.training.trainer import Evaluation, Trainer, TrainOptions

# What fixes the course of training; a checkpoint is of no use to another one.
_FIXED = ("draft_vocab", "rank", "epochs", "batch_size", "length", "learning_rate", "unroll", "seed", "held_out")

log = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> int:
    """Parse, validate and run; returns the exit code, raises RasdError."""
    parser = Parser(
        prog="rasd train-draft",
        usage="rasd train-draft --model MODEL --prompts PATH [PATH ...] --output DIR [options]",
        description="Train a draft head on the target's own answers. The same command again resumes.",
        epilog="Exit codes: 0 done, 1 failed, 2 bad input or option, 130/143 stopped by a signal.",
    )
    add_options(parser, TrainConfig)
    return train(build_config(TrainConfig, *parser.parse_known_args(arguments)))


def train(config: TrainConfig) -> int:
    """Answers, then training, or what is left of either.

    Raises:
        RasdError: see `pipeline.errors` for the kinds; checkpoints stay.
    """
    began = time.monotonic()
    output = Path(config.output).expanduser().absolute()
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
    if code := generate(_answers(config, output), ModelBackend()):
        return code
    resolved = resolve_model(config.model, config.revision)
    tokenizer = load_tokenizer(resolved, trust_remote_code=config.trust_remote_code)
    examples, held_out = split(read_examples(output / "answers", tokenizer), config.held_out)
    if len(examples) < config.batch_size:
        raise InputError(f"{len(examples)} answers are fewer than a batch of {config.batch_size}; give more prompts.")
    with Lease(output):
        return _train(config, output, resolved, examples, held_out, began)


def _answers(config: TrainConfig, output: Path) -> GenerateConfig:
    shared = ("model", "revision", "trust_remote_code", "dtype", "device", "max_new_tokens", "temperature")
    more = ("prompts", "text_column", "num_samples", "seed", "slots", "ray_address", "quiet")
    values = {name: getattr(config, name) for name in (*shared, *more)}
    return GenerateConfig(output=str(output / "answers"), **values)


def _train(
    config: TrainConfig,
    output: Path,
    resolved: ResolvedModel,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    began: float,
) -> int:
    if config.num_threads != "auto":
        torch.set_num_threads(config.num_threads)
    trainer = _trainer(config, output, resolved, examples)
    signals = StopSignals()
    evaluation = trainer.evaluate(held_out)
    with signals:
        while not trainer.is_done and signals.received is None:
            seen = trainer.train_step()
            if trainer.step % config.evaluate_every == 0 or trainer.is_done:
                evaluation = trainer.evaluate(held_out)
                _record(config, output, trainer, seen, evaluation)
    if signals.received is not None:
        log.warning("stopped by %s; the same command resumes", signals.received)
    else:
        save_head(trainer.head, output)
        (output / "README.md").write_text(_card(config, trainer, examples, evaluation), encoding="utf-8")
    record = {
        "state": "done" if trainer.is_done else "stopped",
        "steps": trainer.step,
        "answers": len(examples),
        "tokens": sum(len(example.tokens) - example.num_prompt for example in examples),
        "loss": list(evaluation.loss),
        "accuracy": list(evaluation.accuracy),
        "seconds": round(time.monotonic() - began, 1),
        "output": config.output,
    }
    if not config.quiet:
        print_table(record.items())
    print(json.dumps(record), flush=True)
    return signals.exit_code


def _trainer(config: TrainConfig, output: Path, resolved: ResolvedModel, examples: Sequence[Example]) -> Trainer:
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    trusted = config.trust_remote_code
    model = load_causal_lm(resolved, getattr(torch, config.dtype), device, trust_remote_code=trusted)
    shape = HeadConfig.for_target(model, resolved.hash, config.draft_vocab, config.rank)
    torch.manual_seed(config.seed)
    head = new_head(model, shape, frequent_tokens(examples, shape.vocab_size, shape.draft_vocab_size))
    steps = max(round(config.epochs * len(examples) / config.batch_size), 1)
    options = TrainOptions(
        steps=steps,
        batch_size=config.batch_size,
        length=config.length,
        learning_rate=config.learning_rate,
        unroll=config.unroll,
        seed=config.seed,
    )
    trainer = Trainer(head, model, examples, options)
    fixed = {**{name: getattr(config, name) for name in _FIXED}, "target": resolved.hash, "steps": steps}
    _resume(trainer, output, fixed)
    return trainer


def _resume(trainer: Trainer, output: Path, fixed: dict[str, Any]) -> None:
    recorded, checkpoint = read_json(output / "train.json"), output / "checkpoint.pt"
    if recorded is not None and checkpoint.exists():
        changed = [key for key in sorted({*recorded, *fixed}) if recorded.get(key) != fixed.get(key)]
        if changed:
            lines = "; ".join(f"{key}: {recorded.get(key)} -> {fixed.get(key)}" for key in changed)
            raise ConfigError(
                f"--output {output} holds another course of training: {lines}. Restore those options, or choose another"
                " --output."
            )
        trainer.load(checkpoint)
        log.info("going on from step %d", trainer.step)
        return
    with writing(output / "train.json"):
        replace_json(output / "train.json", fixed)


def _record(config: TrainConfig, output: Path, trainer: Trainer, seen: Evaluation, evaluation: Evaluation) -> None:
    """A line of the curve and a checkpoint; lines beyond a checkpoint that is gone on from come twice."""
    line = {"step": trainer.step, "training": asdict(seen), "held_out": asdict(evaluation)}
    with writing(output / "checkpoint.pt"):
        trainer.save(output / "checkpoint.pt")
        with (output / "curve.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    if not config.quiet:
        accuracy = " ".join(f"{value:.3f}" for value in evaluation.accuracy)
        log.info("step %d: held-out loss %.3f, accuracy by depth %s", trainer.step, evaluation.loss[0], accuracy)


def _card(config: TrainConfig, trainer: Trainer, examples: Sequence[Example], evaluation: Evaluation) -> str:
    """The model card."""
    tokens = sum(len(example.tokens) - example.num_prompt for example in examples)
    rows = "\n".join(
        f"| {depth} | {loss:.3f} | {accuracy:.3f} |"
        for depth, (loss, accuracy) in enumerate(zip(evaluation.loss, evaluation.accuracy, strict=True), 1)
    )
    return f"""# Draft head for {config.model}

Trained by `rasd train-draft` on {len(examples)} of the target's own answers ({tokens} tokens), {trainer.step} steps of
{config.batch_size} sequences. It drafts for this target alone: `rasd generate --model {config.model} --draft DIR`.

| drafted token | held-out loss | first choice is the target's |
|---|---|---|
{rows}
"""


if __name__ == "__main__":
    from jobs.cli import main as rasd

    sys.exit(rasd(["train-draft", *sys.argv[1:]]))
