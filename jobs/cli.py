"""The `rasd` command: finds the subcommand, sets up logging, turns errors into one line and an exit code.

A subcommand is a module with `main(arguments) -> int`, imported only when it is called, so that help is instant.
Exit codes: 0 done, 1 the job failed, 2 bad input or option, 3 stopped by the error rate, 130/143 stopped by a signal.
"""

import difflib
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from jobs import logs
from pipeline.errors import ConfigError, DatastoreError, InputError, ModelError, RasdError

COMMANDS = {
    "generate": ("jobs.generate", "generate text for a set of prompts, exactly once a row, resumable"),
    "status": ("jobs.status", "how far a generation job is, while it runs and afterwards"),
    "verify": ("jobs.verify", "read every byte of a job's output: each row once, checksums, schema"),
    "merge": ("jobs.merge", "write a job's output as one file"),
    "train-draft": ("jobs.train_draft", "train a draft head on a target's own answers, resumable"),
    "simulate": ("jobs.simulate", "play recorded generations through methods and budgets, without the target"),
    "throughput": ("jobs.throughput", "measure methods against plain decoding on a cluster, with a report to look at"),
    "datastore": ("jobs.datastore", "build, grow, show and check datastores for retrieval"),
}

log = logging.getLogger("jobs.cli")  # also where this file is the program


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    logs.set_up()
    try:
        return _run(words)
    except (ConfigError, InputError, ModelError, DatastoreError) as error:
        return _fail(error, 2)
    except RasdError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of stdout, such as `head`, has enough. Without this, Python complains once more while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(words: list[str]) -> int:
    match words:
        case [] | ["-h" | "--help", *_]:
            print(_help())
            return 0
        case ["--version", *_]:
            print(f"rasd {_version()}")
            return 0
        case [name, *rest] if name in COMMANDS:
            return int(importlib.import_module(COMMANDS[name][0]).main(rest))
        case [name, *_]:
            close = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean {close[0]}?" if close else "rasd --help lists the commands."
            raise ConfigError(f"unknown command {name!r}; {hint}")
    raise AssertionError("unreachable")


def _help() -> str:
    lines = [f"  {name:<12} {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: rasd COMMAND [options]",
            "",
            "Offline generation over large prompt sets on a Ray cluster, by retrieval-augmented speculative decoding.",
            "",
            "commands:",
            *lines,
            "",
            "  -h, --help   this text; rasd COMMAND --help tells a command's options",
            "  --version    the program's version",
        ]
    )


def _version() -> str:
    try:
        return version("rasd")
    except PackageNotFoundError:
        return "(not installed)"


def _fail(error: RasdError, code: int) -> int:
    text = " ".join(str(error).split("\n"))
    if logs.is_json():
        log.error("%s", text, extra={"error": type(error).__name__, "exit_code": code})
    else:
        print("rasd: error:", text, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
