"""report.html of `rasd generate`: what its record says, to look at, and the first rows token by token."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.html import trails
from jobs.html.document import Section, document, escape, table
from jobs.html.parts import facts, phase_shares, tokens_a_round

_SHOWN = 8
_LINES = ("state", "rows", "ok", "errors", "tokens", "tokens_per_second", "generating_seconds", "seconds", "rounds")


def render_job(record: Mapping[str, Any], told: Sequence[Mapping[str, Any]]) -> str:
    """The page.

    Args:
        record: as in report.json.
        told: what the replicas of this run said at their end, see `actors.witness`.
    """
    rounds = max(record["rounds"], 1)
    accepted = {source: count / rounds for source, count in record["accepted_by_source"].items()}
    rows = sorted((row for each in told for row in each["trails"]), key=lambda row: row["row_index"])[:_SHOWN]
    shown = trails.trails_of([{**row, "method": record["method"]} for row in rows])
    sections = [
        tokens_a_round(
            [(record["method"], record["tau"], accepted)],
            "New tokens that one pass of the target brought (tau), by who proposed them, over all committed rows.",
        )
    ]
    if shown:
        sections.append(trails.section(shown))
    seconds: Counter[str] = Counter()
    for each in told:
        seconds.update({phase: spent for phase, spent in each["seconds"].items() if phase != "idle"})
    if seconds:
        count = f"{len(told)} replica{'s' if len(told) > 1 else ''}"
        caption = f"Share of the rounds' time by phase, over {count} of this run."
        sections.append(phase_shares(record["method"], seconds, caption))
    sections.append(_job(record))
    return document("RASD job", _lead(record), sections, {"trails": shown})


def _lead(record: Mapping[str, Any]) -> str:
    items = {"Model": f"{record['model']}, {record['dtype']}", "Method": record["method"], "Output": record["output"]}
    done = (
        ""
        if record["state"] == "done"
        else f" This run ended early ({escape(record['state'])}); the same command resumes."
    )
    return (
        "<p class=kicker>RASD generation job</p>"
        f"<h1><span class=figure>{record['tau']:.2f}</span> tokens a round</h1>"
        f"<p class=interval>{record['ok']:,} of {record['rows']:,} rows are good, at"
        f" {record['tokens_per_second']:,.0f} tokens/s of this run.{done}"
        " <small>One token a round is plain decoding.</small></p>"
        f"{facts(items)}"
    )


def _job(record: Mapping[str, Any]) -> Section:
    rows = [[name.replace("_", " "), record[name]] for name in _LINES]
    rows += [[f"errors: {kind}", count] for kind, count in record["error_types"].items()]
    body = table(["figure", "value"], rows, "The job's figures")
    return Section("job", "The job", "As in report.json; definitions are in docs/statistics.md.", body)
