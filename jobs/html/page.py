"""report.html of `rasd throughput`, from the same record as results.json."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.figures import ALL, PLAIN
from jobs.files import writing
from jobs.html import charts, trails
from jobs.html.document import TIMES, Section, document, escape, legend, table
from jobs.html.parts import facts, machine_line, round_time, tokens_a_round
from jobs.measured import Row
from pipeline.durable import replace_text
from pipeline.provenance import ANY

REPORT = "report.html"
FIRST = "rasd"  # the method that a report leads with, where it was measured

Record = Mapping[str, Any]
Methods = Mapping[str, Any]  # of one number of slots


def write_report(output: Path, record: Record, rows: Sequence[Row]) -> None:
    """Replaces the report; raises JobError if it cannot be written."""
    with writing(output / REPORT):
        replace_text(output / REPORT, render(record, rows))


def render(record: Record, rows: Sequence[Row]) -> str:
    """The page.

    Args:
        record: as in results.json; rows: as in results.parquet.
    """
    shown = [row for row in rows if row["trail"]]
    found = trails.trails_of(shown)
    first = first_method(record)
    nothing: tuple[str, Methods] = ("1", {})
    slots, methods = next(iter(record["slots"].items()), nothing)
    sections = [_speed(at, own, first) for at, own in record["slots"].items()]
    if found:
        sections.append(trails.section(found))
    sections.append(
        tokens_a_round(
            [_tau_row(name, own) for name, own in methods.items()],
            f"New tokens that one pass of the target brings (tau), by who proposed them; {slots_named(slots)}. Plain"
            " decoding has one, the target's own.",
        )
    )
    if len(record["slots"]) > 1:
        sections.append(_against_slots(record["slots"], first))
    if first in methods and methods[first]["by_depth"]["offered"]:
        sections.append(_by_depth(methods, first, slots))
    phases = [(name, own["phases"]) for name, own in methods.items() if own["phases"]]
    if phases:
        sections.append(
            round_time(
                phases,
                f"Mean milliseconds of an engine's round by phase, those with prompt tokens included;"
                f" {slots_named(slots)}. A round of a drafting method is longer than plain decoding's, and brings more"
                " tokens.",
            )
        )
    if first in methods and methods[first]["calibration"]:
        sections.append(_calibration(methods, first, slots))
    sections.append(_run(record))
    return document("RASD throughput", _lead(record, methods, slots, first), sections, {"trails": found})


def first_method(record: Record) -> str:
    """`rasd`, or else the fastest of what was measured."""
    methods: Methods = next(iter(record["slots"].values()), {})
    if FIRST in methods:
        return FIRST
    ratios = {name: own["sets"][ALL]["ratio"] for name, own in methods.items()}
    known = {name: found["value"] for name, found in ratios.items() if found is not None}
    return max(known, key=lambda name: known[name]) if known else PLAIN


def kind_of(method: str, first: str) -> str:
    """Class of a method's colour."""
    if method == first:
        return "m-first"
    return "m-plain" if method == PLAIN else "m-peer" if method.startswith("hf-") else "m-other"


def _base(method: str) -> str:
    """Its name without sources and budget."""
    return method.partition(":")[0].partition("@")[0]


def slots_named(slots: str) -> str:
    """For people."""
    return "one slot" if slots == "1" else f"{slots} slots"


