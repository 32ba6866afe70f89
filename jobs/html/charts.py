"""Pictures: bars as lists with widths in per cent, lines and circles as inline SVG.

Colours are classes of report.css.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from jobs.html.document import TIMES, escape

_WORTH_WORDS = 0.07  # of the longest bar, for a part that has room for its number


@dataclass(frozen=True, slots=True)
class Bar:
    """A row of a chart.

    Attributes:
        kind: class of its colour.
        low, high: of its interval, None without one.
    """

    name: str
    value: float
    kind: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a chart: points (x, y, low, high), bounds None without an interval."""

    name: str
    kind: str
    points: Sequence[tuple[float, float, float | None, float | None]]


def svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    """A picture that scales with its column; `label` says what it shows to those who do not see it."""
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}"'
        f' preserveAspectRatio="xMinYMin meet">{"".join(parts)}</svg>'
    )


def text(x: float, y: float, words: object, kind: str = "", anchor: str = "start") -> str:
    """Words at a baseline."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """A straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def ratio_bars(bars: Sequence[Bar], most: float) -> str:
    """Bars of ratios with their intervals, and a line at 1; `most` is the right edge of the scale."""
    rows = []
    for bar in bars:
        inside = f'<i class=fill style="width:{_share(bar.value, most)}"></i>'
        inside += f'<i class=one style="left:{_share(1, most)}"></i>'
        words = ""
        if bar.low is not None and bar.high is not None:
            left, right = _percent(bar.low, most), _percent(bar.high, most)
            ends = "whisker" if bar.high <= most else "whisker open"
            inside += f'<i class="{ends}" style="left:{left:.2f}%;width:{right - left:.2f}%"></i>'
            words = f"95% interval {bar.low:.2f} to {bar.high:.2f}"
        rows.append(
            f'<li class="{bar.kind}" title="{escape(bar.name)}: {bar.value:.2f}{TIMES} plain. {words}">'
            f"<span class=name>{escape(bar.name)}</span><span class=track>{inside}</span>"
            f"<span class=value>{bar.value:.2f}{TIMES}<span class=hidden>, {words}</span></span></li>"
        )
    marks = "".join(f'<i style="left:{_share(tick, most)}">{tick:g}</i>' for tick in ticks(most))
    return f"<ul class=bars>{''.join(rows)}</ul><div class=ticks aria-hidden=true>{marks}</div>"


def stacked_bars(rows: Sequence[tuple[str, Sequence[tuple[str, str, float]]]], unit: str) -> str:
    """Bars made of parts, (class, name, amount) each, from left to right; the sum stands at the end."""
    most = max((sum(part[2] for part in parts) for _, parts in rows), default=1.0) or 1.0
    drawn = []
    for name, parts in rows:
        cells = "".join(
            f'<i class="part {kind}" style="width:{_share(amount, most)}" title="{escape(what)}: {amount:.2f}{unit}">'
            f"{f'{amount:.2f}' if amount > _WORTH_WORDS * most else ''}"
            f"<span class=hidden>{escape(what)} {amount:.2f}{unit}, </span></i>"
            for kind, what, amount in parts
            if amount > 0
        )
        total = sum(part[2] for part in parts)
        drawn.append(
            f"<li><span class=name>{escape(name)}</span><span class=track>{cells}</span>"
            f"<span class=value>{total:.2f}{unit}</span></li>"
        )
    return f'<ul class="bars stacked">{"".join(drawn)}</ul>'


def _percent(value: float, most: float) -> float:
    return 100 * min(max(value, 0.0) / most, 1.0)


def _share(value: float, most: float) -> str:
    return f"{_percent(value, most):.2f}%"


