"""Does dense search find what a question is about? Questions and documents that carry a `focus` of their own."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datastore import Datastore

_RESULTS = 5
_SHOWN = 20


def measure(store: Datastore, prompts: Path, corpus: Path, most: int) -> dict[str, Any]:
    """Share of questions of which one of the 5 nearest passages is from a document of the same focus.

    Args:
        prompts: JSON lines of {focus, messages}; corpus: JSON lines of {id, focus, text}, part of the datastore.
        most: questions to ask, evenly spaced.
    """
    focus_of = {row["id"]: row["focus"].casefold() for row in _rows(corpus)}
    questions = [row for row in _rows(prompts) if "focus" in row]
    questions = questions[:: max(1, len(questions) // most)][:most]
    found = store.search([row["messages"][-1]["content"] for row in questions], _RESULTS)
    known = set(focus_of.values())
    misses = []
    for row, passages in zip(questions, found, strict=True):
        focus = row["focus"].casefold()
        seen = [focus_of.get(passage.document, passage.document) for passage in passages]
        if focus not in seen:
            misses.append({"focus": row["focus"], "is_in_corpus": focus in known, "found": list(dict.fromkeys(seen))})
    return {
        "questions": len(questions),
        "rate": round(1 - len(misses) / len(questions), 4),
        "num_misses": len(misses),
        "misses": misses[:_SHOWN],
    }


def _rows(path: Path) -> Sequence[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
