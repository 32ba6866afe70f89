"""Figures of a throughput run, all of them from the rows of results.parquet; definitions in docs/statistics.md."""

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from jobs.contest import MIXED
from jobs.measured import Row
from jobs.ratios import Times, rate, ratio
from pipeline.provenance import NUM_BINS

PLAIN = "plain"
ALL = "all"

Figures = dict[str, Any]
Part = tuple[int, int]


def figures_of(rows: Sequence[Row]) -> Figures:
    """By number of slots, by method: over everything and by task."""
    by_slots: defaultdict[int, list[Row]] = defaultdict(list)
    for row in rows:
        by_slots[row["slots"]].append(row)
    return {str(slots): _at_slots(own) for slots, own in sorted(by_slots.items())}


def _at_slots(rows: Sequence[Row]) -> Figures:
    methods: dict[str, list[Row]] = {}
    for row in rows:
        methods.setdefault(row["method"], []).append(row)
    base = methods.get(PLAIN, [])
    return {name: _of_method(own, base, is_base=name == PLAIN) for name, own in methods.items()}


def _of_method(rows: Sequence[Row], base: Sequence[Row], *, is_base: bool) -> Figures:
    times, base_times = times_of(rows), times_of(base)
    task_of = {_part(row): row["sample_task"] for row in rows}
    tasks = sorted({row["task"] for row in rows})
    tokens = _tokens(rows)
    shares = len({sample for sample, _ in task_of}) < len(task_of)  # questions generated together
    sets = {ALL: sorted(task_of)} | {t: sorted(s for s in task_of if task_of[s] == t) for t in tasks}
    found = {}
    for name, samples in sets.items():
        own = rows if name == ALL else [row for row in rows if row["task"] == name]
        figures = counts_of(own)
        num_timed = len({sample for sample, _ in samples}) if shares else None
        speed = rate(tokens, times, samples, num_timed)
        figures["tokens_per_second"] = None if speed is None else speed.rounded(2)
        paired = None if is_base else ratio(base_times, times, samples, num_timed)
        figures["ratio"] = None if paired is None else paired.rounded()
        found[name] = figures
    return {
        "sets": found,
        "mixed": MIXED in task_of.values(),
        "equal_to_plain": None if is_base else _equal(rows, base),
        "phases": _phases(rows),
        "by_depth": _by_depth(rows),
        "calibration": _calibration(rows),
    }


def times_of(rows: Sequence[Row]) -> Times:
    """Seconds by question and repeat of one method at one number of slots.

    Those of questions that were generated together are the sample's, divided by their rounds in all repeats: so that an
    interval tells what other questions would have changed, as it does where each has a time of its own.
    """
    seconds: dict[tuple[int, int], float] = {}
    rounds: Counter[Part] = Counter()
    together: Counter[int] = Counter()
    for row in rows:
        seconds[row["sample"], row["repeat"]] = row["seconds"]
        rounds[_part(row)] += max(row["rounds"], 1)
        together[row["sample"]] += max(row["rounds"], 1)
    times: defaultdict[Hashable, dict[int, float]] = defaultdict(dict)
    for row in rows:
        part = _part(row)
        share = rounds[part] / together[part[0]]
        times[part][row["repeat"]] = share * seconds[row["sample"], row["repeat"]]
    return times


def _part(row: Row) -> Part:
    """Of a sample, one question with all its turns."""
    return row["sample"], row["row"]


def counts_of(rows: Sequence[Row]) -> Figures:
    """tau and what goes into it, over all repeats."""
    rounds = sum(row["rounds"] for row in rows)
    drafted = sum(row["drafted"] for row in rows)
    accepted = sum(row["accepted"] for row in rows)
    by_source: Counter[str] = Counter()
    for row in rows:
        by_source.update(row["accepted_by_source"])
    return {
        "requests": len(rows),
        "output_tokens": sum(row["num_output_tokens"] for row in rows),
        "rounds": rounds,
        "tau": round(sum(row["num_output_tokens"] - 1 for row in rows) / max(rounds, 1), 3),
        "nodes": round(drafted / max(rounds, 1), 2),
        "acceptance": round(accepted / drafted, 3) if drafted else None,
        "accepted_by_source": {name: round(count / max(rounds, 1), 4) for name, count in sorted(by_source.items())},
    }


def _tokens(rows: Sequence[Row]) -> dict[Hashable, float]:
    """Output tokens of each question, the median of its repeats."""
    by_part: defaultdict[Part, Counter[int]] = defaultdict(Counter)
    for row in rows:
        by_part[_part(row)][row["repeat"]] += row["num_output_tokens"]
    return {part: float(np.median(list(repeats.values()))) for part, repeats in by_part.items()}


def _equal(rows: Sequence[Row], base: Sequence[Row]) -> float | None:
    """Share of outputs that are plain decoding's, token for token."""
    keys = ("sample", "repeat", "row", "turn")
    plain = {tuple(row[key] for key in keys): row["token_ids"] for row in base}
    pairs = [(row["token_ids"], plain.get(tuple(row[key] for key in keys))) for row in rows]
    paired = [list(own) == list(other) for own, other in pairs if other is not None]
    return round(sum(paired) / len(paired), 4) if paired else None


def _phases(rows: Sequence[Row]) -> Figures | None:
    """Milliseconds of a round by phase; every run's once."""
    runs = {(row["sample"], row["repeat"]): row for row in rows}.values()
    rounds = sum(run["run_rounds"] for run in runs)
    total: Counter[str] = Counter()
    for run in runs:
        total.update(run["phases"])
    return {name: round(1000 * seconds / rounds, 4) for name, seconds in total.items()} if total else None


def _by_depth(rows: Sequence[Row]) -> Figures:
    """By source: how often it offered something at a depth, and how often it was right."""
    found: Figures = {}
    for name in ("offered", "right"):
        sums: dict[str, np.ndarray] = {}
        for row in rows:
            for source, counts in row[name].items():
                sums[source] = sums.get(source, 0) + np.asarray(counts)
        found[name] = {source: counts.tolist() for source, counts in sums.items()}
    return found


def _calibration(rows: Sequence[Row]) -> list[dict[str, float]]:
    """Bins of estimated acceptance that have nodes: how many, their mean estimate, and the share accepted."""
    columns = ("predicted", "predicted_right", "predicted_sum")
    count, right, total = (np.sum([row[name] for row in rows], axis=0) for name in columns)
    return [
        {
            "nodes": int(count[i]),
            "estimated": round(float(total[i] / count[i]), 4),
            "accepted": round(float(right[i] / count[i]), 4),
        }
        for i in range(NUM_BINS)
        if count[i]
    ]
