"""The report's main pictures as PNG, for slides and READMEs; without matplotlib only a warning."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.figures import ALL
from jobs.files import writing
from jobs.html.page import first_method, slots_named

SPEED = "speedup.png"
SLOTS = "tokens_per_second.png"
_FIRST, _OTHER, _INK = "#0b6e8f", "#a9b7c0", "#1d1f24"

log = logging.getLogger(__name__)


def write_plots(output: Path, record: Mapping[str, Any]) -> None:
    """Speed-ups by task and method, and tokens a second by slots; raises JobError if they cannot be written."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        log.warning("no %s without matplotlib: pip install matplotlib; the figures are in results.json", SPEED)
        return
    with writing(output):
        if record["slots"]:
            _speed(record, next(iter(record["slots"]))).savefig(output / SPEED, dpi=160)
        if len(record["slots"]) > 1:
            _by_slots(record).savefig(output / SLOTS, dpi=160)


def _speed(record: Mapping[str, Any], slots: str) -> Any:
    from matplotlib.figure import Figure

    methods, first = record["slots"][slots], first_method(record)
    compared = {name: own["sets"] for name, own in methods.items() if own["sets"][ALL]["ratio"] is not None}
    tasks = [
        task for task in next(iter(compared.values()), {}) if any(sets[task]["ratio"] for sets in compared.values())
    ]
    figure = Figure(figsize=(10, 1.2 + 0.3 * max(len(tasks), 1) * 1.6), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / max(len(compared), 1)
    for place, (name, sets) in enumerate(compared.items()):
        for row, task in enumerate(tasks):
            ratio = sets[task]["ratio"]
            if ratio is None:
                continue
            y = row + height * (place - (len(compared) - 1) / 2)
            colour = _FIRST if name == first else _shade(place, len(compared))
            axes.barh(y, ratio["value"], 0.9 * height, color=colour, label=name if row == 0 else None)
            if ratio["interval"] is not None:
                axes.plot(ratio["interval"], [y, y], color=_INK, linewidth=0.7, alpha=0.7)
    axes.axvline(1, color=_INK, linewidth=1, linestyle="--")
    axes.set_yticks(range(len(tasks)), ["all tasks" if task == ALL else task for task in tasks])
    axes.invert_yaxis()
    axes.set_xlabel(f"times plain decoding's tokens/s, {slots_named(slots)}; thin lines: 95% intervals")
    if compared:
        axes.legend(frameon=False, ncols=len(compared), loc="upper left", bbox_to_anchor=(0, 1.1))
    _calm(axes)
    return figure


def _by_slots(record: Mapping[str, Any]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    first = first_method(record)
    names = list(dict.fromkeys(name for methods in record["slots"].values() for name in methods))
    for place, name in enumerate(names):
        points = [
            (int(slots), methods[name]["sets"][ALL]["tokens_per_second"]["value"])
            for slots, methods in record["slots"].items()
            if name in methods and methods[name]["sets"][ALL]["tokens_per_second"] is not None
        ]
        colour = _FIRST if name == first else _shade(place, len(names))
        axes.plot(*zip(*points, strict=True), marker="osD^vP*X"[place % 8], color=colour, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks([int(slots) for slots in record["slots"]], list(record["slots"]))
    axes.set_xlabel("slots")
    axes.set_ylabel("tokens/s")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    _calm(axes)
    return figure


def _shade(place: int, count: int) -> str:
    """One of `count` greys."""
    return str(0.82 - 0.4 * place / max(count, 1))


def _calm(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
