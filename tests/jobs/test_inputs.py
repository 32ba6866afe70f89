"""Inputs: every format gives the same rows, skipping agrees with reading, and what is named wrong says so."""

import gzip
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.rows import InputRow
from jobs.inputs import Inputs, open_inputs
from jobs.readers import stream
from pipeline.errors import ConfigError, InputError

ROWS = [
    {"id": "a", "prompt": "One.", "topic": "x"},
    {"id": "b", "prompt": 'Two,\n\n"quoted" and ünïcode.', "topic": "y"},
    {"id": "c", "prompt": "Three \u2028 with a line separator.", "topic": "z"},
]
CHAT = [{"role": "system", "content": ""}, {"role": "user", "content": "Hello"}]


def write_jsonl(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_csv(path: Path, rows: Sequence[Mapping[str, str]], delimiter: str = ",") -> Path:
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    quoted = [['"' + value.replace('"', '""') + '"' for value in line] for line in lines]
    path.write_bytes("".join(delimiter.join(line) + "\r\n" for line in quoted).encode("utf-8-sig"))
    return path


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]], **options: Any) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def save_dataset(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    datasets.Dataset.from_list(rows).save_to_disk(path)
    return path


def compress(path: Path, suffix: str) -> Path:
    packed = path.with_name(path.name + suffix)
    with pa.output_stream(packed, compression=stream.COMPRESSIONS[suffix]) as out:
        out.write(path.read_bytes())
    return packed


WRITERS = {
    "jsonl": lambda d, rows: write_jsonl(d / "p.jsonl", rows),
    "ndjson.gz": lambda d, rows: compress(write_jsonl(d / "p.ndjson", rows), ".gz"),
    "jsonl.zst": lambda d, rows: compress(write_jsonl(d / "p.jsonl", rows), ".zst"),
    "json of lines": lambda d, rows: write_jsonl(d / "p.json", rows),
    "json list": lambda d, rows: write_text(d / "p.json", json.dumps(rows, indent=1)),
    "csv": lambda d, rows: write_csv(d / "p.csv", rows),
    "tsv": lambda d, rows: write_csv(d / "p.TSV", rows, "\t"),
    "csv.gz": lambda d, rows: compress(write_csv(d / "p.csv", rows), ".gz"),
    "parquet": lambda d, rows: write_parquet(d / "p.parquet", rows, row_group_size=2),
    "dataset": lambda d, rows: save_dataset(d / "saved", rows),
}


def write_text(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def rows_of(*paths: Path | str, start: int = 0, **options: str) -> list[InputRow]:
    return list(open_inputs([str(path) for path in paths], **options).rows(start))


def field_types(inputs: Inputs) -> dict[str, str]:
    return {field.name: str(field.type) for field in inputs.extra_schema()}


@pytest.mark.parametrize("form", WRITERS)
def test_every_format_gives_the_same_rows(tmp_path: Path, form: str) -> None:
    path = WRITERS[form](tmp_path, ROWS)
    inputs = open_inputs([str(path)])
    expected = [
        InputRow(index, row["id"], row["prompt"], extra={"topic": row["topic"]}) for index, row in enumerate(ROWS)
    ]
    assert list(inputs.rows()) == expected
    assert inputs.summary().num_rows == 3
    assert field_types(inputs) == {"topic": "string"}
    assert inputs.prompt_columns() == ("prompt",)
    for start in range(5):
        assert list(inputs.rows(start)) == expected[start:]


@pytest.mark.parametrize("form", ["jsonl", "json list", "parquet", "dataset"])
def test_messages_pass_through_every_format_that_can_hold_them(tmp_path: Path, form: str) -> None:
    path = WRITERS[form](tmp_path, [{"messages": CHAT}])
    inputs = open_inputs([str(path)])
    assert list(inputs.rows()) == [InputRow(0, "0", messages=tuple(CHAT))]
    assert inputs.prompt_columns() == ("messages",)


def test_skipping_agrees_with_reading_over_several_files(tmp_path: Path) -> None:
    many = [{"prompt": f"p{i}", "n": i} for i in range(700)]
    paths = [
        write_jsonl(tmp_path / "1.jsonl", many),
        write_parquet(tmp_path / "2.parquet", many, row_group_size=300),
        write_text(tmp_path / "3.txt", "".join(f"\n \t\nline {i}\r\n" for i in range(700))),
        save_dataset(tmp_path / "4", many),
    ]
    inputs = open_inputs([str(path) for path in paths])
    everything = list(inputs.rows())
    assert [row.row_index for row in everything] == list(range(2800))
    for start in (0, 1, 299, 300, 301, 555, 699, 700, 1000, 1399, 1400, 2100, 2356, 2799, 2800):
        assert list(inputs.rows(start)) == everything[start:]


def test_text_is_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(b"\xef\xbb\xbffirst\r\n\r\n  second \n   \nnul \x00 third")
    assert [row.prompt for row in rows_of(path)] == ["first", "  second ", "nul \x00 third"]
    assert rows_of(path, text_column="question")[0].prompt == "first"


def test_ids_are_strings_and_default_to_the_row_index(tmp_path: Path) -> None:
    ids = [None, "x", 7, 1.5, True, "x"]
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "p", "id": value} for value in ids])
    assert [row.id for row in rows_of(path)] == ["0", "x", "7", "1.5", "true", "x"]


