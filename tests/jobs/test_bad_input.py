"""Bad input, given to `rasd generate` as a user would: each kind is found in the output or on stderr."""

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.cli import main
from tests.jobs.bad_lines import BAD_LINES, GOOD

MODEL = "smollm2-135m"
MAX_CONTEXT = 200
# The first rows of the two JSON files, 10,000 together, fix the types of columns. These fail before the engine.
TYPED_ROWS = 5_000

LATE_LINES = {
    "type": (b'{"prompt": "a", "n": "text"}', "type_mismatch", "column 'n' is 'text'"),
    "column": (b'{"prompt": "a", "late": 1}', "type_mismatch", "column 'late'"),
    "size": (b'{"prompt": "a", "n": 9223372036854775808}', "type_mismatch", "9223372036854775808"),
    "length": (json.dumps({"prompt": "word " * 2 * MAX_CONTEXT}).encode(), "prompt_too_long", str(MAX_CONTEXT)),
}
CSV = b'prompt,m\ngood,1\n"open,2\nthree,3,3\n,4\ncaf\xe9,5\ngood,6\n'
CSV_ERRORS = [None, "malformed_csv", "malformed_csv", "empty_prompt", "invalid_unicode", None]
ELEMENTS = b'[{"prompt": "good"}, 5, {"prompt": []}]'
ELEMENT_ERRORS = [None, "not_an_object", "wrong_type"]
TEXT = b"good\ncaf\xe9\n\ngood"
TEXT_ERRORS = [None, "invalid_unicode", None]


