"""Types of the pass-through columns: inferred once, then kept.

JSON has no columns, so their types come from the first rows. Values of a column that agree on no Arrow type (text and
numbers, integers beyond 64 bits, empty objects, objects used as dictionaries) are stored as JSON text, which loses
nothing; the field's metadata says so. Later values that do not fit make error rows.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
from pyarrow import types

from actors.rows import InputRow, RowFailure
from jobs.readers.base import excerpt
from pipeline.errors import InputError

PROMPT_COLUMNS = ("prompt", "messages")

_AS_JSON = {b"encoding": b"json"}
_JSON_FIELDS = 256  # an object of more keys is a dictionary, not a struct
_MAX_COLUMNS = 2000
_INT64 = range(-(1 << 63), 1 << 63)
_EXACT_IN_DOUBLE = range(-(1 << 53), (1 << 53) + 1)


class ColumnTypes:
    """Collects the types of columns, in the order they are first seen."""

    def __init__(self) -> None:
        self._types: dict[str, pa.DataType | None] = {}  # None: no type fits all its values

    def declare(self, fields: Iterable[pa.Field]) -> None:
        """Take the types of columns that have some."""
        for field in fields:
            self._widen(field.name, field.type)

    def observe(self, values: Mapping[str, Any]) -> None:
        """Widen the types so that one more row fits."""
        for name, value in values.items():
            known = self._types.get(name, pa.null())
            if name not in self._types or (known is not None and not fits(value, known)):
                self._widen(name, _type_of(value))

    def schema(self) -> pa.Schema:
        """What was found; columns of nothing but nulls are strings.

        Raises:
            InputError: there are too many columns.
        """
        if len(self._types) > _MAX_COLUMNS:
            raise InputError(
                f"the inputs have {len(self._types)} columns, more than {_MAX_COLUMNS}, among them"
                f" {excerpt(list(self._types)[:5])}. Put what varies from row to row into one column."
            )
        return pa.schema([_field(name, found) for name, found in self._types.items()])

    def _widen(self, name: str, found: pa.DataType | None) -> None:
        self._types[name] = _unify(self._types.get(name, pa.null()), found)


def coerce_extra(row: InputRow, schema: pa.Schema, prompt_columns: Sequence[str] = PROMPT_COLUMNS) -> InputRow:
    """Make a row fit the columns fixed at the start of the job; to be done once.

    Args:
        schema: as from `Inputs.extra_schema`, metadata included.
        prompt_columns: as from `Inputs.prompt_columns`.

    Returns:
        The row with exactly the columns of `schema`. If a value does not fit it is null and the row's error says so.
    """
    extra: dict[str, Any] = {}
    problem = None
    for field in schema:
        value = row.extra.get(field.name)
        if value is not None and field.metadata == _AS_JSON:
            value = json.dumps(value, ensure_ascii=False, default=str)
        elif not fits(value, field.type):
            problem = problem or f"column {field.name!r} is {excerpt(value)}, which is no {field.type}; correct it"
            value = None
        extra[field.name] = value
    problem = problem or _late_column(row, schema, prompt_columns)
    error = row.error
    if problem and error is None:
        error = RowFailure(
            "type_mismatch",
            f"row {row.row_index}: {problem}. Types are fixed by the first rows; to widen them, move such a row there.",
        )
    return replace(row, extra=extra, error=error)


def fits(value: Any, wanted: pa.DataType) -> bool:
    """Whether a column of type `wanted` can hold `value` unchanged.

    Arrow itself would round 1.5, cut a string into a list, take true for 1.0, and drop keys that a struct lacks.
    """
    if value is None:
        return True
    if types.is_string(wanted) or types.is_large_string(wanted):
        return isinstance(value, str)
    if types.is_boolean(wanted):
        return isinstance(value, bool)
    if types.is_floating(wanted):
        return isinstance(value, float) or (type(value) is int and value in _EXACT_IN_DOUBLE)
    if types.is_struct(wanted):
        inner = {field.name: field.type for field in wanted}
        return isinstance(value, Mapping) and all(key in inner and fits(value[key], inner[key]) for key in value)
    if types.is_list(wanted) or types.is_large_list(wanted):
        return isinstance(value, list) and all(fits(item, wanted.value_type) for item in value)
    if types.is_integer(wanted):
        return type(value) is int and _converts(value, wanted)
    return not isinstance(value, int | float) and _converts(value, wanted)


def _converts(value: Any, wanted: pa.DataType) -> bool:
    try:
        pa.scalar(value, type=wanted)
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        return False
    return True


def _late_column(row: InputRow, schema: pa.Schema, prompt_columns: Sequence[str]) -> str | None:
    known = set(schema.names)
    late = [name for name, value in row.extra.items() if value is not None and name not in known]
    late += [name for name in PROMPT_COLUMNS if getattr(row, name) is not None and name not in prompt_columns]
    return f"column {excerpt(late[0])} is not in the output; leave it out" if late else None


def _type_of(value: Any) -> pa.DataType | None:
    """Arrow type of a JSON value; None if it has none."""
    match value:
        case None:
            return pa.null()
        case bool():
            return pa.bool_()
        case int():
            return pa.int64() if value in _INT64 else None
        case float():
            return pa.float64()
        case str():
            return pa.string()
        case list():
            inner: pa.DataType | None = pa.null()
            for item in value:
                inner = _unify(inner, _type_of(item))
            return None if inner is None else pa.list_(inner)
        case dict():
            fields = {name: _type_of(item) for name, item in value.items()}
            is_struct = len(fields) <= _JSON_FIELDS and None not in fields.values()
            return pa.struct(list(fields.items())) if is_struct else None
    return None


def _unify(a: pa.DataType | None, b: pa.DataType | None) -> pa.DataType | None:
    """The type that holds the values of both, or None."""
    if a is None or b is None or a == b:
        return a if a == b else None
    try:
        both = pa.unify_schemas([pa.schema([("_", a)]), pa.schema([("_", b)])], promote_options="permissive")
    except (pa.ArrowTypeError, pa.ArrowInvalid):
        return None
    found = both.field(0).type
    return None if types.is_struct(found) and found.num_fields > _JSON_FIELDS else found


def _field(name: str, found: pa.DataType | None) -> pa.Field:
    stored = None if found is None else _storable(found)
    return pa.field(name, pa.string(), metadata=_AS_JSON) if stored is None else pa.field(name, stored)


def _storable(found: pa.DataType) -> pa.DataType | None:
    """`found` with strings for unknown types; None if Parquet has no such type, as for objects without keys."""
    if types.is_null(found):
        return pa.string()
    if types.is_list(found):
        inner = _storable(found.value_type)
        return None if inner is None else pa.list_(inner)
    if types.is_struct(found):
        fields = {field.name: _storable(field.type) for field in found}
        return pa.struct(list(fields.items())) if fields and None not in fields.values() else None
    return found
