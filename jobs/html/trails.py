"""The provenance view: what report.js needs to show sampled outputs token by token, and the place where it does."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.html.document import SOURCES, WHO, Section, escape

_SAID = 600  # characters of a prompt that are shown

Trails = list[dict[str, Any]]


def trails_of(rows: Sequence[Mapping[str, Any]]) -> Trails:
    """One entry an output with a trail: {title, said, method, tokens: [[text, source, others, score, value, depth,
    round], ...]}; sources are indices into `SOURCES`."""
    seen: Counter[tuple[str, str]] = Counter()  # ids may repeat, and a row may have several samples

    def title(row: Mapping[str, Any]) -> str:
        key = _title(row), str(row["method"])
        seen[key] += 1
        return key[0] if seen[key] == 1 else f"{key[0]} ({seen[key]})"

    return [
        {
            "title": title(row),
            "said": str(row.get("said") or "")[:_SAID],
            "method": row["method"],
            "tokens": [
                [
                    token["text"],
                    SOURCES.index(token["source"]),
                    [SOURCES.index(other) for other in token["others"]],
                    _short(token["score"]),
                    _short(token["value"]),
                    token["depth"],
                    token["round"],
                ]
                for token in row["trail"]
            ],
        }
        for row in rows
        if row.get("trail")
    ]


def section(trails: Trails) -> Section:
    """Where the view is."""
    keys = "".join(
        f'<button type=button class="chip s-{name}" data-source="{i}" aria-pressed=false title="{escape(WHO[name])}">'
        f"<span class=swatch></span>{name}<b></b></button>"
        for i, name in enumerate(SOURCES)
    )
    body = (
        "<div id=provenance class=view>"
        "<div class=controls><label>Output <select id=pick-output></select></label>"
        "<span id=pick-method role=radiogroup aria-label=Method></span></div>"
        "<p id=said class=said></p>"
        f"<div class=chips role=group aria-label='Show only tokens of'>{keys}</div>"
        "<div id=rounds class=rounds aria-hidden=true></div>"
        "<div id=tokens class=tokens role=listbox aria-label='Output, token by token' aria-describedby=keys></div>"
        "<p id=detail class=detail role=status></p>"
        "<p id=keys class=hint>A box is a round: what one pass of the target brought. Point at a token, or move with"
        " the arrow keys; up and down go by rounds. The buttons above show one source alone.</p>"
        "<noscript><p>This view needs the script in this file; the tables below do not.</p></noscript>"
        "</div>"
    )
    caption = (
        f"{len({trail['title'] for trail in trails})} outputs of the run. A token's colour says who was surest of it"
        " before the target verified it; the target itself adds the last token of every round."
    )
    return Section("provenance-view", "Who proposed each token", caption, body)


def _title(row: Mapping[str, Any]) -> str:
    turn = f", turn {row['turn'] + 1}" if row.get("turn") else ""
    return f"{row['task']} · {row['id']}{turn}" if row.get("task") else f"{row['id']}{turn}"


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