def test_another_column_can_hold_the_prompt(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{"question": "q", "prompt": 5}])
    assert rows_of(path, text_column="question") == [InputRow(0, "0", "q", extra={"prompt": 5})]


def test_order_and_names_depend_on_paths_alone(tmp_path: Path) -> None:
    for name in ("b/x.jsonl", "a/y.jsonl", "a/z.txt", "a/_marker.txt", "a/.hidden.jsonl", "a/README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"prompt": "p"}\n')
    found = open_inputs([str(tmp_path / "b"), f"{tmp_path}/a/*.jsonl", str(tmp_path / "a"), f"{tmp_path}/*/x.jsonl"])
    assert [file.path for file in found.summary().files] == ["y.jsonl", "z.txt", "x.jsonl"]
    whole = open_inputs([str(tmp_path)])
    assert [file.path for file in whole.summary().files] == ["a/y.jsonl", "a/z.txt", "b/x.jsonl"]


def test_a_job_may_write_below_its_inputs(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "p.jsonl", ROWS)
    before = open_inputs([str(tmp_path)]).summary()
    (tmp_path / "out" / "_commits").mkdir(parents=True)
    write_text(tmp_path / "out" / "plan.json", "{}")
    write_parquet(tmp_path / "out" / "part-000000.parquet", [{"prompt": "p", "text": "t"}])
    assert open_inputs([str(tmp_path)]).summary() == before
    with pytest.raises(InputError, match=r"output of a job.*part-\*\.parquet"):
        open_inputs([str(tmp_path / "out")])
    (row,) = rows_of(f"{tmp_path}/out/part-*.parquet", text_column="text")
    assert row.prompt == "t" and row.extra == {"prompt": "p"}


def test_the_summary_hashes_bytes_on_disk(tmp_path: Path) -> None:
    path = WRITERS["ndjson.gz"](tmp_path, ROWS)
    path.write_bytes(path.read_bytes() + gzip.compress(b'{"prompt": "second member"}\n'))
    (file,) = open_inputs([str(path)]).summary().files
    data = path.read_bytes()
    assert (file.rows, file.bytes, file.sha256) == (4, len(data), hashlib.sha256(data).hexdigest())


def test_a_split_of_a_saved_dataset_must_be_named(tmp_path: Path) -> None:
    split = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(tmp_path / "both")
    with pytest.raises(InputError, match=r"has 2 splits.*both/test"):
        open_inputs([str(tmp_path / "both")])
    assert len(rows_of(tmp_path / "both" / "test")) == 3


def test_a_list_larger_than_a_block_is_parsed_piece_by_piece(tmp_path: Path) -> None:
    rows = [{"prompt": "é" * 50_000 + str(i), "n": 10**15 + i} for i in range(60)]
    path = write_text(tmp_path / "p.json", json.dumps(rows, ensure_ascii=False))
    assert [row.prompt for row in rows_of(path)] == [row["prompt"] for row in rows]
    assert [row.extra["n"] for row in rows_of(path, start=50)] == [row["n"] for row in rows[50:]]


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", ROWS)
    inputs = open_inputs([str(path)])
    inputs.summary()
    write_jsonl(path, ROWS[:2])
    with pytest.raises(InputError, match=r"p\.jsonl had 3 rows, now 2"):
        list(inputs.rows())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b"", "not one row"),
        ("p.jsonl", b"\n  \n", "not one row"),
        ("p.md", b"hello", r"unknown format.*\.jsonl"),
        ("p.parquet.gz", b"hello", "unknown format"),
        ("p.parquet", b"hello", r"cannot read .*p\.parquet"),
        ("p.parquet", b"", r"cannot read .*p\.parquet"),
        ("p.jsonl.gz", b"hello", r"cannot read .*p\.jsonl\.gz"),
        ("p.jsonl.gz", gzip.compress(b'{"prompt": "p"}' * 999, mtime=0)[:-9], "Truncated"),
        ("p.jsonl", '{"prompt": "p"}'.encode("utf-16"), "UTF-16"),
        ("p.csv", b"", "header"),
        ("p.csv", b"a,b\n1,2\n", r"no column 'prompt' or 'messages', but a, b"),
        ("p.csv", b"prompt,a,a\n1,2,3\n", "two columns named 'a'"),
        ("p.csv", b"prompt,\xff\n1,2\n", "not UTF-8"),
        ("p.csv", b'prompt,"a\n', "malformed"),
        ("p.json", b'{\n "prompt": "p"\n}', "one JSON object"),
        ("p.json", b'[{"prompt": "p"}, {"prompt": ]', r"element 1 \(from 0\)"),
        ("p.json", b'[{"prompt": "p"}', "ends early"),
        ("p.json", b'[{"prompt": "p"}] x', "after the end"),
        ("p.json", b'[{"prompt": "p"} {"prompt": "p"}]', "'{' where"),
        ("p.json", b'["p", ' + b"9" * 5000 + b"]", "too many digits"),
        ("p.json", b"[" * 100_000, "nested too deeply"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        open_inputs([str(tmp_path / name)]).summary()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("missing.jsonl", "does not exist"),
        ("sub/missing", "does not exist"),
        ("*.jsonl", "no file matches"),
        ("sub", "no file of a known format"),
        ("s3://bucket/p.jsonl", "not on a local file system"),
        ("pipe", "not a regular file"),
    ],
)
def test_a_wrong_name_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=message):
        open_inputs([spec])


def test_the_prompt_column_cannot_be_one_of_another_meaning(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'messages'"):
        open_inputs([str(tmp_path)], text_column="messages")


def test_a_hub_name_that_cannot_be_loaded_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, *options: str, split: str | None) -> None:
        raise ConnectionError(f"no network for {name} {options} {split}")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(InputError, match=r"neither a file nor.*no network for squad .'plain',. train"):
        open_inputs(["squad:plain:train"])


def test_a_hub_dataset_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = datasets.load_from_disk(save_dataset(tmp_path / "saved", ROWS))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.DatasetDict({"train": saved}))
    inputs = open_inputs(["owner/name"])
    assert [row.prompt for row in inputs.rows()] == [row["prompt"] for row in ROWS]
    assert [file.path for file in inputs.summary().files] == ["owner/name"]
