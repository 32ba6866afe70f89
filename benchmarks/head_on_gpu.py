"""Trains the head that comes with the project on one GPU, in minutes: its answers are sampled in bulk and never stored.

    python -m benchmarks.head_on_gpu tokenise --model DIR --prompts prompts.jsonl --output prompts.npz
    python -m benchmarks.head_on_gpu train --model DIR --prompts prompts.npz --initial pipeline/heads/smollm2-135m \\
        --answer-seconds 200 --train-seconds 250 --output OUTPUT

`train` needs torch, transformers, numpy, numba, psutil and safetensors only. How much is answered and learned is what
the seconds allow, so two runs differ; for heads that can be trained again to the bit there is `rasd train-draft`.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.gpu_answers import AnswerSampler, batches
from jobs.curve import CURVE, curve_line, described
from pipeline.assemble import eos_token_ids
from pipeline.head import DraftHead
from pipeline.head_files import load_head, new_head, read_config, save_head
from pipeline.prompts import encode_messages
from pipeline.training.data import Example, frequent_tokens
from pipeline.training.trainer import Trainer, TrainOptions

_TEMPERATURES = (0.0, 0.7, 1.0, 1.0)  # of the answers to one prompt
_QUESTION_TEMPERATURES = (0.8, 1.0)
_MAX_QUESTION = 96  # tokens
_NUM_HELD_OUT = 64  # prompts
_TIMED_STEPS = 20


def main() -> None:
    """Command line."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = arguments.add_subparsers(dest="command", required=True)
    tokenise = commands.add_parser("tokenise", help="chat prompts as token ids, for a machine without them")
    train = commands.add_parser("train", help="sample answers, then train")
    for command in (tokenise, train):
        command.add_argument("--model", required=True, help="directory of a Llama in the Hugging Face layout")
        command.add_argument("--prompts", type=Path, required=True)
        command.add_argument("--output", type=Path, required=True)
    tokenise.add_argument("--max-prompt", type=int, default=512, help="longer prompts are left out")
    train.add_argument("--initial", type=Path, required=True, help="head of this target to start from")
    train.add_argument("--answer-seconds", type=float, default=200.0)
    train.add_argument("--train-seconds", type=float, default=250.0)
    train.add_argument("--questions", type=int, default=20_000, help="prompts that the model itself makes up")
    train.add_argument("--prompts-at-once", type=int, default=512)
    train.add_argument("--max-new-tokens", type=int, default=192)
    train.add_argument("--batch-size", type=int, default=64)
    train.add_argument("--learning-rate", type=float, default=1e-3)
    train.add_argument("--unroll", type=int, default=4)
    train.add_argument("--evaluate-every", type=int, default=300)
    train.add_argument("--device", default="cuda")
    options = arguments.parse_args()
    _tokenise(options) if options.command == "tokenise" else _train(options)


def _tokenise(options: argparse.Namespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = (json.loads(line) for line in options.prompts.read_text("utf-8").splitlines())
    encoded = [encode_messages(tokenizer, row["messages"]) for row in rows]
    kept = [np.array(ids, np.int32) for ids in encoded if len(ids) <= options.max_prompt]
    np.savez_compressed(options.output, tokens=np.concatenate(kept), lengths=[len(ids) for ids in kept])


def _train(options: argparse.Namespace) -> None:
    began = time.monotonic()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).to(options.device)
    with np.load(options.prompts) as file:
        prompts = np.split(file["tokens"].astype(np.int32), np.cumsum(file["lengths"])[:-1])
    questions = _questions(model, prompts, options)
    print(f"{time.monotonic() - began:.0f} s: {len(questions)} questions of its own", flush=True)
    prompts += questions
    kept_out = np.random.default_rng(0).permutation(len(prompts))[:_NUM_HELD_OUT]
    held_out_prompts = [prompts[i] for i in kept_out]
    prompts = [prompt for i, prompt in enumerate(prompts) if i not in set(kept_out.tolist())]
    print(f"{time.monotonic() - began:.0f} s: model and {len(prompts)} prompts loaded", flush=True)

    sampler = _sampler(model, prompts, options, options.prompts_at_once)
    examples: list[Example] = []
    until = time.monotonic() + options.answer_seconds
    for batch in batches(prompts, options.prompts_at_once, seed=0):
        examples += sampler.answers(batch)
        if time.monotonic() > until:
            break
    del sampler
    torch.cuda.empty_cache()
    held_out = _sampler(model, held_out_prompts, options, _NUM_HELD_OUT).answers(held_out_prompts)
    num_tokens = sum(len(example.tokens) - example.num_prompt for example in examples)
    print(f"{time.monotonic() - began:.0f} s: {len(examples)} answers, {num_tokens} tokens", flush=True)

    head = _new_head(model, examples, options.initial)
    seconds = _step_seconds(model, examples, options)
    steps = int(options.train_seconds / seconds)
    print(f"{time.monotonic() - began:.0f} s: {seconds:.4f} s a step, so {steps} steps", flush=True)
    trainer = Trainer(head, model, examples, _options(options, steps))
    target = read_config(options.initial).target
    before = load_head(options.initial, model, target).float()
    record = {"answers": len(examples), "answer_tokens": num_tokens, "steps": steps, "batch_size": options.batch_size}
    record["initial"] = _evaluations(Trainer(before, model, examples, _options(options, steps)), held_out)
    record["device"] = torch.cuda.get_device_name() if options.device == "cuda" else options.device
    print(json.dumps(record["initial"]), flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 1.2 * options.train_seconds
    with (options.output / CURVE).open("w") as curve:
        while not trainer.is_done and time.monotonic() < deadline:
            seen = trainer.train_step()
            if trainer.step % options.evaluate_every == 0 or trainer.is_done:
                evaluation = trainer.evaluate(held_out)
                line = curve_line(trainer.step, trainer.num_tokens, seen, evaluation)
                curve.write(json.dumps(line) + "\n")
                curve.flush()
                save_head(head, options.output)
                print(f"{time.monotonic() - began:.0f} s: {described(line)}", flush=True)
    save_head(head, options.output)
    record |= {"trained": _evaluations(trainer, held_out), "learned": trainer.num_tokens, "seconds": trainer.seconds}
    record["total_seconds"] = time.monotonic() - began
    (options.output / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record), flush=True)


