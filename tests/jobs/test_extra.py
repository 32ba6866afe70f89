"""Other columns: whatever the inputs hold, what is handed on can be written, and means what it did."""

import datetime
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.rows import InputRow
from jobs.extra import ColumnTypes, coerce_extra
from jobs.inputs import open_inputs
from pipeline.errors import InputError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)
KINDS: list[st.SearchStrategy[Any]] = [
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.text(max_size=3),
    st.booleans(),
]
SAME_KIND = st.one_of([st.lists(st.none() | kind, max_size=5) for kind in KINDS])


def schema_of(values: list[Any]) -> pa.Schema:
    types = ColumnTypes()
    for value in values:
        types.observe({"x": value})
    return types.schema()


def coerced(values: list[Any], schema: pa.Schema) -> list[InputRow]:
    return [coerce_extra(InputRow(i, str(i), "p", extra={"x": value}), schema) for i, value in enumerate(values)]


def written(rows: list[InputRow], schema: pa.Schema, directory: Path) -> list[Any]:
    table = pa.Table.from_pylist([dict(row.extra) for row in rows], schema=schema)
    pq.write_table(table, directory / "out.parquet")
    return pq.read_table(directory / "out.parquet").column("x").to_pylist() if schema.names else []


def equal(stored: Any, value: Any) -> bool:
    """Equality up to the nulls that a struct fills in."""
    if isinstance(value, float) and math.isnan(value):
        return isinstance(stored, float) and math.isnan(stored)
    if isinstance(value, list):
        return len(stored) == len(value) and all(map(equal, stored, value))
    if isinstance(value, dict):
        return all(equal(item, value.get(key)) for key, item in stored.items()) and value.keys() <= stored.keys()
    return bool(stored == value)


def check_lossless(values: list[Any], schema: pa.Schema, directory: Path) -> None:
    rows = coerced(values, schema)
    stored = written(rows, schema, directory)
    as_json = bool(schema.field("x").metadata)
    for value, row, found in zip(values, rows, stored, strict=True):
        if row.error is not None:
            assert row.error.error_type == "type_mismatch" and "column 'x'" in row.error.message
            assert found is None
        elif as_json and value is not None:
            assert equal(json.loads(found), value)
        else:
            assert equal(found, value)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out")


@settings(deadline=None)
@given(st.lists(JSON, min_size=1, max_size=5), st.lists(JSON, max_size=5))
def test_any_json_is_stored_without_loss_or_refused(directory: Path, first: list[Any], later: list[Any]) -> None:
    check_lossless(first + later, schema_of(first), directory)


@settings(deadline=None)
@given(SAME_KIND)
def test_values_of_one_kind_are_never_refused(directory: Path, values: list[Any]) -> None:
    schema = schema_of([None, *values])
    assert not schema.field("x").metadata
    assert all(row.error is None for row in coerced(values, schema))
    check_lossless(values, schema, directory)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([1, None, -5], "int64"),
        ([1, 2.5], "double"),
        (["a"], "string"),
        ([True], "bool"),
        ([None], "string"),
        ([[], [1], [2.5]], "list<item: double>"),
        ([[None]], "list<item: string>"),
        ([{"a": 1}, {"b": "x"}, {"a": None}], "struct<a: int64, b: string>"),
        ([{}, {"a": []}], "struct<a: list<item: string>>"),
    ],
)
def test_types_of_json_values(values: list[Any], wanted: str) -> None:
    assert str(schema_of(values).field("x").type) == wanted
    assert schema_of(values).field("x").metadata is None


@pytest.mark.parametrize(
    "values",
    [[1, "a"], [True, 1], [2**63], [{}], [[{}]], [[1, "a"]], [{"a": 1}, [1]], [{str(i): i} for i in range(300)]],
)
def test_values_of_no_common_type_become_json_text(directory: Path, values: list[Any]) -> None:
    schema = schema_of(values)
    assert schema.field("x").metadata == {b"encoding": b"json"}
    assert pa.ipc.read_schema(schema.serialize()).field("x").metadata == {b"encoding": b"json"}
    check_lossless(values, schema, directory)
    assert not any(row.error for row in coerced(values, schema))


