"""Question files of Spec-Bench, MT-bench and HumanEval load as they are."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from jobs.questions import read_questions
from pipeline.errors import InputError

SPEC_BENCH = [
    {"question_id": 81, "category": "writing", "turns": ["Write a note.", "Rewrite it, shorter."]},
    {"question_id": 82, "category": "translation", "turns": ["Translate: Guten Tag"], "reference": ["Good day"]},
    {"question_id": 83, "category": "writing", "turns": ["Write a poem.", "Now in prose."], "reference": []},
]
HUMANEVAL = [
    {
        "task_id": f"HumanEval/{i}",
        "prompt": f"def f{i}():\n",
        "entry_point": f"f{i}",
        "canonical_solution": "",
        "test": "",
    }
    for i in range(3)
]


def write(path: Path, rows: list[Any]) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def test_the_files_of_the_benchmarks_load_as_they_are(tmp_path: Path) -> None:
    files = [write(tmp_path / "question.jsonl", SPEC_BENCH), write(tmp_path / "HumanEval.jsonl.gz", HUMANEVAL)]
    found = read_questions(files, 2)
    assert [(q.id, q.task, q.prompt, q.messages, q.turns) for q in found] == [
        ("HumanEval/0", "code", "def f0():\n", (), ()),
        ("HumanEval/1", "code", "def f1():\n", (), ()),
        ("81", "writing", None, ({"role": "user", "content": "Write a note."},), ("Rewrite it, shorter.",)),
        ("82", "translation", None, ({"role": "user", "content": "Translate: Guten Tag"},), ()),
        ("83", "writing", None, ({"role": "user", "content": "Write a poem."},), ("Now in prose.",)),
    ]
    assert [q.row for q in found] == [0, 1, 3, 4, 5], "ordinals over all that there is"


def test_our_own_rows_keep_their_task_and_others_take_the_files_name(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "task": "rag", "prompt": "x"},
        {"prompt": "y"},
        {"messages": [{"role": "user", "content": "z"}]},
    ]
    found = read_questions([write(tmp_path / "mine.jsonl", rows)], 5)
    assert [(q.id, q.task, q.said_last) for q in found] == [("a", "rag", "x"), ("1", "mine", "y"), ("2", "mine", "z")]


def test_tasks_and_skipping(tmp_path: Path) -> None:
    file = write(tmp_path / "question.jsonl", SPEC_BENCH)
    assert [q.id for q in read_questions([file], 1, ["writing"], skip=1)] == ["83"]
    with pytest.raises(InputError, match="'speaking'; the prompts have translation, writing"):
        read_questions([file], 1, ["speaking"])
    with pytest.raises(InputError, match="--skip is 2"):
        read_questions([file], 1, skip=2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question_id": 1, "turns": []}, r"'turns' is \[\]; it must be a list"),
        ({"question_id": 1, "turns": "hello"}, "'turns' is 'hello'"),
        ({"question_id": 1, "turns": ["a", 2]}, r"'turns' is \['a', 2\]"),
        ({"question_id": 1}, r"no 'turns', 'messages' or 'prompt' \(the row has 'question_id'\)"),
        ({"prompt": ""}, "'prompt' is empty"),
    ],
)
def test_a_question_that_cannot_be_asked_is_named(tmp_path: Path, row: Any, message: str) -> None:
    file = write(tmp_path / "bad.jsonl", [SPEC_BENCH[1], row])
    with pytest.raises(InputError, match=f"bad.jsonl line 2.*{message}"):
        read_questions([file], 3)
    assert len(read_questions([file], 1, ["translation"])) == 1, "what is not asked need not be right"


@pytest.mark.parametrize("name", ["all", "mixed"])
def test_a_task_is_not_taken_for_a_set_of_tasks(tmp_path: Path, name: str) -> None:
    own = write(tmp_path / f"{name}.jsonl", [{"prompt": "one"}])
    other = write(tmp_path / "other.jsonl", [{"prompt": "two"}])
    assert {question.task for question in read_questions([own, other], 5)} == {f"{name} (task)", "other"}
