"""Questions of benchmark files, as they are: Spec-Bench's and MT-bench's turns, HumanEval's prompts, rows of our own.

{"question_id", "category", "turns": [...]}                  Spec-Bench, MT-bench: the task is the category
{"task_id", "prompt", "entry_point", "canonical_solution"}   HumanEval: the task is `code`, the prompt plain text
{"id", "task", "messages" | "prompt" | "turns"}              ours; without a task it is the file's name
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from actors.contest import Question
from jobs.contest import MIXED
from jobs.figures import ALL
from jobs.readers import prompt_formats
from jobs.readers.base import Record, excerpt
from jobs.sources import find_readers
from jobs.validate import input_row
from pipeline.errors import InputError

_RESERVED = (ALL, MIXED)  # what figures call sets of tasks
_HUMANEVAL = {"task_id", "prompt", "canonical_solution"}


def read_questions(
    specs: Sequence[str], per_task: int, tasks: Collection[str] = (), skip: int = 0
) -> tuple[Question, ...]:
    """The same number of questions of every task, in the files' order.

    Args:
        tasks: only these; all if empty.
        skip: questions of each task passed over first.

    Raises:
        InputError: a question that is wanted cannot be read, or there is none.
    """
    found: list[Question] = []
    seen: dict[str, int] = {}
    for row, (record, name) in enumerate(_records(specs)):
        fields = dict(record.fields or {})
        task = _task(fields, name)
        seen[task] = seen.get(task, 0) + 1
        if (not tasks or task in tasks) and skip < seen[task] <= skip + per_task:
            found.append(_question(record, fields, row, task))
    if missing := [task for task in tasks if task not in seen]:
        raise InputError(f"--tasks names {missing[0]!r}; the prompts have {', '.join(sorted(seen))}. Choose of these.")
    if not found:
        raise InputError(
            f"no question is left: the prompts have {seen}, and --skip is {skip}. Give more prompts, or skip fewer."
        )
    return tuple(found)


def _records(specs: Sequence[str]) -> Iterator[tuple[Record, str]]:
    for reader in find_readers(specs, prompt_formats("prompt")):
        for record in reader.records(0):
            yield record, reader.name


def _task(fields: Mapping[str, Any], name: str) -> str:
    given = next((str(fields[key]) for key in ("task", "category") if isinstance(fields.get(key), str)), None)
    if given is None:
        given = "code" if fields.keys() >= _HUMANEVAL else PurePath(name).name.partition(".")[0]
    return f"{given} (task)" if given in _RESERVED else given


def _question(record: Record, fields: dict[str, Any], row: int, task: str) -> Question:
    turns = fields.pop("turns", None)
    if turns is not None:
        if not (isinstance(turns, list) and turns and all(isinstance(turn, str) and turn for turn in turns)):
            raise InputError(
                f"{record.where}: 'turns' is {excerpt(turns)}; it must be a list of what the user says, one string a"
                " turn. Correct the row."
            )
        fields["messages"] = [{"role": "user", "content": turns[0]}]
        fields.pop("prompt", None)
    own = {"id": _first(fields, "id", "question_id", "task_id")}
    kept: dict[str, Any] = {name: fields[name] for name in ("prompt", "messages") if fields.get(name) is not None}
    if not kept and record.error is None:
        has = ", ".join(excerpt(name) for name in fields) or "nothing"
        raise InputError(f"{record.where}: no 'turns', 'messages' or 'prompt' (the row has {has[:200]}); give one.")
    checked = input_row(Record(record.where, {**own, **kept}, record.error), row, "prompt")
    error = record.error or checked.error
    if error is not None:
        raise InputError(f"{error.message}. A benchmark needs every question: correct the row or leave it out.")
    return Question(
        row=row,
        id=checked.id,
        task=task,
        prompt=checked.prompt,
        messages=tuple(dict(message) for message in checked.messages or ()),
        turns=tuple(turns[1:]) if turns else (),
    )


def _first(fields: Mapping[str, Any], *names: str) -> Any:
    return next((fields[name] for name in names if fields.get(name) is not None), None)