def rasd(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs.cli", "generate", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=580, check=False)


def output_rows(output: Path) -> list[dict[str, Any]]:
    """All rows of the committed part files, in the order of the shards."""
    commits = [json.loads(path.read_text()) for path in sorted((output / "_commits").iterdir())]
    return [row for commit in commits for row in pq.read_table(output / commit["file"]).to_pylist()]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of inputs in every format, with bad rows of every kind."""
    directory = tmp_path_factory.mktemp("prompts")
    lines = [line for bad, *_ in BAD_LINES.values() for line in (bad, GOOD)]
    lines += [b'{"n": 1}'] * TYPED_ROWS + [line for line, *_ in LATE_LINES.values()]
    (directory / "1.jsonl").write_bytes(b"\r\n".join(lines))
    (directory / "2.csv").write_bytes(CSV)
    (directory / "3.json").write_bytes(ELEMENTS)
    (directory / "4.txt").write_bytes(TEXT)
    raw = pa.array([b"good", b"caf\xe9"])
    texts = pa.StringArray.from_buffers(len(raw), *raw.buffers()[1:], raw.buffers()[0])
    pq.write_table(pa.table({"prompt": texts}), directory / "5.parquet")
    return directory


@pytest.mark.timeout(600)  # starting Ray and the model takes minutes on a busy machine
def test_bad_rows_become_error_rows_and_the_job_goes_on(prompts: Path, tmp_path: Path) -> None:
    options = (
        "--dtype float32 --max-new-tokens 4 --num-samples 2 --rows-per-shard 512 --num-replicas 1 --ray-address local"
    )
    done = rasd(
        *("--model", MODEL, "--prompts", str(prompts), "--output", str(tmp_path / "out")),
        *("--max-context", str(MAX_CONTEXT), *options.split()),
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    rows = output_rows(tmp_path / "out")
    lines = 2 * len(BAD_LINES) + TYPED_ROWS + len(LATE_LINES)
    total = lines + len(CSV_ERRORS) + len(ELEMENT_ERRORS) + len(TEXT_ERRORS) + 2
    assert [(row["row_index"], row["sample"]) for row in rows] == [(i, s) for i in range(total) for s in range(2)]
    errors = [row for row in rows if row["status"] == "error"]
    assert (record["rows"], record["errors"]) == (2 * total, len(errors))
    assert all(row["text"] is None and row["token_ids"] is None and row["error_message"] for row in errors)
    assert all(1 <= len(row["token_ids"]) <= 4 for row in rows if row["status"] == "ok")
    for sample in range(2):
        check_sample(rows[sample::2], lines)


def check_sample(rows: list[dict[str, Any]], lines: int) -> None:
    """Each row's error, by the place it has in the inputs."""
    late = rows[lines - len(LATE_LINES) : lines]
    for row, (_, error_type, message) in zip(
        rows[: 2 * len(BAD_LINES) : 2] + late, [*BAD_LINES.values(), *LATE_LINES.values()], strict=True
    ):
        assert row["error_type"] == error_type, (row, message)
        assert message in row["error_message"]
    assert all(row["prompt"] == "good" and row["status"] == "ok" for row in rows[1 : 2 * len(BAD_LINES) : 2])
    assert {row["error_type"] for row in rows[2 * len(BAD_LINES) : lines - len(LATE_LINES)]} == {"missing_field"}
    rest = [*CSV_ERRORS, *ELEMENT_ERRORS, *TEXT_ERRORS, None, "invalid_unicode"]
    assert [row["error_type"] for row in rows[lines:]] == rest
    broken = rows[0]["error_message"]
    assert broken.startswith("1.jsonl line 1: ") and repr(next(iter(BAD_LINES.values()))[0]) in broken


def test_an_unreadable_input_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    missing = tmp_path / "missing.jsonl"
    done = rasd("--model", MODEL, "--prompts", str(missing), "--output", str(tmp_path / "out"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"rasd: error: {missing} does not exist. Check the path.\n"
    assert not (tmp_path / "out").exists()


BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "no rows": ("p.jsonl", b"\n", "not one row"),
    "unknown format": ("p.pdf", b"%PDF", "p.pdf has an unknown format"),
    "no Parquet": ("p.parquet", b"PAR1", "cannot read"),
    "cut short": ("p.jsonl.gz", gzip.compress(GOOD * 999)[:-9], "cannot read"),
    "UTF-16": ("p.jsonl", GOOD.decode().encode("utf-16"), "is UTF-16"),
    "no prompt column": ("p.csv", b"question,answer\na,b\n", "no column 'prompt' or 'messages', but question, answer"),
    "column twice": ("p.csv", b"prompt,a,a\n1,2,3\n", "two columns named 'a'"),
    "no list": ("p.json", b'{\n"prompt": "p"\n}', "one JSON object"),
    "broken list": ("p.json", b'[{"prompt": "p"', "element 0 (from 0)"),
}
BAD_WORDS: dict[str, tuple[str, str]] = {
    "empty pattern": ("--prompts {dir}/*.csv", "no file matches"),
    "empty directory": ("--prompts {dir}/empty", "no file of a known format"),
    "remote path": ("--prompts s3://bucket/p.jsonl", "s3://bucket/p.jsonl is not on a local file system"),
    "no such model": ("--model {dir}/model", "{dir}/model"),
    "no such method": ("--method magic", "--method is 'magic'; it must be auto or one of"),
    "misspelt option": ("--max-new-token 5", "did you mean --max-new-tokens?"),
    "option out of range": ("--top-p 1.5", "--top-p is"),
    "no number": ("--temperature hot", "--temperature is 'hot'"),
    "text column": ("--text-column id", "'id'"),
    "unknown key": ("--config {dir}/bad.yaml", "did you mean top_p?"),
    "no YAML": ("--config {dir}/good.jsonl.missing", "cannot be read"),
    "output is a file": ("--output {dir}/good.jsonl", "--output is"),
    "foreign output": ("--output {dir}", "holds"),
}


def stderr_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["generate", *arguments]) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("rasd: error: ")]
    assert len(errors) == 1 and captured.err.endswith(errors[0] + "\n") and "Traceback" not in captured.err
    return errors[0]


@pytest.fixture
def arguments(tmp_path: Path) -> Callable[[str], list[str]]:
    """A good command line with some options replaced."""
    (tmp_path / "good.jsonl").write_bytes(GOOD)
    (tmp_path / "bad.yaml").write_text("top_pp: 0.5\n")
    (tmp_path / "empty").mkdir()
    good = {"--model": MODEL, "--prompts": "{dir}/good.jsonl", "--output": "{dir}/out"}

    def replaced(words: str) -> list[str]:
        name, value = words.split(" ")
        return [word.format(dir=tmp_path) for pair in {**good, name: value}.items() for word in pair]

    return replaced


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files(
    kind: str, tmp_path: Path, arguments: Callable[[str], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    name, content, message = BAD_FILES[kind]
    (tmp_path / name).write_bytes(content)
    error = stderr_of(arguments(f"--prompts {{dir}}/{name}"), capsys)
    assert message in error and name in error


@pytest.mark.parametrize("kind", BAD_WORDS)
def test_bad_words(
    kind: str, tmp_path: Path, arguments: Callable[[str], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    words, message = BAD_WORDS[kind]
    assert message.format(dir=tmp_path) in stderr_of(arguments(words), capsys)
