"""`rasd generate`: prompts in, Parquet out, on a Ray cluster; resumable, every row exactly once.

rasd generate --model smollm2-135m --prompts prompts.jsonl --output out
ray job submit --working-dir . -- python -m jobs.generate --model ... --prompts ... --output ...
"""

import sys
from collections.abc import Sequence

from jobs import logs
from jobs.config import GenerateConfig
from jobs.options import Parser, add_options, build_config


def main(arguments: Sequence[str]) -> int:
    """Parse, validate and run; returns the exit code, raises RasdError."""
    parser = Parser(
        prog="rasd generate",
        usage="rasd generate --model MODEL --prompts PATH [PATH ...] --output DIR [options]",
        description="Generate text for every prompt. The same command again resumes an unfinished job.",
        epilog="Exit codes: 0 done, 1 failed, 2 bad input or option, 3 too many errors, 130/143 stopped by a signal.",
    )
    add_options(parser, GenerateConfig)
    known, unknown = parser.parse_known_args(arguments)
    config = build_config(GenerateConfig, known, unknown)
    logs.use(config.log_format)
    # Ray, torch and transformers take seconds to import, which help and mistyped options need not wait for.
    from jobs.backend import ModelBackend
    from jobs.generation import generate

    return generate(config, ModelBackend())


if __name__ == "__main__":
    from jobs.cli import main as rasd

    sys.exit(rasd(["generate", *sys.argv[1:]]))
