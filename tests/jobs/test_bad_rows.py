"""Bad rows never stop the job: each becomes a row whose error says what, where and what to do; the rest is kept."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.rows import InputRow
from jobs.inputs import open_inputs
from jobs.readers import stream
from tests.jobs.bad_lines import BAD_LINES, GOOD

FINE_LINES = {
    "escapes": (rb'{"prompt": "\u0000\ud83d\ude00"}', "\x00\U0001f600"),
    "space": (b'{"prompt": " "}', " "),
    "carriage return": (b'{"prompt": "a"}\r', "a"),
    "infinity": (b'{"prompt": "a", "x": -Infinity}', "a"),
    "null messages": (b'{"prompt": "a", "messages": null}', "a"),
}


def rows_of(path: Path, **options: str) -> list[InputRow]:
    return list(open_inputs([str(path)], **options).rows())


def error_of(row: InputRow) -> tuple[str, str]:
    assert row.error is not None
    row.error.message.encode()  # storable, whatever the input held
    return row.error.error_type, row.error.message


def test_every_bad_line_becomes_an_error_row_at_its_place(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\n\n".join(line for bad, *_ in BAD_LINES.values() for line in (bad, GOOD)))
    rows = rows_of(path)
    assert [row.row_index for row in rows] == list(range(2 * len(BAD_LINES)))
    assert all(row.prompt == "good" and row.error is None for row in rows[1::2])
    for number, (row, (kind, (_, error_type, message))) in enumerate(zip(rows[::2], BAD_LINES.items(), strict=True)):
        found, text = error_of(row)
        assert (found, text[: len("p.jsonl")]) == (error_type, "p.jsonl"), kind
        assert f" line {4 * number + 1}: " in text, kind
        assert message in text, kind


@pytest.mark.parametrize("kind", FINE_LINES)
def test_odd_lines_that_are_fine(tmp_path: Path, kind: str) -> None:
    line, prompt = FINE_LINES[kind]
    (tmp_path / "p.jsonl").write_bytes(line)
    (row,) = rows_of(tmp_path / "p.jsonl")
    assert (row.prompt, row.error) == (prompt, None)


def test_a_message_may_carry_nulls_but_they_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"messages": [{"role": "user", "content": "a", "name": null}]}')
    (row,) = rows_of(tmp_path / "p.jsonl")
    assert row.messages == ({"role": "user", "content": "a"},)


def test_a_malformed_line_is_quoted_by_its_first_200_bytes(tmp_path: Path) -> None:
    line = b'{"prompt": "\xc3\xa9' + b"x" * 1000
    (tmp_path / "p.jsonl").write_bytes(line)
    _, message = error_of(rows_of(tmp_path / "p.jsonl")[0])
    assert repr(line[:200]) + "..." in message
    assert repr(line[:201]) not in message


def test_a_bad_row_keeps_what_is_right(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(r'{"id": 7, "prompt": "a", "x": "\ud800", "y": 1}')
    (row,) = rows_of(tmp_path / "p.jsonl")
    assert (row.id, row.prompt, row.extra) == ("7", "a", {"y": 1})


def test_a_line_of_10_megabytes_is_read_and_an_endless_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "x" * 10_000_000}) + "\n" + GOOD.decode())
    assert [len(row.prompt or "") for row in rows_of(path)] == [10_000_000, 4]
    monkeypatch.setattr("jobs.readers.lines.MAX_LINE_BYTES", 1 << 20)
    monkeypatch.setattr(stream, "MAX_LINE_BYTES", 1 << 20)
    first, second = rows_of(path)
    assert error_of(first)[0] == "line_too_long"
    assert second.prompt == "good"


CSV_CASES = {
    "too few": ('a,1\nb\n"c",3\n', ["a", None, "c"], "1 fields where the header has 2"),
    "too many": ("a,1\nb,2,3\nc,3\n", ["a", None, "c"], "3 fields where the header has 2"),
    "text behind a quote": ('a,1\n"b"x,2\nc,3\n', ["a", None, "c"], "expected after"),
    "open quote met by another": ('a,1\n"b,2\n"c",3\nd,4\n', ["a", None, "c", "d"], "line 3: not valid CSV"),
    "open quote to the end": ('a,1\n"b,2\nc,3\n\nd,4\n', ["a", None, "c", "d"], "line 3: not valid CSV"),
    "two open quotes": ('"a,1\nb,2\n"c,3\nd,4', [None, "b", None, "d"], "line 2: not valid CSV"),
    "several lines": ('"a\n\nz",1\n"b\nc"\nd,2\n', ["a\n\nz", None, "d"], "lines 5-6: 1 fields"),
}


@pytest.mark.parametrize("kind", CSV_CASES)
def test_a_malformed_csv_record_costs_itself_alone(tmp_path: Path, kind: str) -> None:
    text, prompts, message = CSV_CASES[kind]
    (tmp_path / "p.csv").write_text("prompt,n\n" + text)
    rows = rows_of(tmp_path / "p.csv")
    assert [row.prompt for row in rows] == prompts
    errors = [error_of(row) for row in rows if row.prompt is None]
    assert {error_type for error_type, _ in errors} == {"malformed_csv"}
    assert message in errors[0][1]


def test_csv_fields_may_be_long_empty_or_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_bytes(b"prompt,id\n" + b"x" * 1_000_000 + b",1\n,2\ncaf\xe9,3\na\x00b,4\n")
    long, empty, bad, nul = rows_of(tmp_path / "p.csv")
    assert long.error is None and len(long.prompt or "") == 1_000_000
    assert error_of(empty)[0] == "empty_prompt"
    assert error_of(bad)[0] == "invalid_unicode" and bad.id == "3"
    assert nul.prompt == "a\x00b"


def test_messages_in_csv_are_explained(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("messages\nhello\n")
    error_type, message = error_of(rows_of(tmp_path / "p.csv")[0])
    assert error_type == "wrong_type" and "CSV cannot hold it" in message


def test_a_text_line_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"one\ncaf\xe9\nthree\n")
    one, bad, three = rows_of(tmp_path / "p.txt")
    assert (one.prompt, three.prompt) == ("one", "three")
    assert error_of(bad)[0] == "invalid_unicode" and "p.txt line 2" in error_of(bad)[1]


def test_elements_of_a_list(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_bytes(b'[{"prompt": "a"}, 5, {"prompt": "caf\xe9"}, {"prompt": "b", "prompt": "c"}]')
    good, *bad = rows_of(tmp_path / "p.json")
    assert good.prompt == "a"
    assert [error_of(row)[0] for row in bad] == ["not_an_object", "invalid_unicode", "malformed_json"]
    assert "p.json element 1: a number" in error_of(bad[0])[1]


def test_parquet_text_that_is_not_utf8_costs_its_row_alone(tmp_path: Path) -> None:
    raw = pa.array([b"one", b"caf\xe9", None, b"three"])
    texts = pa.StringArray.from_buffers(len(raw), *raw.buffers()[1:], raw.buffers()[0])
    pq.write_table(pa.table({"prompt": texts, "n": [1, 2, 3, 4]}), tmp_path / "p.parquet")
    one, bad, null, three = rows_of(tmp_path / "p.parquet")
    assert (one.prompt, three.prompt) == ("one", "three")
    assert error_of(bad)[0] == "invalid_unicode" and "p.parquet row 1: column 'prompt'" in error_of(bad)[1]
    assert error_of(null)[0] == "missing_field"
    assert [row.extra for row in (one, bad)] == [{"n": 1}, {"n": 2}]


def test_parquet_prompts_of_other_types(tmp_path: Path) -> None:
    values: list[Any] = [[1], [b"bytes"]]
    for index, value in enumerate(values):
        pq.write_table(pa.table({"prompt": value}), tmp_path / f"{index}.parquet")
    assert [error_of(row)[0] for row in rows_of(tmp_path)] == ["wrong_type", "wrong_type"]
