"""From a raw record to an input row: one prompt or a list of messages, an id, and storable other columns.

Nothing here stops a job. What is wrong with a row becomes its error; what is right with it is kept.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from actors.rows import InputRow, RowFailure
from jobs.readers.base import BadValue, Record, excerpt
from pipeline.errors import RowError

# Deeper values could neither be pickled nor written to Parquet safely.
MAX_DEPTH = 32

_MESSAGE_KEYS = ("role", "content")
_T = TypeVar("_T")


def input_row(record: Record, row_index: int, text_column: str) -> InputRow:
    """Check a record.

    Args:
        row_index: its ordinal over all inputs; also its id if it has none.
        text_column: the column that holds the prompt.
    """
    if record.fields is None:
        return InputRow(row_index, str(row_index), error=record.error)
    checks = _Checks(record.where)
    fields = {name: value for name, value in record.fields.items() if checks.run(check_value, name, value)}
    prompt = fields.pop(text_column, None)
    messages = fields.pop("messages", None)
    row_id = checks.run(_check_id, fields.pop("id", None))
    if checks.failure is None:
        checks.run(_check_presence, prompt, messages, text_column, record.fields)
    return InputRow(
        row_index=row_index,
        id=str(row_index) if row_id is None else row_id,
        prompt=None if prompt is None else checks.run(_check_prompt, prompt, text_column),
        messages=None if messages is None else checks.run(check_messages, messages),
        extra=fields,
        error=checks.failure,
    )


class _Checks:
    """Runs checks on one row and keeps the first failure."""

    def __init__(self, where: str) -> None:
        self._where = where
        self.failure: RowFailure | None = None

    def run(self, check: Callable[..., _T], *values: object) -> _T | None:
        """What `check` returns, or None if it fails."""
        try:
            return check(*values)
        except RowError as error:
            if self.failure is None:
                self.failure = RowFailure(error.error_type, f"{self._where}: {error}")
            return None


def check_value(column: str, value: object) -> bool:
    """Whether a column can be stored at all, whatever it is for: True, or the error that says why not.

    Raises:
        RowError: it holds a bad value or invalid Unicode, or is nested too deeply.
    """
    try:
        _check_storable(column, 0)
        _check_storable(value, 0)
    except RowError as error:
        raise RowError(error.error_type, f"column {excerpt(column)}: {error}") from None
    return True


def _check_storable(value: object, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise RowError("type_mismatch", f"nested more than {MAX_DEPTH} levels deep; flatten it")
    match value:
        case str():
            if not value.isascii():
                _check_unicode(value)
        case Mapping():
            for key, inner in value.items():
                _check_storable(key, depth + 1)
                _check_storable(inner, depth + 1)
        case list() | tuple():
            for inner in value:
                _check_storable(inner, depth + 1)
        case BadValue(error_type, problem):
            raise RowError(error_type, problem)


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        shown = excerpt(text[max(0, error.start - 40) : error.start + 40])
        raise RowError(
            "invalid_unicode",
            f"character {error.start} is no valid Unicode (a lone surrogate, or bytes that are not UTF-8), in {shown};"
            " correct the encoding",
        ) from None


def _check_id(value: object) -> str | None:
    match value:
        case None | str():
            return value
        case bool():
            return str(value).lower()
        case list() | tuple() | Mapping() | bytes():
            problem = f"id is {excerpt(value)}; it must be a string or a number"
            raise RowError("wrong_type", problem)
    return str(value)


def _check_presence(prompt: object, messages: object, text_column: str, fields: Mapping[str, Any]) -> None:
    if prompt is None and messages is None:
        has = ", ".join(excerpt(name) for name in fields) or "nothing"
        problem = f"neither {text_column!r} nor 'messages' has a value (the row has {has[:200]}); give one of them"
        raise RowError("missing_field", f"{problem}, or name the prompt's column with --text-column")
    if prompt is not None and messages is not None:
        raise RowError("both_fields", f"both {text_column!r} and 'messages' have a value; keep one of them")


def _check_prompt(prompt: object, text_column: str) -> str:
    if not isinstance(prompt, str):
        hint = "; a list of chat messages belongs into 'messages'" if isinstance(prompt, list) else ""
        raise RowError("wrong_type", f"{text_column!r} is {excerpt(prompt)}; it must be a string{hint}")
    if not prompt:
        raise RowError("empty_prompt", f"{text_column!r} is empty; fill it in or leave the row out")
    return prompt


def check_messages(messages: object) -> tuple[Mapping[str, Any], ...]:
    """The messages with `role` and `content` alone.

    Raises:
        RowError: they are not a list of such messages, or all are empty.
    """
    if not isinstance(messages, list):
        hint = " (CSV cannot hold it; use JSON lines or Parquet)" if isinstance(messages, str) else ""
        problem = f"'messages' is {excerpt(messages)}; it must be a list of objects with role and content{hint}"
        raise RowError("wrong_type", problem)
    if not messages:
        raise RowError("bad_messages", "'messages' is an empty list; give at least one message")
    checked = tuple(_check_message(index, message) for index, message in enumerate(messages))
    if not any(message["content"] for message in checked):
        raise RowError("empty_prompt", "all 'messages' have an empty content; fill one in or leave the row out")
    return checked


def _check_message(index: int, message: object) -> Mapping[str, Any]:
    if not isinstance(message, Mapping):
        problem = f"message {index} is {excerpt(message)}; it must be an object with role and content"
        raise RowError("bad_messages", problem)
    for key in _MESSAGE_KEYS:
        if not isinstance(message.get(key), str):
            found = f"has the {key} {excerpt(message[key])}" if key in message else f"has no {key}"
            raise RowError("bad_messages", f"message {index} {found}; {key} must be a string, only text is supported")
    if not message["role"]:
        raise RowError("bad_messages", f"message {index} has an empty role; it is usually user or assistant")
    # To leave out a value the chat template might have used would silently change the prompt.
    others = [key for key, value in message.items() if key not in _MESSAGE_KEYS and value is not None]
    if others:
        raise RowError(
            "bad_messages", f"message {index} also has {excerpt(others)}; only role and content are supported"
        )
    return {key: message[key] for key in _MESSAGE_KEYS}
