"""Sections that reports have in common: who the tokens come from, and where the time of a round goes."""

from collections.abc import Mapping, Sequence
from typing import Any

from jobs.html import charts
from jobs.html.document import SOURCES, WHO, Section, escape, legend, table

PHASES = ("verify", "draft", "retrieve", "fuse", "select", "commit")


def tokens_a_round(rows: Sequence[tuple[str, float, Mapping[str, float]]], caption: str) -> Section:
    """tau by who the tokens come from.

    Args:
        rows: name, tau, and accepted tokens a round by source.
    """
    bars = []
    for name, tau, accepted in rows:
        own = max(tau - sum(accepted.values()), 0.0)
        parts = [("s-target", "target", own)]
        parts += [(f"s-{source}", source, accepted[source]) for source in SOURCES if accepted.get(source)]
        bars.append((name, parts))
    seen = [source for source in SOURCES if source == "target" or any(source in row[2] for row in rows)]
    cells = ([name, f"{tau:.3f}", *(_cell(accepted.get(s)) for s in SOURCES[:-1])] for name, tau, accepted in rows)
    body = charts.stacked_bars(bars, "") + legend((f"s-{source}", f"{source}: {WHO[source]}") for source in seen)
    heads = ["method", "tau", *(f"{source} a round" for source in SOURCES[:-1])]
    return Section("tau", "Tokens a round", caption, body + table(heads, cells, "Tokens a round as a table"))


def round_time(rows: Sequence[tuple[str, Mapping[str, float]]], caption: str, unit: str = " ms") -> Section:
    """Where the time of a round goes.

    Args:
        rows: name, and milliseconds by phase.
    """
    names = [*PHASES, *sorted({phase for _, found in rows for phase in found} - set(PHASES))]
    seen = [phase for phase in names if any(found.get(phase, 0) > 0 for _, found in rows)]
    bars = [(name, [(f"p-{p}", p, found.get(p, 0.0)) for p in seen]) for name, found in rows]
    cells = ([name, *(f"{found.get(p, 0.0):.3f}" for p in seen), f"{sum(found.values()):.3f}"] for name, found in rows)
    body = charts.stacked_bars(bars, unit) + legend((f"p-{phase}", phase) for phase in seen)
    heads = ["method", *(f"{phase}, ms" for phase in seen), "all, ms"]
    return Section("phases", "The time of a round", caption, body + table(heads, cells, "Phases as a table"))


def phase_shares(name: str, seconds: Mapping[str, float], caption: str) -> Section:
    """Where an engine's time went, in per cent."""
    total = sum(seconds.values())
    found = {phase: 100 * spent / total for phase, spent in seconds.items()}
    order = [p for p in (*PHASES, *sorted(set(found) - set(PHASES))) if found.get(p)]
    body = charts.stacked_bars([(name, [(f"p-{p}", p, found[p]) for p in order])], "%")
    body += legend((f"p-{p}", p) for p in order)
    cells = ([p, f"{seconds[p]:.3f}", f"{found[p]:.2f}"] for p in order)
    body += table(["phase", "seconds", "per cent"], cells, "Phases as a table")
    return Section("phases", "Where the time went", caption, body)


def facts(items: Mapping[str, object]) -> str:
    """What a run was, as a list of terms."""
    pairs = (f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in items.items())
    return f"<dl class=facts>{''.join(pairs)}</dl>"


def machine_line(machine: Mapping[str, Any]) -> str:
    """A machine in words."""
    gpu = f", {machine['gpu']}" if machine.get("gpu") else ""
    return f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads a replica{gpu}"


def _cell(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"
