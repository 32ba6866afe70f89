"""What `rasd throughput` says at its end: a table for people, and one JSON record as the last line."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def print_outcome(record: Mapping[str, Any], output: Path, *, is_quiet: bool) -> None:
    """The table, unless quiet, then the record as one line."""
    if not is_quiet:
        print(
            f"{'slots':>5}  {'method':<18} {'tokens/s':>9} {'x plain':>8}  {'95% interval':<14} {'tau':>5} {'nodes':>6}"
        )
        for slots, methods in record["slots"].items():
            for name, found in methods.items():
                print(f"{slots:>5}  {name:<18} {_line(found['sets']['all'])}")
    short = {name: record[name] for name in ("state", "seconds", "resumed_samples", "questions", "methods")}
    short["slots"] = {
        slots: {name: found["sets"]["all"] for name, found in methods.items()}
        for slots, methods in record["slots"].items()
    }
    print(json.dumps({**short, "output": str(output)}), flush=True)


def _line(figures: Mapping[str, Any]) -> str:
    speed, ratio = figures["tokens_per_second"], figures["ratio"]
    times = "" if ratio is None else f"{ratio['value']:.2f}"
    bounds = "" if ratio is None or ratio["interval"] is None else "{:.2f} to {:.2f}".format(*ratio["interval"])
    rate = "" if speed is None else f"{speed['value']:.1f}"
    return f"{rate:>9} {times:>8}  {bounds:<14} {figures['tau']:>5.2f} {figures['nodes']:>6.1f}"
