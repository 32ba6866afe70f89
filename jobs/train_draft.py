"""`rasd train-draft`: a draft head for a target, trained on the target's own answers; resumable.

rasd train-draft --model smollm2-135m --prompts prompts.jsonl --output my-head
ray job submit --working-dir . -- python -m jobs.train_draft --model ... --prompts ... --output ...

    OUTPUT/answers/          a generation job
    OUTPUT/checkpoint.pt     the newest state of training
    OUTPUT/curve.jsonl       evaluations by step; curve.png at the end
    OUTPUT/head.json, head.safetensors, README.md    the head, for --draft OUTPUT
"""

import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from jobs import logs
from jobs.backend import ModelBackend, anywhere
from jobs.config import GenerateConfig
from jobs.files import writing
from jobs.generation import generate, output_directory
from jobs.head_training import finish, run
from jobs.lease import Lease
from jobs.options import Parser, add_options, build_config
from jobs.signals import StopSignals
from jobs.train_config import TrainConfig
from jobs.training_data import absolute, check_answers
from pipeline.errors import ConfigError
from pipeline.head_files import check_target
from pipeline.models import ResolvedModel, resolve_model

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
    config = build_config(TrainConfig, *parser.parse_known_args(arguments))
    logs.use(config.log_format)
    return train(config)


def train(config: TrainConfig) -> int:
    """Answers, then training, or what is left of either.

    Raises:
        RasdError: see `pipeline.errors` for the kinds; checkpoints stay.
    """
    began = time.monotonic()
    if not (config.prompts or config.answers or config.corpus):
        raise ConfigError("--prompts, --answers and --corpus are all missing; give at least one to learn from.")
    if config.num_workers > config.batch_size:
        raise ConfigError(
            f"--num-workers is {config.num_workers}; they share the {config.batch_size} sequences of --batch-size. Ask"
            " for fewer, or for a larger batch."
        )
    output = output_directory(config.output)
    resolved = resolve_model(config.model, config.revision)
    config = _anywhere(config, output, resolved)
    for answers in config.answers:
        check_answers(answers, resolved.hash)
    if config.initial is not None:
        check_target(Path(config.initial), resolved.hash)
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
    if config.prompts and (code := generate(_answers(config), ModelBackend())):
        return code
    signals = StopSignals()
    with Lease(output):
        if config.num_workers > 1:
            from jobs.train_workers import run_workers  # Ray Train takes seconds to import

            record = run_workers(config, began, signals)
        else:
            device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
            with signals:
                record = run(config, began, lambda: signals.received is not None, device)
    if signals.received is not None:
        log.warning("stopped by %s; the same command resumes", signals.received)
    finish(config, record)
    return signals.exit_code


def _anywhere(config: TrainConfig, output: Path, resolved: ResolvedModel) -> TrainConfig:
    """The same in a worker's working directory and on its node: absolute paths, and the very commit of a hub model."""
    values = {
        "output": str(output.absolute()),
        "answers": tuple(absolute(answers) for answers in config.answers),
        "corpus": tuple(absolute(spec) for spec in config.corpus),
        "initial": None if config.initial is None else absolute(config.initial),
        "model": anywhere(config.model),
        "revision": resolved.revision,
    }
    return config.model_copy(update=values)


def _answers(config: TrainConfig) -> GenerateConfig:
    shared = ("model", "revision", "trust_remote_code", "dtype", "device", "max_new_tokens", "temperature")
    more = ("prompts", "text_column", "num_samples", "seed", "slots", "ray_address", "quiet")
    values = {name: getattr(config, name) for name in (*shared, *more)}
    return GenerateConfig(output=str(Path(config.output) / "answers"), **values)


if __name__ == "__main__":
    from jobs.cli import main as rasd

    sys.exit(rasd(["train-draft", *sys.argv[1:]]))
