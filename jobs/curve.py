"""The learning curve of a draft head: a line for every evaluation, as text and as a picture."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

CURVE = "curve.jsonl"

log = logging.getLogger(__name__)


def read_curve(path: Path) -> list[dict[str, Any]]:
    """The evaluations so far, by step; of a step that comes twice the last one counts, a torn line does not."""
    lines: dict[int, dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
            lines[int(line["step"])] = line
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    return [lines[step] for step in sorted(lines)]


def curve_line(step: int, tokens: int, seen: Any, evaluation: Any) -> dict[str, Any]:
    """A line of the curve.

    Args:
        seen, evaluation: `pipeline.training.trainer.Evaluation` of the step's own batch, and of what is held out.
    """
    return {"step": step, "tokens": tokens, "training": asdict(seen), "held_out": asdict(evaluation)}


def described(line: Mapping[str, Any]) -> str:
    """An evaluation for people."""
    accuracy = " ".join(f"{value:.3f}" for value in line["held_out"]["accuracy"])
    loss = line["held_out"]["loss"][0]
    return f"step {line['step']}: {line['tokens']:,} tokens, held-out loss {loss:.3f}, accuracy by depth {accuracy}"


def plot_curve(curve: Path, picture: Path) -> None:
    """Held-out accuracy and loss by drafted token over target tokens learned; without matplotlib only a warning.

    Args:
        curve: lines that `rasd train-draft` writes.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.warning("no %s without matplotlib: pip install matplotlib; the figures are in %s", picture.name, curve)
        return
    points = read_curve(curve)
    if not points:
        return
    tokens = [point["tokens"] for point in points]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, name, label in zip(
        figure.subplots(1, 2), ("accuracy", "loss"), ("first choice is the target's", "held-out loss"), strict=True
    ):
        for depth in range(len(points[0]["held_out"][name])):
            values = [point["held_out"][name][depth] for point in points]
            axes.plot(tokens, values, marker=".", label=f"token {depth + 1}")
        axes.set_xlabel("target tokens learned")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.savefig(picture, dpi=120)