def _lead(record: Record, methods: Methods, slots: str, first: str) -> str:
    sets = methods.get(first, {}).get("sets", {})
    own = sets.get(ALL, {})
    ratio, speed = own.get("ratio"), own.get("tokens_per_second")
    config = record["config"]
    if ratio is None:
        head = "Nothing to compare yet" if speed is None else f"<span class=figure>{speed['value']:.1f}</span> tokens/s"
        told = "No ratio: only plain decoding was measured."
    else:
        head = f"<span class=figure>{ratio['value']:.2f}{TIMES}</span> as fast as plain decoding"
        bounds = ratio["interval"]
        told = (
            "One measurement gives no interval" if bounds is None else "95% interval {:.2f} to {:.2f}".format(*bounds)
        )
        told = f"<b>{escape(first)}</b>, {slots_named(slots)}: {told}."
    tasks = sum(name != ALL for name in sets)
    told += (
        f" <small>Tokens a second over {record['questions']} questions of {tasks} tasks, {config['max_new_tokens']}"
        f" tokens each at most, prompts included; medians of {config['repeats']} repeats, each prompt paired with plain"
        " decoding of the same run.</small>"
    )
    items = {
        "Model": f"{record['machine']['model']}, {record['machine']['dtype']}",
        "Machine": machine_line(record["machine"]),
        "Measured": f"{record['machine']['date']}, {record['replicas']} replica{'s' if record['replicas'] > 1 else ''}",
        "Command": record["command"],
    }
    stopped = "" if record["state"] == "done" else "<p class=kicker>Stopped before its end: what there is so far.</p>"
    return f"<p class=kicker>RASD throughput</p><h1>{head}</h1>{stopped}<p class=interval>{told}</p>{facts(items)}"


def _speed(slots: str, methods: Methods, first: str) -> Section:
    """Bars of ratios, a panel for everything and one a task."""
    panels: dict[str, list[charts.Bar]] = {}
    cells = []
    for name, own in methods.items():
        for task, figures in own["sets"].items():
            ratio, speed = figures["ratio"], figures["tokens_per_second"]
            bounds = (None, None) if ratio is None or ratio["interval"] is None else ratio["interval"]
            if ratio is not None:
                panels.setdefault(task, []).append(charts.Bar(name, ratio["value"], kind_of(name, first), *bounds))
            cells.append(
                [
                    task,
                    name,
                    None if speed is None else f"{speed['value']:.2f}",
                    None if ratio is None else f"{ratio['value']:.3f}",
                    None if bounds[0] is None else f"{bounds[0]:.3f} to {bounds[1]:.3f}",
                    f"{figures['tau']:.3f}",
                    f"{figures['nodes']:.2f}",
                ]
            )
    most = 1.05 * max((bar.value for bars in panels.values() for bar in bars), default=2.0)
    drawn = {task: charts.ratio_bars(bars, max(most, 1.2)) for task, bars in panels.items()}
    top = f"<h3>All tasks</h3>{drawn.pop(ALL)}" if ALL in drawn else ""
    rest = "".join(f"<figure><h3>{escape(task)}</h3>{bars}</figure>" for task, bars in sorted(drawn.items()))
    heads = ["task", "method", "tokens/s", "x plain", "95% interval", "tau", "nodes a round"]
    body = f"<div class='panels first'><figure>{top}</figure></div><div class=panels>{rest}</div>"
    is_mixed = any(own["mixed"] for own in methods.values())
    caption = (
        "How many times as fast as plain decoding, whose speed is the dashed line; thin lines are 95% intervals over"
        " prompts and repeats."
    )
    if is_mixed:
        caption += " The slots were filled with questions of several tasks at once, so that speed by task is not known."
    order = sorted(cells, key=lambda row: (row[0] != ALL, str(row[0])))
    body += table(heads, order, "Speed as a table")
    return Section(f"speed-{slots}", f"Speed-up, {slots_named(slots)}", caption, body)


def _tau_row(name: str, own: Mapping[str, Any]) -> tuple[str, float, Mapping[str, float]]:
    figures = own["sets"][ALL]
    return name, figures["tau"], figures["accepted_by_source"]