def _sampler(
    model: AutoModelForCausalLM, prompts: Sequence[np.ndarray], options: argparse.Namespace, at_once: int
) -> AnswerSampler:
    longest = max(len(prompt) for prompt in prompts)
    return AnswerSampler(model, at_once, _TEMPERATURES, longest, options.max_new_tokens, eos_token_ids(model))


def _questions(
    model: AutoModelForCausalLM, prompts: Sequence[np.ndarray], options: argparse.Namespace
) -> list[np.ndarray]:
    """What the model itself writes where a user's turn begins (Magpie, Xu et al., arXiv 2406.08464), as prompts."""
    begin = prompts[0][: _num_shared(prompts)]
    end = prompts[0][len(prompts[0]) - _num_shared([prompt[::-1] for prompt in prompts]) :]
    at_once = options.prompts_at_once * len(_TEMPERATURES)
    temperatures = _QUESTION_TEMPERATURES * (at_once // len(_QUESTION_TEMPERATURES))
    eos_ids = eos_token_ids(model)
    sampler = AnswerSampler(model, 1, temperatures, len(begin), _MAX_QUESTION, eos_ids)
    found: dict[bytes, np.ndarray] = {}
    for _ in range(2 * -(-options.questions // at_once)):
        for example in sampler.answers([begin]):
            if example.tokens[-1] in eos_ids:
                question = np.concatenate([example.tokens[:-1], end])
                found[question.tobytes()] = question
        if len(found) >= options.questions:
            break
    return list(found.values())[: options.questions]


def _num_shared(prompts: Sequence[np.ndarray]) -> int:
    """How many tokens all begin with."""
    shortest = min(len(prompt) for prompt in prompts)
    differs = np.any([prompt[:shortest] != prompts[0][:shortest] for prompt in prompts], axis=0)
    return int(differs.argmax()) if differs.any() else shortest


def _new_head(model: AutoModelForCausalLM, examples: Sequence[Example], initial: Path) -> DraftHead:
    """A head with the weights of another, but the vocabulary of these answers."""
    config = read_config(initial)
    old = load_head(initial, model, config.target).float()
    head = new_head(model, config, frequent_tokens(examples, config.vocab_size, config.draft_vocab_size))
    with torch.no_grad():
        parameters = dict(head.named_parameters())
        for name, value in old.named_parameters():
            if name != "widen.weight":
                parameters[name].copy_(value)
        if head.widen is not None and old.widen is not None:
            rows = torch.zeros(config.vocab_size, config.rank, device=model.device)
            rows[old.token_ids] = old.widen.weight
            head.widen.weight.copy_(rows[head.token_ids])
    return head


def _options(options: argparse.Namespace, steps: int) -> TrainOptions:
    return TrainOptions(
        steps=steps,
        batch_size=options.batch_size,
        length=512 + options.max_new_tokens,
        learning_rate=options.learning_rate,
        warmup=100,
        unroll=options.unroll,
        is_mixed=True,
    )


def _step_seconds(model: AutoModelForCausalLM, examples: Sequence[Example], options: argparse.Namespace) -> float:
    """Of a training step, measured on a head that is thrown away."""
    trainer = Trainer(_new_head(model, examples, options.initial), model, examples, _options(options, 1000))
    for _ in range(5):
        trainer.train_step()
    begin = time.monotonic()
    for _ in range(_TIMED_STEPS):
        trainer.train_step()
    return (time.monotonic() - begin) / _TIMED_STEPS


def _evaluations(trainer: Trainer, held_out: Sequence[Example]) -> dict[str, dict[str, list[float]]]:
    """By temperature of the held-out answers, which stand in the order of `_TEMPERATURES`, prompt by prompt."""
    found = {}
    for temperature in sorted(set(_TEMPERATURES)):
        columns = [i for i, value in enumerate(_TEMPERATURES) if value == temperature]
        some = [example for i, example in enumerate(held_out) if i % len(_TEMPERATURES) in columns]
        found[str(temperature)] = dataclasses.asdict(trainer.evaluate(some))
    return found


if __name__ == "__main__":
    main()