@pytest.mark.parametrize(
    ("known", "value", "wanted"),
    [
        (1, "a", "int64"),
        (1, True, "int64"),
        (1, 2.5, "int64"),
        (1, 2**63, "int64"),
        (1.5, True, "double"),
        (1.5, 2**60 + 1, "double"),
        ("a", 1, "string"),
        (["a"], "abc", "list<item: string>"),
        ({"a": 1}, {"a": 1, "z": 2}, "struct<a: int64>"),
        ({"a": 1}, [["a", 1]], "struct<a: int64>"),
    ],
)
def test_a_later_value_that_does_not_fit_is_refused_by_name(known: Any, value: Any, wanted: str) -> None:
    (row,) = coerced([value], schema_of([known]))
    assert row.extra == {"x": None} and row.prompt == "p"
    assert row.error is not None and row.error.error_type == "type_mismatch"
    assert repr(value) in row.error.message and wanted in row.error.message


def test_columns_that_come_too_late_are_refused() -> None:
    schema = schema_of([1])
    row = coerce_extra(InputRow(3, "3", "p", extra={"x": 1, "new": 2}), schema)
    assert row.extra == {"x": 1}
    assert row.error is not None and "column 'new'" in row.error.message
    assert coerce_extra(InputRow(3, "3", "p", extra={"new": None}), schema).error is None
    chat = InputRow(3, "3", messages=({"role": "user", "content": "a"},))
    assert coerce_extra(chat, schema, ("messages",)).error is None
    late = coerce_extra(chat, schema, ("prompt",))
    assert late.error is not None and "'messages'" in late.error.message


def test_the_first_error_stays() -> None:
    (tmp,) = coerced(["a"], schema_of([1]))
    assert tmp.error is not None
    again = coerce_extra(InputRow(0, "0", extra={"x": "a"}, error=tmp.error), schema_of([1]))
    assert again.error == tmp.error and again.extra == {"x": None}


def test_parquet_columns_keep_their_own_types(tmp_path: Path) -> None:
    when = datetime.datetime(2026, 11, 23, 12, 30, tzinfo=datetime.UTC)
    columns = {
        "i": pa.array([1, None], pa.int8()),
        "f": pa.array([0.1, None], pa.float32()),
        "t": pa.array([when, None], pa.timestamp("ns", "UTC")),
        "d": pa.array([datetime.date(2026, 1, 1), None]),
        "b": pa.array([b"\xff", None]),
        "m": pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int32())),
        "s": pa.array([{"a": [1], "b": None}, None], pa.struct([("a", pa.list_(pa.int16())), ("b", pa.string())])),
        "c": pa.array(["x", None]).dictionary_encode(),
        "l": pa.array(["x", None], pa.large_string()),
        "u": pa.array([b"0123456789abcdef", None], pa.uuid()),
        "j": pa.array(["{}", None], pa.json_(pa.string())),
        "n": pa.nulls(2),
    }
    pq.write_table(pa.table({"prompt": ["p", "q"], **columns}), tmp_path / "p.parquet")
    inputs = open_inputs([str(tmp_path / "p.parquet")])
    schema = inputs.extra_schema()
    rows = [coerce_extra(row, schema) for row in inputs.rows()]
    assert [row.error for row in rows] == [None, None]
    table = pa.Table.from_pylist([dict(row.extra) for row in rows], schema=schema)
    for name, column in columns.items():
        plain = {"c": pa.string(), "u": pa.binary(16), "j": pa.string(), "n": pa.string()}.get(name, column.type)
        assert schema.field(name).type == plain
        assert table.column(name).to_pylist() == column.cast(plain).to_pylist()


def test_columns_are_known_from_every_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "a": 1}\n' * 200)
    (tmp_path / "b.jsonl").write_text('{"prompt": "p", "b": "x", "a": 1.5}\n' * 200)
    pq.write_table(pa.table({"messages": [[{"role": "user", "content": "a"}]], "c": [b"x"]}), tmp_path / "c.parquet")
    (tmp_path / "d.csv").write_text("prompt,b,d\np,007,\n")
    inputs = open_inputs([str(tmp_path)])
    schema = inputs.extra_schema(limit=10)
    assert {field.name: str(field.type) for field in schema} == {
        "a": "double",
        "b": "string",
        "c": "binary",
        "d": "string",
    }
    assert inputs.prompt_columns() == ("prompt", "messages")
    assert all(coerce_extra(row, schema, inputs.prompt_columns()).error is None for row in inputs.rows())


def test_too_many_columns_are_an_error(tmp_path: Path) -> None:
    rows = [json.dumps({"prompt": "p", f"key{i}": 1}) for i in range(2100)]
    (tmp_path / "p.jsonl").write_text("\n".join(rows))
    with pytest.raises(InputError, match="2100 columns"):
        open_inputs([str(tmp_path)]).extra_schema()
