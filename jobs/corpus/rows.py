"""Documents from rows: the text of a column, or with `--chat` the conversation as the model's template writes it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from actors.rows import RowFailure
from jobs.corpus.document import Document, text_document
from jobs.readers.base import Reader, excerpt
from jobs.validate import check_messages, check_value
from pipeline.errors import ModelError, RowError

Renderer = Callable[[Sequence[Mapping[str, Any]]], str]


class RowSource:
    """Documents of one file or data set.

    Args:
        column: holds the text, or with `render` the messages.
        render: from messages to text; None for plain texts.
    """

    def __init__(self, reader: Reader, column: str, render: Renderer | None) -> None:
        self.name = reader.name
        self._reader = reader
        self._column = column
        self._render = render

    def documents(self) -> Iterator[Document | RowFailure]:
        """See `Source.documents`."""
        schema = self._reader.schema()
        if schema is not None and self._column not in schema.names:
            has = ", ".join(schema.names[:20]) or "none"
            yield RowFailure("missing_column", f"{self.name} has no column {self._column!r}; its columns are {has}")
            return
        for row, record in enumerate(self._reader.records(0)):
            if record.fields is None:
                assert record.error is not None
                yield record.error
                continue
            try:
                yield self._document(record.fields, row)
            except RowError as error:
                yield RowFailure(error.error_type, f"{record.where}: {error}")

    def _document(self, fields: Mapping[str, Any], row: int) -> Document:
        value = fields.get(self._column)
        if value is None:
            has = ", ".join(excerpt(name) for name in fields) or "nothing"
            raise RowError("missing_field", f"{self._column!r} has no value; the row has {has[:200]}")
        check_value(self._column, value)
        name = _name(fields) or f"{self.name}:{row}"
        text = self._text(value) if self._render is None else self._render(check_messages(value))
        return text_document(name, text)

    def _text(self, value: object) -> str:
        if not isinstance(value, str):
            hint = "; for conversations give --chat" if isinstance(value, list) else ""
            raise RowError("wrong_type", f"{self._column!r} is {excerpt(value)}; it must be a string{hint}")
        if not value:
            raise RowError("empty_text", f"{self._column!r} is empty")
        return value


def chat_renderer(tokenizer: PreTrainedTokenizerBase) -> Renderer:
    """Renders whole conversations, the assistant's next turn not opened.

    Raises:
        ModelError: the model has no chat template.
    """
    if tokenizer.chat_template is None:
        raise ModelError(
            f"--chat is given, but {tokenizer.name_or_path!r} has no chat template; name a chat model, or leave --chat"
            " out and give texts."
        )

    def render(messages: Sequence[Mapping[str, Any]]) -> str:
        try:
            return str(tokenizer.apply_chat_template([dict(message) for message in messages], tokenize=False))
        except jinja2.TemplateError as error:
            raise RowError("chat_template", f"the model's chat template refuses the messages: {error}") from error

    return render


def _name(fields: Mapping[str, Any]) -> str | None:
    """The row's `id` or `path` if it is a string or a number."""
    for value in (fields.get("id"), fields.get("path")):
        if isinstance(value, str | int | float) and not isinstance(value, bool) and value != "":
            return str(value).encode(errors="backslashreplace").decode()
    return None