def _against_slots(by_slots: Mapping[str, Methods], first: str) -> Section:
    names = list(dict.fromkeys(name for methods in by_slots.values() for name in methods))
    series, cells = [], []
    for name in names:
        points = []
        for slots, methods in by_slots.items():
            speed = methods[name]["sets"][ALL]["tokens_per_second"] if name in methods else None
            if speed is not None:
                points.append((float(slots), speed["value"], *(speed["interval"] or (None, None))))
        series.append(charts.Line(name, f"{kind_of(name, first)} l-{_base(name)}", points))
        cells.append([name, *(f"{p[1]:.2f}" for p in points)])
    picture = charts.lines(series, "Tokens a second by number of slots", "slots", "tokens/s", is_log=True)
    caption = (
        "Output tokens a second of all replicas together, prompts included, by the number of sequences a replica"
        " decodes at once. Where the processor is busy with many sequences, speculation has less to win."
    )
    heads = ["method", *(f"{slots} slots" for slots in by_slots)]
    return Section("slots", "Tokens a second against slots", caption, picture + table(heads, cells, "As a table"))


def _by_depth(methods: Methods, first: str, slots: str) -> Section:
    found = methods[first]["by_depth"]
    series = []
    for source, offered in found["offered"].items():
        right = found["right"][source]
        points = [
            (float(depth), r / o, None, None)
            for depth, (o, r) in enumerate(zip(offered, right, strict=True), start=1)
            if o >= 5
        ]
        if points:
            series.append(charts.Line(source, f"s-{source}", points))
    cells = [
        [f"{name}, {source}", *(f"{r}/{o}" if o else None for o, r in zip(offered, own["right"][source], strict=True))]
        for name, by in methods.items()
        for own in [by["by_depth"]]
        for source, offered in own["offered"].items()
    ]
    picture = charts.lines(series, "Share right by depth and source", "depth", "share right", most=1.0)
    keys = legend((line.kind, ANY if line.name == ANY else line.name) for line in series)
    caption = (
        f"How often a source was right where it had tokens of this depth verified below an accepted one: {first},"
        f" {slots_named(slots)}; places with fewer than 5 such rounds left out. A token that several proposed counts"
        " for each."
    )
    heads = ["method, source", *(f"depth {depth}" for depth in range(1, 9))]
    body = picture + keys + table(heads, cells, "Right / offered as a table")
    return Section("depth", "Acceptance by depth and source", caption, body)


def _calibration(methods: Methods, first: str, slots: str) -> Section:
    bins = methods[first]["calibration"]
    picture = charts.calibration(bins, "Estimated against observed acceptance").replace(
        "<svg ", "<svg class=square ", 1
    )
    cells = [
        [name, f"{each['estimated']:.3f}", f"{each['accepted']:.3f}", each["nodes"]]
        for name, own in methods.items()
        for each in own["calibration"]
    ]
    caption = (
        f"Verified nodes below an accepted one, by the acceptance estimated before: {first}, {slots_named(slots)}. On"
        " the line estimates are right; a circle's area is its share of nodes."
    )
    heads = ["method", "estimated", "accepted", "nodes"]
    return Section("calibration", "Calibration", caption, picture + table(heads, cells, "Calibration as a table"))


def _run(record: Record) -> Section:
    machine, config = record["machine"], record["config"]
    equal = {
        f"{name}, {slots_named(slots)}": own["equal_to_plain"]
        for slots, methods in record["slots"].items()
        for name, own in methods.items()
        if own["equal_to_plain"] is not None
    }
    same = table(
        ["method", "share of outputs"], ([k, f"{v:.4f}"] for k, v in equal.items()), "Outputs equal to plain decoding's"
    )
    versions = {name: machine[name] for name in ("rasd", "python", "torch", "transformers") if machine.get(name)}
    rows = [[name, value] for name, value in {**machine, **config}.items()]
    body = facts({"Versions": ", ".join(f"{k} {v}" for k, v in versions.items()), "Seed": config["seed"]})
    body += same + table(["option", "value"], rows, "Machine and configuration")
    caption = (
        "A method never changes the text; what differs from plain decoding's differs by rounding, where two choices are"
        f" nearly equal ({machine['dtype']})."
    )
    return Section("run", "The run", caption, body)