def lines(
    series: Sequence[Line], label: str, x_name: str, y_name: str, *, is_log: bool = False, most: float | None = None
) -> str:
    """Lines over numbers of slots (a logarithmic axis) or depths, each with its name at its end."""
    width, height, left, right, bottom, top = 560.0, 300.0, 46.0, 118.0, 40.0, 22.0
    xs = sorted({point[0] for each in series for point in each.points})
    highest = most or 1.08 * max((point[3] or point[1] for each in series for point in each.points), default=1.0)

    def x(value: float) -> float:
        first, last = (math.log2(v) if is_log else v for v in (xs[0], xs[-1]))
        at = math.log2(value) if is_log else value
        return left + (width - left - right) * ((at - first) / (last - first) if last > first else 0.5)

    def y(value: float) -> float:
        return height - bottom - (height - bottom - top) * min(value / highest, 1.0)

    parts = [line(left, y(tick), width - right, y(tick), "grid") for tick in ticks(highest)]
    parts += [text(left - 8, y(tick) + 4, f"{tick:g}", "tick", "end") for tick in ticks(highest)]
    parts += [text(x(value), height - bottom + 18, f"{value:g}", "tick", "middle") for value in xs]
    parts.append(text(width - right, height - 4, x_name, "axis", "end"))
    parts.append(text(0, 10, y_name, "axis"))
    for each in series:
        path = " ".join(f"{x(point[0]):.1f},{y(point[1]):.1f}" for point in each.points)
        parts.append(f'<polyline points="{path}" class="line {each.kind}"/>')
        for at, value, low, high in each.points:
            if low is not None and high is not None:
                parts.append(line(x(at), y(low), x(at), y(high), "whisker thin"))
            title = f"<title>{escape(each.name)} at {at:g}: {value:.2f}</title>"
            parts.append(f'<circle cx="{x(at):.1f}" cy="{y(value):.1f}" r="4" class="dot {each.kind}">{title}</circle>')
    ends = [(y(each.points[-1][1]), x(each.points[-1][0]), each) for each in series if each.points]
    for where, (_, at, each) in zip(spread([end[0] for end in ends], 15), ends, strict=True):
        parts.append(text(at + 10, where + 4, each.name, "name " + each.kind))
    return svg(width, height, label, parts)


def calibration(bins: Sequence[Mapping[str, float]], label: str) -> str:
    """Estimated against observed acceptance, a circle a bin, its area by the number of nodes."""
    size, left, bottom = 320.0, 44.0, 38.0
    room = size - left - 14
    most = max((each["nodes"] for each in bins), default=1)

    def at(each: Mapping[str, float]) -> tuple[float, float]:
        return left + room * each["estimated"], size - bottom - room * each["accepted"]

    parts = [line(left, size - bottom, left + room, size - bottom - room, "one")]
    for tick in (0, 0.25, 0.5, 0.75, 1):
        parts.append(line(left, size - bottom - room * tick, left + room, size - bottom - room * tick, "grid"))
        parts.append(text(left - 8, size - bottom - room * tick + 4, f"{tick:g}", "tick", "end"))
        parts.append(text(left + room * tick, size - bottom + 16, f"{tick:g}", "tick", "middle"))
    for each in bins:
        x, y = at(each)
        title = f"{each['nodes']} nodes: estimated {each['estimated']:.2f}, accepted {each['accepted']:.2f}"
        radius = 3 + 11 * math.sqrt(each["nodes"] / most)
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" class="bubble"><title>{title}</title></circle>'
        )
    parts.append(text(left + room, size - 6, "estimated", "axis", "end"))
    parts.append(text(0, 10, "accepted", "axis"))
    return svg(size, size, label, parts)


def ticks(most: float) -> list[float]:
    """Round numbers from 0 to `most`."""
    step = 10 ** math.floor(math.log10(most / 3)) if most > 0 else 1.0
    step = next(step * factor for factor in (1, 2, 5, 10) if most / (step * factor) <= 5)
    return [round(step * i, 10) for i in range(int(most / step) + 1)]


def spread(places: Sequence[float], least: float) -> list[float]:
    """Places for words that would lie on each other, moved down as far as needed, in the same order."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    found = list(places)
    for before, after in pairwise(order):
        found[after] = max(found[after], found[before] + least)
    return found
