"""`rasd datastore`: builds, grows, shows and checks datastores.

A subcommand's work is imported only when it is called: help and mistyped options need not wait for torch.
"""

import argparse
import difflib
from collections.abc import Callable, Sequence
from pathlib import Path

from jobs import logs
from jobs.datastore_config import AppendConfig, BuildConfig, MergeConfig
from jobs.options import Parser, add_options, build_config
from pipeline.errors import ConfigError

_SUMMARIES = {
    "build": "make a datastore of a corpus",
    "append": "add documents to a datastore",
    "merge": "make one datastore of several",
    "inspect": "say what a datastore holds",
    "verify": "read every byte and say what is damaged",
    "query": "look up tokens, or search passages for a text",
}


def main(arguments: Sequence[str]) -> int:
    """Run one subcommand; returns the exit code, raises RasdError."""
    match list(arguments):
        case [] | ["-h" | "--help", *_]:
            print(_help())
            return 0
        case [name, *rest] if name in _COMMANDS:
            return _COMMANDS[name](rest)
        case [name, *_]:
            close = difflib.get_close_matches(name, _COMMANDS, n=1)
            hint = f"did you mean {close[0]}?" if close else "rasd datastore --help lists the commands."
            raise ConfigError(f"unknown command datastore {name!r}; {hint}")
    raise AssertionError("unreachable")


def _build(arguments: Sequence[str]) -> int:
    parser = _parser("build", "--corpus PATH [PATH ...] --model MODEL --output DIR [options]")
    add_options(parser, BuildConfig)
    config = build_config(BuildConfig, *parser.parse_known_args(arguments))
    logs.use(config.log_format)
    from jobs.build_datastore import build

    return build(config)


def _append(arguments: Sequence[str]) -> int:
    parser = _parser("append", "--corpus PATH [PATH ...] --model MODEL --output DIR [options]")
    add_options(parser, AppendConfig)
    config = build_config(AppendConfig, *parser.parse_known_args(arguments))
    logs.use(config.log_format)
    from jobs.build_datastore import append

    return append(config)


def _merge(arguments: Sequence[str]) -> int:
    parser = _parser("merge", "DIR DIR [DIR ...] --output DIR [options]")
    parser.add_argument("inputs", nargs="+", metavar="DIR", help="a datastore")
    add_options(parser, MergeConfig)
    known, unknown = parser.parse_known_args(arguments)
    config = build_config(MergeConfig, known, unknown)
    logs.use(config.log_format)
    from jobs.merge_datastore import merge

    return merge(config, known.inputs)


def _inspect(arguments: Sequence[str]) -> int:
    store = _store(_parser("inspect", "DIR"), arguments)
    from jobs.inspect_datastore import inspect

    return inspect(store)


def _verify(arguments: Sequence[str]) -> int:
    store = _store(_parser("verify", "DIR", "Exit codes: 0 intact, 1 damaged, 2 no datastore."), arguments)
    from jobs.inspect_datastore import verify

    return verify(store)


def _query(arguments: Sequence[str]) -> int:
    parser = _parser("query", "DIR (--tokens IDS ... | --text TEXT ...) [options]")
    parser.add_argument("store", metavar="DIR", help="a datastore")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--tokens", metavar="IDS", nargs="+", type=_ids, default=[], help="contexts, e.g. 1,2,3")
    asked.add_argument("--text", metavar="TEXT", nargs="+", default=[], help="texts to find passages for")
    parser.add_argument("--k", metavar="N", type=_count, default=5, help="passages a text (default: 5)")
    parser.add_argument("--model", metavar="TEXT", help="model whose tokenizer shows tokens as text")
    parser.add_argument("--json", action="store_true", help="print JSON")
    known = parser.parse_args(arguments)
    from jobs.query_datastore import query

    return query(Path(known.store), known.tokens, known.text, k=known.k, model=known.model, as_json=known.json)


def _store(parser: Parser, arguments: Sequence[str]) -> Path:
    parser.add_argument("store", metavar="DIR", help="a datastore")
    return Path(parser.parse_args(arguments).store)


def _ids(text: str) -> list[int]:
    try:
        ids = [int(word) for word in text.split(",")]
    except ValueError:
        ids = [-1]
    if any(not 0 <= token < 1 << 31 for token in ids):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of token ids such as 1,2,3")
    return ids


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 1")
    return int(text)


def _parser(name: str, usage: str, epilog: str = "") -> Parser:
    return Parser(
        prog=f"rasd datastore {name}",
        usage=f"rasd datastore {name} {usage}",
        description=f"{_SUMMARIES[name].capitalize()}.",
        epilog=epilog or "Exit codes: 0 done, 1 failed, 2 bad input or option, 130/143 stopped by a signal.",
    )


def _help() -> str:
    lines = [f"  {name:<10} {summary}" for name, summary in _SUMMARIES.items()]
    return "\n".join(
        [
            "usage: rasd datastore COMMAND [options]",
            "",
            "commands:",
            *lines,
            "",
            "  -h, --help  this text; rasd datastore COMMAND --help tells a command's options",
        ]
    )


_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "build": _build,
    "append": _append,
    "merge": _merge,
    "inspect": _inspect,
    "verify": _verify,
    "query": _query,
}
