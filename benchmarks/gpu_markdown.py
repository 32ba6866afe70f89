"""The results of `benchmarks.gpu_check` as a page to read."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def markdown(results: Mapping[str, Any]) -> str:
    """Tables of all sections that were measured, with the goals of the project beside what has one."""
    return "\n".join(_lines(results)) + "\n"


def _lines(results: Mapping[str, Any]) -> Iterator[str]:
    machine = results["machine"]
    where = machine["gpu"] or f"{machine['cpu']}, no GPU"
    yield f"# {results['model']} on {where}"
    yield ""
    versions = f"torch {machine['torch']}, transformers {machine['transformers']}"
    yield f"{versions}, {machine['cores']} cores, {machine['date']}."
    wrong = sum(row["wrong"] for row in results["equality"])
    compared = sum(row["prompts"] for row in results["equality"])
    rounding = sum(row["differ_by_rounding"] for row in results["equality"])
    yield ""
    yield f"Equality in fp32: {compared} outputs, {wrong} wrong, {rounding} that differ from a tie within rounding on."
    for title, name in ((results["model"], "speed"), (f"{results['shape']}, acceptance replayed", "played")):
        if results[name]:
            yield from ("", f"## {title}", "")
            yield from _table([_readable(row) for row in results[name]])
    if "passes" in results:
        curve = results["passes"]["curve"]
        yield from ("", f"## Passes of {results['shape']}, {curve['weights_gb']} GB", "")
        yield f"Ceilings of the card: {results['passes']['ceilings']}"
        yield ""
        yield from _table(curve["passes"])
        yield ""
        yield from _table(curve["drafts"])
    if results["skipped"]:
        yield from ("", f"No time was left for: {'; '.join(results['skipped'])}.")


def _readable(row: Mapping[str, Any]) -> dict[str, Any]:
    flat = {key: value for key, value in row.items() if key != "phases"}
    if "phases" in row:
        shares = sorted(row["phases"].items(), key=lambda item: -item[1])
        flat["a round's time"] = ", ".join(f"{name} {100 * share:.0f}%" for name, share in shares)
    return flat


def _table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    yield f"| {' | '.join(columns)} |"
    yield f"|{'|'.join('---' for _ in columns)}|"
    for row in rows:
        yield f"| {' | '.join(str(row.get(name, '')) for name in columns)} |"
