"""Prompts to train a draft head on: documents, functions, catalogues and questions, none of them a measured prompt.

    python -m benchmarks.head_prompts --measured PROMPTS/*.jsonl --documents CORPORA/*.jsonl --code DIR ... \\
        --catalogues DIR/*.mo --count 8000 --output prompts.jsonl

Any prefix of the output has the same mix. Prompts that a measured set has word for word are left out.
"""

import argparse
import ast
import gettext
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

SHARES = {
    "question_of_document": 0.18,
    "document_qa": 0.13,
    "summary": 0.14,
    "code": 0.12,
    "chat": 0.14,
    "translation": 0.08,
    "qa": 0.08,
    "math": 0.09,
    "passages": 0.04,
}

WORDS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))

Maker = Callable[[random.Random], str]


def main() -> None:
    """Command line."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--measured", type=Path, nargs="+", required=True, help="prompt sets to keep clear of")
    arguments.add_argument("--documents", type=Path, nargs="+", required=True, help="JSON lines with `text`")
    arguments.add_argument("--code", type=Path, nargs="+", required=True, help="directories of Python modules")
    arguments.add_argument("--catalogues", type=Path, nargs="+", required=True, help="German gettext catalogues, .mo")
    arguments.add_argument("--count", type=int, default=8000)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--output", type=Path, required=True)
    options = arguments.parse_args()
    measured = {_normal(text) for path in options.measured for text in _contents(path)}
    makers = _makers(
        [row["text"] for path in options.documents for row in _rows(path)],
        [function for root in options.code for function in _functions(root)],
        [text for path in options.catalogues for text in _translations(path)],
    )
    chosen = random.Random(options.seed)
    seen = set(measured)
    with options.output.open("w", encoding="utf-8") as file:
        written = 0
        while written < options.count:
            (task,) = chosen.choices(list(SHARES), list(SHARES.values()))
            prompt = makers[task](chosen)
            if (key := _normal(prompt)) in seen:
                continue
            seen.add(key)
            row = {"id": f"train-{written}", "task": task, "messages": [{"role": "user", "content": prompt}]}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            written += 1


def _makers(documents: list[str], functions: list[str], translations: list[str]) -> dict[str, Maker]:
    questions = [split for text in documents if (split := _question_and_answer(text))]
    problems = [q for q, a in questions if "<<" in a or "####" in a]
    asked = [(q, a) for q, a in questions if "####" not in a]
    prose = [text for text in documents if "####" not in text and len(text) > 600]

    def document_qa(r: random.Random) -> str:
        question, answer = r.choice(asked)
        text = _excerpt(answer, r, 300, 1600)
        if r.random() < 0.5:  # otherwise the same question may ask for what the text does not say
            question = question.rstrip(" ?") + "?"
        first = r.choice(WORDS["document_qa"])
        return f"{first}\n\n{text}\n\n{r.choice(['Question: ', 'Q: ', ''])}{question}".strip()

    def summary(r: random.Random) -> str:
        first = r.choice(WORDS["summary"])
        return first + _excerpt(r.choice(prose), r, 400, 2200)

    def code(r: random.Random) -> str:
        first = r.choice(WORDS["code"])
        return f"{first}\n\n```python\n{r.choice(functions)}\n```".strip()

    def passages(r: random.Random) -> str:
        question, answer = r.choice(asked)
        others = [_excerpt(r.choice(prose), r, 300, 700) for _ in range(2)]
        texts = [*others, _excerpt(answer, r, 300, 900)]
        r.shuffle(texts)
        return "\n\n".join(texts) + "\n" + question

    return {
        "question_of_document": lambda r: r.choice(asked)[0],
        "document_qa": document_qa,
        "summary": summary,
        "code": code,
        "chat": lambda r: r.choice(WORDS["chat"]).format(*r.sample(WORDS["topics"], 2)),
        "translation": lambda r: "Translate German to English: " + r.choice(translations),
        "qa": lambda r: r.choice(WORDS["qa"]).format(r.choice(WORDS["things"])),
        "math": lambda r: r.choice(problems),
        "passages": passages,
    }


def _question_and_answer(text: str) -> tuple[str, str] | None:
    first, _, rest = text.partition("\n")
    return (first.strip(), rest.strip()) if first.strip().endswith("?") and len(rest) > 40 else None


def _excerpt(text: str, r: random.Random, least: int, most: int) -> str:
    """A run of whole sentences or lines, about `least` to `most` characters."""
    length = r.randint(least, most)
    begin = r.randint(0, max(len(text) - length, 0))
    cut = text[begin : begin + length]
    if begin:
        cut = re.split(r"(?<=[.!?])\s|\n\n", cut, maxsplit=1)[-1]
    return cut.strip()


def _functions(root: Path) -> Iterator[str]:
    """Signatures with docstrings, cut out of modules."""
    for path in sorted(root.rglob("*.py")):
        try:
            source = path.read_text("utf-8")
            tree = ast.parse(source)
        except (SyntaxError, ValueError, OSError):
            continue
        lines = source.splitlines()
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or not node.body or not (text := ast.get_docstring(node)):
                continue
            taken = lines[node.lineno - 1 : node.body[0].end_lineno]
            if 60 <= len(text) <= 900 and 3 <= len(taken) <= 30:
                indent = len(taken[0]) - len(taken[0].lstrip())
                yield "\n".join(line[indent:] for line in taken)


def _translations(path: Path) -> Iterator[str]:
    """German sentences of a catalogue, without markup and placeholders."""
    with path.open("rb") as file:
        try:
            catalogue = gettext.GNUTranslations(file)
        except (OSError, UnicodeDecodeError):
            return
    for text in catalogue._catalog.values():  # type: ignore[attr-defined]
        flat = " ".join(str(text).split())
        if 45 <= len(flat) <= 400 and not re.search(r"[%{}<>\\|=_]|--", flat) and flat.count(" ") >= 5:
            yield flat


def _contents(path: Path) -> Iterator[str]:
    return (message["content"] for row in _rows(path) for message in row["messages"])


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:  # not splitlines(), which breaks at more than line feeds
        yield from (json.loads(line) for line in file if line.strip())


def _normal(text: str) -> str:
    return re.sub(r"\W+", " ", text.lower()).strip()


if __name__ == "__main__":
    main()
