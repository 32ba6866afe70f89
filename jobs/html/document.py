"""The frame of a report: head, style, script, sections, tables.

All text goes through `escape`; colours are the style's variables, so that pictures follow the reader's light or dark.
"""

import html
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

# Nothing may be loaded from anywhere, whatever a prompt or an output holds.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"

TIMES, DASH = "\u00d7", "\u2013"
SOURCES = ("draft", "context", "passages", "corpus", "live", "target")
WHO = {
    "draft": "the draft model",
    "context": "earlier text of the same prompt and output",
    "passages": "passages near to the prompt",
    "corpus": "the datastore's corpora",
    "live": "outputs finished before",
    "target": "the target itself",
}


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a report with its heading.

    Attributes:
        name: of its anchor.
        caption: what is measured, in a sentence or two.
        body: HTML.
    """

    name: str
    title: str
    caption: str
    body: str


def escape(text: object) -> str:
    """Text as HTML."""
    return html.escape(str(text))


def table(heads: Sequence[str], rows: Iterable[Sequence[object]], caption: str) -> str:
    """Numbers as a table, folded away; the first column names the row, None is a dash."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    lines = []
    for name, *cells in rows:
        values = "".join(f"<td>{DASH if cell is None else escape(cell)}</td>" for cell in cells)
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{values}</tr>')
    return (
        f"<details><summary>{escape(caption)}</summary><div class=scroll><table>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div></details>"
    )


def legend(items: Iterable[tuple[str, str]]) -> str:
    """Names beside their colours: (class of the colour, name)."""
    keys = "".join(f'<li><span class="key {kind}"></span>{escape(name)}</li>' for kind, name in items)
    return f"<ul class=legend>{keys}</ul>"


def document(title: str, lead: str, sections: Sequence[Section], data: Any) -> str:
    """The whole file.

    Args:
        lead: HTML of what stands at the top.
        data: for the script, as JSON.
    """
    links = "".join(f'<li><a href="#{s.name}">{escape(s.title)}</a></li>' for s in sections)
    parts = "".join(
        f'<section id="{s.name}" aria-labelledby="{s.name}-title"><h2 id="{s.name}-title">{escape(s.title)}</h2>'
        f"<p class=caption>{escape(s.caption)}</p>{s.body}</section>"
        for s in sections
    )
    folder = files("jobs.html")
    style = folder.joinpath("report.css").read_text("utf-8")
    script = folder.joinpath("report.js").read_text("utf-8")
    # `</script>` in a string would end the element; JSON allows any character to be escaped.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body>"
        f'<a class=skip href="#main">To the figures</a><header>{lead}<nav aria-label="Sections"><ul>{links}</ul></nav>'
        f'</header><main id="main">{parts}</main>'
        f'<script type="application/json" id="data">{text}</script><script>{script}</script></body></html>\n'
    )
